"""From a folder of photographs to a plan, and at once to its run."""

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from aliprod.cli.data import AskedReading, takes_reading
from aliprod.cli.flags import Asked, answer, cores, json_flag, path, say, storage_flag
from aliprod.errors import Refused, StorageFull

if TYPE_CHECKING:
    from aliprod.plan.draft import Computer, Photographs

_HUB = ("huggingface.co", 443)  # of timm's weights
_PATIENCE_SECONDS = 3.0
_STEPS = 3  # measured of each piece of work


@click.command("init")
@takes_reading
@click.argument("photos", type=path)
@click.option("--out", type=path, help="The plan's file. [the folder's name, here]")
@storage_flag
@json_flag
def init_command(asked: AskedReading, photos: Path, out: Path | None, storage: Path | None) -> None:
    """Write a plan fit for photographs and this machine.

    PHOTOS is a folder in any layout that docs/catalogues.md names, or a table. Then a few steps of each training are
    measured, for a forecast.

    \b
    Example: aliprod init photos --out photos.toml
    """
    plan = out or _file_of(photos)
    photographs, computer = _write(asked, photos, plan)
    request = Asked(plan, (), storage).request()
    from aliprod.forecast.rates import measure_plan
    from aliprod.forecast.simulate import forecast
    from aliprod.plan.open import open_plan
    from aliprod.report.estimate import lines

    say(f"{plan} is written. Measuring a few steps of each training ...")
    for found in measure_plan(request, "train", _STEPS):
        say(f"  {found['part']} of {', '.join(found['jobs'])}: {found['images_per_second']:,.0f} images/s")
    opened, ranks = open_plan(request), computer.gpus or computer.cpus
    estimate = asdict(forecast(opened, ranks))
    found = {"plan": request.plan.name, "path": str(plan), "classes": len(photographs.counts)}
    found |= {"train": photographs.train, "val": photographs.val, "test": photographs.test, "estimate": estimate}
    told = lines(estimate, opened.plan.cluster.use_gpu is not False, "")
    answer(found, "\n".join([*told, f"This runs it: aliprod run {plan}"]))


def drafted(asked: Asked) -> Asked:
    """What `run` was given, with a plan in the place of photographs: the one that stands here of them, or a new one."""
    if asked.file.suffix == ".toml" or not asked.file.exists():  # before anything is loaded
        return asked
    from aliprod.catalogue.tables import TABLES

    if not asked.file.is_dir() and asked.file.suffix.lower() not in TABLES:
        return asked
    plan = _file_of(asked.file)
    if plan.exists():
        say(f"The plan of {asked.file} is {plan}: it goes on.")
    else:
        _write(AskedReading(), asked.file, plan)
        say(f"{plan} is written: every value is yours to change.")
    return replace(asked, file=plan)


def _file_of(photos: Path) -> Path:
    from aliprod.plan.draft import plain

    return Path(f"{plain(photos.absolute().stem if photos.is_file() else photos.absolute().name)}.toml")


def _write(asked: AskedReading, photos: Path, out: Path) -> "tuple[Photographs, Computer]":
    """Write the plan, and return what it is fit for. Refused: the file is there, or no plan fits."""
    from aliprod.build.preflight import check_catalogue
    from aliprod.catalogue import sources
    from aliprod.plan import draft
    from aliprod.store import commit

    if out.exists():
        advice = f"`aliprod run {out}` runs it. For a new one say --out, or move it away."
        raise Refused("is there already, and may hold your changes.", out, advice)
    if not out.parent.is_dir():
        raise Refused("cannot be written: there is no such folder.", out, "Make it, or say another --out.")
    catalogue = sources.read(photos, asked.reading())  # first: what is no catalogue is refused at once
    for remark in catalogue.remarks:
        say(remark)
    check_catalogue(catalogue, photos)
    photographs, computer = draft.look_at(catalogue), _computer()
    text = draft.draft(draft.plain(out.stem), _as_said(photos, out), photographs, computer, _said(asked, out))
    try:
        commit.write_file(out, text)
    except StorageFull as error:
        raise Refused(error.what, out, "Say --out.") from error
    return photographs, computer


def _as_said(place: Path, out: Path) -> str:
    """A path as it stands in a plan: relative to its file where it lies beside or below it."""
    relative = os.path.relpath(place.expanduser().absolute(), out.absolute().parent)
    return str(place.expanduser().absolute()) if relative.startswith("..") else relative


def _said(asked: AskedReading, out: Path) -> dict[str, Any]:
    """What [catalogue] says besides the path."""
    reading = asked.reading()
    links = _as_said(reading.links, out) if reading.links else None
    said = {"columns": dict(reading.columns), "val": reading.val, "seed": reading.seed, "links": links}
    return {key: value for key, value in said.items() if value}


def _computer() -> "Computer":
    """This machine."""
    import socket

    import torch

    from aliprod.plan.draft import Computer

    gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    try:
        socket.create_connection(_HUB, _PATIENCE_SECONDS).close()
        online = True
    except OSError:
        online = bool(os.environ.get("HF_ENDPOINT"))  # a mirror
    return Computer(cores(), len(gpus), min((gpu.total_memory for gpu in gpus), default=0), online)

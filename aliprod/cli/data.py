"""The commands that make, check and prepare catalogues, and write a plan for one."""

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from aliprod.cli import flags
from aliprod.cli.flags import Asked, Share, answer, cores, say, until_done
from aliprod.errors import Refused, StorageFull
from aliprod.shown import escaped

if TYPE_CHECKING:
    from aliprod.catalogue.sources import Reading
    from aliprod.ingest.check import Report
    from aliprod.plan.draft import Computer, Photographs

_HUB = ("huggingface.co", 443)  # of timm's weights
_PATIENCE_SECONDS = 3.0
_STEPS = 3  # measured of each piece of work


@click.group("data")
def data_group() -> None:
    """Make, check and prepare catalogues of images."""


@data_group.command("synth")
@click.argument("out", type=flags.path)
@click.option("--classes", default=8, show_default=True, type=click.IntRange(2, 1_000_000), help="Classes.")
@click.option("--images", default=212, show_default=True, type=click.IntRange(1, 100_000_000), help="Training images.")
@click.option("--seed", default=0, show_default=True, type=flags.seed, help="Same seed, same pictures.")
@flags.json_flag
def synth_command(out: Path, classes: int, images: int, seed: int) -> None:
    """Render a long-tailed catalogue of product packages.

    In AliProducts layout.

    \b
    Example: aliprod data synth photos --classes 100 --images 5000
    """
    from aliprod.synth.synth import synthesise

    counts = asdict(synthesise(out, classes, images, seed, processes=cores()))
    answer(counts, "{path}: {classes} classes, {train} train, {val} val, {test} test images".format(**counts))


def _reading(
    column: tuple[str, ...] = (), val: float | None = None, seed: int = 0, links: Path | None = None
) -> "Reading":
    """How a catalogue is to be read, as [catalogue] in a plan would say. Refused: a column that is none."""
    from aliprod.catalogue.sources import Reading

    columns = dict(text.partition("=")[::2] for text in column)
    if wrong := [role for role, name in columns.items() if role not in ("path", "class", "split") or not name]:
        advice = "Say --column path=NAME, --column class=NAME or --column split=NAME."
        raise Refused("names no column.", f"--column {wrong[0]}", advice)
    return Reading(columns, val, seed, links)


takes_reading = flags.takes(
    _reading,
    click.option("--column", multiple=True, metavar="ROLE=NAME", help="Of a table: path, class or split."),
    click.option("--val", type=Share(0, 0.5), help="Share to hold out where there is no val."),
    click.option("--seed", default=0, show_default=True, type=flags.seed, help="Of what is held out."),
    click.option("--links", type=flags.path, help="Folder below which links and absolute paths may lead."),
)


@data_group.command("check")
@takes_reading
@click.argument("catalogue", metavar="PATH", type=flags.path)
@click.option("--strict", is_flag=True, help="Exit with 1 where anything is wrong.")
@flags.storage_flag
@flags.json_flag
def check_command(reading: "Reading", catalogue: Path, strict: bool, storage: Path | None) -> None:
    """Read every image of a catalogue and list what is wrong with it.

    Of a plan, it is the plan's catalogue, read as the plan says; labels that its ensemble doubts are listed too.

    \b
    Example: aliprod data check photos
    """
    is_plan = catalogue.suffix == ".toml"
    if is_plan and reading != _reading():
        raise Refused("is a plan, which says itself how to read.", catalogue, "Say it there, under [catalogue].")
    from aliprod.ingest.check import check

    found = _checked_plan(catalogue, storage) if is_plan else check(catalogue, cores(), reading)
    report = found.as_json()
    lines = [escaped(f"{problem['path']}: {problem['problem']}") for problem in report["problems"]]
    splits = ", ".join(f"{report[split]} {split}" for split in ("train", "val", "test"))
    readable = f"{report['readable']} of {report['images']} images are readable ({splits})"
    classes = f"{report['classes']} class{'es' * (report['classes'] != 1)}"
    last = f"{readable}, {classes}, {len(lines)} problem{'s' * (len(lines) != 1)}."
    answer(report, "\n".join([*map(escaped, report["notes"]), *lines, last]))
    if strict and lines:
        click.get_current_context().exit(1)


def _checked_plan(file: Path, storage: Path | None) -> "Report":
    """The report on a plan's catalogue, and on what its ensemble says of the labels."""
    request = Asked(file, (), storage).request()
    from aliprod.ingest.check import check
    from aliprod.plan.open import open_plan
    from aliprod.plan.places import catalogue_path
    from aliprod.recipe.options import needs
    from aliprod.report.error_analysis import doubted

    opened = open_plan(request)
    catalogue = opened.read_catalogue()
    asked = {name: job.stage.objective for name, job in opened.jobs.items()}
    groups = {name: needs(objective.name, objective.options).group for name, objective in asked.items()}
    report = check(catalogue_path(opened.plan, opened.places), cores(), opened.reading, groups)
    return replace(report, problems=(*report.problems, *doubted(opened.folder, catalogue)))


@data_group.command("prepare")
@takes_reading
@click.argument("catalogue")
@click.argument("out")
@click.option("--short-side", default=512, show_default=True, type=click.IntRange(8, 65_535), help="Pixels, at most.")
@click.option("--quality", default=90, show_default=True, type=click.IntRange(50, 100), help="Of JPEGs made anew.")
@click.option("--max-skipped", default=0.5, show_default=True, type=Share(0, 1), help="Share that may be unreadable.")
@flags.json_flag
def prepare_command(
    reading: "Reading", catalogue: str, out: str, short_side: int, quality: int, max_skipped: float
) -> None:
    """Write a catalogue as Parquet shards to train from.

    Every image is read once and written upright, RGB, of a bounded size.

    What cannot be read is skipped and listed. A call that was killed goes on where it was: start it again.
    Both may be URIs: s3://BUCKET/photos, gs://, az://.

    \b
    Example: aliprod data prepare photos prepared
    """
    from aliprod.ingest.prepare import Settings, prepare

    done = until_done(prepare(catalogue, out, Settings(short_side, quality), max_skipped, cores(), reading))
    answer(done.as_json(), done.text())


@click.command("init")
@takes_reading
@click.argument("photos", type=flags.path)
@click.option("--out", type=flags.path, help="The plan's file. [the folder's name, here]")
@flags.storage_flag
@flags.json_flag
def init_command(reading: "Reading", photos: Path, out: Path | None, storage: Path | None) -> None:
    """Write a plan fit for photographs and this machine.

    PHOTOS is a folder in any layout that docs/catalogues.md names, or a table. Then a few steps of each training are
    measured, for a forecast.

    \b
    Example: aliprod init photos --out photos.toml
    """
    plan = out or _file_of(photos)
    photographs, computer = _write(reading, photos, plan)
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
        _check_plan_of(asked.file, plan)
        say(f"The plan of {asked.file} is {plan}: it goes on.")
    else:
        _write(_reading(), asked.file, plan)
        say(f"{plan} is written: every value is yours to change.")
    return replace(asked, file=plan)


def _check_plan_of(photos: Path, plan: Path) -> None:
    """Refused: the plan is one of other photographs."""
    from aliprod.plan.load import load

    named = load(plan).catalogue.path or "a rendered catalogue"
    if Path(named).resolve() != photos.resolve():
        advice = f"`aliprod init {photos} --out ANOTHER.toml` writes one of its own; `aliprod run` takes that."
        raise Refused(f"is the plan of {named}, not of {photos}.", plan, advice)


def _file_of(photos: Path) -> Path:
    from aliprod.plan.draft import plain

    return Path(f"{plain(photos.absolute().stem if photos.is_file() else photos.absolute().name)}.toml")


def _write(reading: "Reading", photos: Path, out: Path) -> "tuple[Photographs, Computer]":
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
    catalogue = sources.read(photos, reading)  # first: what is no catalogue is refused at once
    for remark in catalogue.remarks:
        say(remark)
    check_catalogue(catalogue, photos)
    photographs, computer = draft.look_at(catalogue), _computer()
    links = _as_said(reading.links, out) if reading.links else None
    said = {key: value for key, value in (asdict(reading) | {"links": links}).items() if value}
    text = draft.draft(draft.plain(out.stem), _as_said(photos, out), photographs, computer, said)
    try:
        commit.write_file(out, text)
    except StorageFull as error:
        raise Refused(error.what, out, "Say --out.") from error
    return photographs, computer


def _as_said(place: Path, out: Path) -> str:
    """A path as it stands in a plan: relative to its file where it lies beside or below it."""
    relative = os.path.relpath(place.expanduser().absolute(), out.absolute().parent)
    return str(place.expanduser().absolute()) if relative.startswith("..") else relative


def _computer() -> "Computer":
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

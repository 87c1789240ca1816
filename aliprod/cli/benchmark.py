"""The command that measures this machine."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from aliprod.cli.answers import answer
from aliprod.cli.plans import Asked
from aliprod.errors import Refused

if TYPE_CHECKING:
    from aliprod.training.speed import Part

_OF_A_CATALOGUE: dict[str, Any] = {"network": "resnet50", "crop": 224, "batch_size": 64, "loader_processes": 0}


@click.command("benchmark")
@click.argument("part", type=click.Choice(["loader", "step", "train"]))
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--network", help="timm's name. [resnet50]")
@click.option("--crop", type=click.IntRange(8, 4096), help="Pixels. [224]")
@click.option("--batch-size", type=click.IntRange(1), help="Images a step. [64]")
@click.option("--loader-processes", type=click.IntRange(0), help="That read images. [0]")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Override a value of the plan.")
@click.option("--storage", type=click.Path(path_type=Path), help="Folder of all results. [runs]")
@click.option("--steps", default=20, show_default=True, type=click.IntRange(1), help="Counted, after as many more.")
@click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON, as the last line.")
def benchmark_command(
    part: "Part",
    path: Path,
    network: str | None,
    crop: int | None,
    batch_size: int | None,
    loader_processes: int | None,
    sets: tuple[str, ...],
    storage: Path | None,
    steps: int,
    as_json: bool,
) -> None:
    """Measure what limits training on this machine: the loader alone, the step alone, or the training of both.

    PATH is a catalogue; or a plan, whose distinct work is then measured as its jobs would do it, and with `train`
    the predictions too. `aliprod plan PLAN --gpus N` makes its forecast of what was measured last.

    \b
    Example: aliprod benchmark train photos --network resnet50 --loader-processes 8
             aliprod benchmark train jobs/quickstart.toml
    """
    given = {"network": network, "crop": crop, "batch_size": batch_size, "loader_processes": loader_processes}
    said = {name: value for name, value in given.items() if value is not None}
    if path.suffix == ".toml":
        _refuse(said, path, "is a plan, which says that itself", "Override it with --set.")
        _benchmark_plan(part, Asked(path, sets, storage, None, None, as_json), steps)
    else:
        _refuse({"set": sets} if sets else {}, path, "is no plan (.toml)", "Give one, or leave it out.")
        _benchmark_catalogue(part, path, _OF_A_CATALOGUE | said, steps, as_json)


def _benchmark_plan(part: "Part", asked: Asked, steps: int) -> None:
    from aliprod.forecast.measure import measure_plan

    request, measured = asked.request(), []
    for found in measure_plan(request, part, steps):
        measured.append(found)
        click.echo(f"{found['part']} of {', '.join(found['jobs'])}: {_sentence(found)}", err=asked.as_json)
    answer(asked.as_json, {"plan": request.plan.name, "measured": measured})


def _benchmark_catalogue(part: "Part", path: Path, work: Mapping[str, Any], steps: int, as_json: bool) -> None:
    from aliprod.catalogue import sources
    from aliprod.models.classifier import check_network
    from aliprod.recipe import Machine, Stage
    from aliprod.training.speed import measure

    check_network(work["network"], "--network")
    augmentation = ("random_resized_crop", "flip", "auto_augment", "cutout")
    crop, batch_size = work["crop"], work["batch_size"]
    stage = Stage(resize=max(crop, 256), crop=crop, batch_size=batch_size, augmentation=augmentation)
    machine = Machine(loader_processes=work["loader_processes"])
    found = asdict(measure(part, stage, work["network"], sources.read(path), steps, machine))
    if not as_json:
        click.echo(f"{part}: {_sentence(found)}")
    answer(as_json, found)


def _refuse(given: Mapping[str, Any], path: Path, what: str, advice: str) -> None:
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise Refused(f"{what}: {flags} does not go with it.", path, advice)


def _sentence(found: Mapping[str, Any]) -> str:
    """What was measured; of a prediction, its speed and memory alone."""
    memory = f"{found['memory_bytes'] / 1e6:,.0f} MB"
    speed = f"{found['images_per_second']:,.1f} images/s on {found['device']}"
    if "limited_by" not in found:
        return f"{speed}, {memory}."
    waits = f"waiting for pictures {found['data_wait_share']:.0%} of the time"
    return f"{speed}, {waits}, {memory}. The {found['limited_by']} limits."

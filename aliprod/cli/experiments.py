"""The commands that try things out: how fast this machine is, which learning rates are best."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from aliprod.cli.completion import jobs, plans
from aliprod.cli.flags import Asked, answer, count, json_flag, path, say, sets_flag, storage_flag, takes, takes_plan
from aliprod.errors import Refused

if TYPE_CHECKING:
    from aliprod.cluster.tune import Found, Trial
    from aliprod.recipe import Part


@dataclass(frozen=True)
class Work:
    """What is measured on a catalogue."""

    network: str
    crop: int
    batch_size: int
    loader_processes: int


@click.command("benchmark")
@click.argument("part", type=click.Choice(["loader", "step", "train"]))
@click.argument("file", metavar="PATH", type=path, shell_complete=plans)
@takes(
    Work,
    click.option("--network", default="resnet50", show_default=True, help="timm's name."),
    click.option("--crop", default=224, show_default=True, type=click.IntRange(8, 4096), help="Pixels."),
    click.option("--batch-size", default=64, show_default=True, type=click.IntRange(1, 65_536), help="Images a step."),
    click.option("--loader-processes", default=0, show_default=True, type=click.IntRange(0, 1024), help="That read."),
)
@sets_flag
@storage_flag
@click.option("--steps", default=20, show_default=True, type=count, help="Counted, after as many more.")
@json_flag
def benchmark_command(
    work: Work, part: "Part", file: Path, sets: tuple[str, ...], storage: Path | None, steps: int
) -> None:
    """Measure what limits training on this machine.

    The loader alone, the step alone, or the training of both.

    PATH is a catalogue; or a plan, whose distinct work is then measured as its jobs would do it, and with `train`
    the predictions too. `aliprod plan PLAN --gpus N` makes its forecast of what was measured last.

    \b
    Example: aliprod benchmark train photos --loader-processes 8
             aliprod benchmark train jobs/quickstart.toml
    """
    if file.suffix == ".toml":
        _refuse_flags(
            [one.name for one in fields(Work)], file, "is a plan, which says that itself", "Say --set instead."
        )
        _benchmark_plan(part, Asked(file, sets, storage), steps)
    else:
        _refuse_flags(["sets"], file, "is no plan (.toml)", "Give one, or leave it out.")
        _benchmark_catalogue(part, file, work, steps)


@click.command("tune")
@takes_plan
@click.argument("job", shell_complete=jobs)
def tune_command(asked: Asked, job: str) -> None:
    """Search for the learning rates of a job, BACKBONE/STAGE.

    In short trainings on few images a class.

    What it tries stands in the plan's table [tune]. Nothing of the plan changes: the answer is what to give to --set.

    \b
    Example: aliprod tune jobs/aliproducts.toml resnet50/dcl --set tune.trials=16
    """
    request = asked.request()
    from aliprod.cluster.tune import search
    from aliprod.report.status import table

    found = search(request, job, _say_trial)
    best = found.trials[0]
    override = f'overrides."{job}".lr={{ backbone = {best.backbone:.3g}, heads = {best.heads:.3g} }}'
    rows = [[f"{trial.backbone:.3g}", f"{trial.heads:.3g}", _error(trial)] for trial in found.trials]
    trials = [asdict(trial) for trial in found.trials]
    answer(
        {"job": job, "trials": trials, "own": asdict(found.own), "best": trials[0], "set": override},
        f"{table(rows, ['backbone', 'heads', 'top-1 error on val'])}\n{_verdict(found, override)}",
    )


def _benchmark_plan(part: "Part", asked: Asked, steps: int) -> None:
    request, measured = asked.request(), []
    from aliprod.forecast.measure import measure_plan

    for found in measure_plan(request, part, steps):
        measured.append(found)
        say(f"{found['part']} of {', '.join(found['jobs'])}: {_sentence(found)}")
    answer({"plan": request.plan.name, "measured": measured}, "")


def _benchmark_catalogue(part: "Part", file: Path, work: Work, steps: int) -> None:
    from aliprod.catalogue import sources

    read = sources.read(file)  # first: what is no catalogue is refused at once
    from aliprod.models.classifier import check_network
    from aliprod.recipe import Machine, Stage
    from aliprod.training.speed import measure

    check_network(work.network, "--network")
    augmentation = ("random_resized_crop", "flip", "auto_augment", "cutout")
    resize = max(work.crop, 256)
    stage = Stage(resize=resize, crop=work.crop, batch_size=work.batch_size, augmentation=augmentation)
    machine = Machine(loader_processes=work.loader_processes)
    found = asdict(measure(part, stage, work.network, read, steps, machine))
    answer(found, f"{part}: {_sentence(found)}")


def _refuse_flags(names: Sequence[str], file: Path, what: str, advice: str) -> None:
    """Refuse flags that were given and do not go with what is measured."""
    context = click.get_current_context()
    given = [one for one in context.command.params if one.name in names]
    given = [one for one in given if context.get_parameter_source(str(one.name)) is ParameterSource.COMMANDLINE]
    if given:
        raise Refused(f"{what}: {', '.join(one.opts[0] for one in given)} does not go with it.", file, advice)


def _sentence(found: Mapping[str, Any]) -> str:
    """What was measured; of a prediction, its speed and memory alone."""
    memory = f"{found['memory_bytes'] / 1e6:,.0f} MB"
    speed = f"{found['images_per_second']:,.1f} images/s on {found['device']}"
    if "limited_by" not in found:
        return f"{speed}, {memory}."
    waits = f"waiting for pictures {found['data_wait_share']:.0%} of the time"
    return f"{speed}, {waits}, {memory}. The {found['limited_by']} limits."


def _say_trial(trial: "Trial") -> None:
    say(f"lr.backbone {trial.backbone:.3g}, lr.heads {trial.heads:.3g}: {_error(trial)}")


def _error(trial: "Trial") -> str:
    return "diverged" if trial.top1_error is None else f"{trial.top1_error:.2%}"


def _verdict(found: "Found", override: str) -> str:
    """Whether the best is better than chance would have it."""
    best, own = found.trials[0].top1_error, found.own.top1_error
    if best is None:
        return "All of them diverged: lower the stage's lr, or raise tune.span."
    if best == own:
        return "None was better than the plan's own."
    noise = math.sqrt(best * (1 - best) / found.images)
    said = f"The plan's own {'diverged' if own is None else f'had {own:.2%}'}; one standard error on {found.images:,} "
    said += f"images is {noise:.2%}. "
    if own is not None and own - best <= noise:
        return f"{said}None beat the plan's own by more than that: keep what you have."
    return f"{said}To take the best: --set '{override}'"

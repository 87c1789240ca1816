"""The commands that try things out: how fast this machine is, which settings are best."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from aliprod.cli import flags
from aliprod.cli.flags import Asked, answer, say
from aliprod.errors import Refused, listing
from aliprod.plan.source import toml_of

if TYPE_CHECKING:
    from aliprod.cluster.trials import Trial
    from aliprod.cluster.tune import Found
    from aliprod.ensemble.compare import Gain
    from aliprod.recipe import Part


@click.command("benchmark")
@click.argument("part", type=click.Choice(["loader", "step", "train"]))
@click.argument("file", metavar="PATH", type=flags.path, shell_complete=flags.plans)
@click.option("--network", default="resnet50", show_default=True, help="timm's name.")
@click.option("--crop", default=224, show_default=True, type=click.IntRange(8, 4096), help="Pixels.")
@click.option("--batch-size", default=64, show_default=True, type=click.IntRange(1, 65_536), help="Images a step.")
@click.option("--loader-processes", default=0, show_default=True, type=click.IntRange(0, 1024), help="That read.")
@flags.sets_flag
@flags.storage_flag
@click.option("--steps", default=20, show_default=True, type=flags.count, help="Counted, after as many more.")
@flags.json_flag
def benchmark_command(
    part: "Part", file: Path, sets: tuple[str, ...], storage: Path | None, steps: int, **work: Any
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
        _refuse_flags([*work], file, "is a plan, which says that itself", "Say --set instead.")
        request, measured = Asked(file, sets, storage).request(), list[Mapping[str, Any]]()
        from aliprod.forecast.rates import measure_plan

        for found in measure_plan(request, part, steps):
            measured.append(found)
            say(f"{found['part']} of {', '.join(found['jobs'])}: {_sentence(found)}")
        answer({"plan": request.plan.name, "measured": measured}, "")
    else:
        _refuse_flags(["sets"], file, "is no plan (.toml)", "Give one, or leave it out.")
        _benchmark_catalogue(part, file, steps, work)


@click.command("tune")
@flags.takes_plan
@click.argument("job", shell_complete=flags.jobs)
def tune_command(asked: Asked, job: str) -> None:
    """Search for settings of a job, BACKBONE/STAGE.

    In short trainings on few images a class; the best are trained again with other seeds, and told with what they gain.

    What it tries stands in the plan's table [tune]: by default learning rates. Nothing of the plan changes: the answer
    is a line for it, or that nothing beat what you have.

    \b
    Example: aliprod tune jobs/aliproducts.toml resnet50/dcl --set tune.trials=16
    """
    request = asked.request()
    from aliprod.cluster.tune import search

    found = search(request, job, _say_trial)
    finalists = [{"settings": trial.settings, **asdict(gain)} for trial, gain in found.finalists]
    told = asdict(found) | {"finalists": finalists, "set": None, "toml": None}
    if found.override is not None:
        lines = [f"{name} = {toml_of(value)}" for name, value in found.override.items()]
        told["set"] = f'overrides."{job}"={toml_of(found.override)}'
        told["toml"] = "\n".join([f'[overrides."{job}"]', *lines])
    answer(told, "\n\n".join(part for part in (_tables(found), _verdict(found, told["set"], told["toml"])) if part))


def _benchmark_catalogue(part: "Part", file: Path, steps: int, work: Mapping[str, Any]) -> None:
    from aliprod.catalogue import sources

    read = sources.read(file)  # first: what is no catalogue is refused at once
    from aliprod.models.classifier import check_network
    from aliprod.recipe import Machine, Stage
    from aliprod.training.speed import measure

    check_network(work["network"], "--network")
    augmentation = ("random_resized_crop", "flip", "auto_augment", "cutout")
    sizes = {"resize": max(work["crop"], 256), "crop": work["crop"], "batch_size": work["batch_size"]}
    stage, machine = Stage(augmentation=augmentation, **sizes), Machine(loader_processes=work["loader_processes"])
    found = measure(part, stage, work["network"], read, steps, machine)
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
    settings = ", ".join(f"{name} {cell}" for name, cell in zip(trial.settings, _cells(trial), strict=True))
    say(f"{settings}, seed {trial.seed}: {_error(trial)}")


def _cells(trial: "Trial") -> list[str]:
    return ["-" if value is None else toml_of(value) for value in trial.settings.values()]


def _error(trial: "Trial") -> str:
    epochs = f"{len(trial.errors)} epoch{'' if len(trial.errors) == 1 else 's'}"
    return f"diverged after {epochs}" if trial.diverged else f"{trial.top1_error:.2%} after {epochs}"


def _tables(found: "Found") -> str:
    from aliprod.report.status import table

    names = list(found.own.settings)
    trials = table([[*_cells(trial), _error(trial)] for trial in found.trials], [*names, "top-1 error on val"])
    rows = [[*_cells(trial), f"{fmean(gain.errors):.2%}", _points(gain)] for trial, gain in found.finalists]
    return trials + ("\n\n" + table(rows, [*names, "with other seeds", "gain"]) if rows else "")


def _points(gain: "Gain") -> str:
    low, high = gain.interval
    return f"{100 * gain.gain:.1f} points (95 %: {100 * low:.1f} to {100 * high:.1f})"


def _verdict(found: "Found", override: str | None, toml: str | None) -> str:
    """What to do, and what was left out."""
    gained = [gain for _, gain in found.finalists]
    best = max(gained, key=lambda gain: (override is None or gain.interval[0] > 0, gain.gain), default=None)
    others, own = len(found.trials) - 1, "diverged" if found.own.diverged else f"had {found.own.top1_error:.2%}"
    if best is None:
        said = f"Nothing beat what you have: the plan's own settings {own}, and none of {others} others had less."
    elif override is None:
        said = f"Nothing beat what you have: the best of {others} others gained {_points(best)} with other seeds."
    else:
        error = fmean(best.errors)
        seeds, take = len(best.errors), f"--set {shlex.quote(override)}\nor in the plan:\n\n{toml}\n"
        said = f"Gain {_points(best)}, with {seeds} other seeds: a top-1 error of {error:.2%} on val, not of "
        said += f"{error + best.gain:.2%}. To take it: {take}"
    if found.left:
        said += f"\n{found.left} trials were not begun: tune.hours is spent."
    if failed := found.failed:
        said += f"\n{len(failed)} came to no end, and are tried by the same command again: {listing(failed, 1)}"
    return said

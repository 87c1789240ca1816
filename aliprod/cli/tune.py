"""The command that searches for learning rates."""

import math
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from aliprod.cli.answers import answer
from aliprod.cli.plans import Asked, takes_plan

if TYPE_CHECKING:
    from aliprod.orchestration.tune import Found, Trial


@click.command("tune")
@takes_plan
@click.argument("job")
def tune_command(asked: Asked, job: str) -> None:
    """Search for the learning rates of a job, BACKBONE/STAGE, in short trainings on few images a class.

    What it tries stands in the plan's table [tune]. Nothing of the plan changes: the answer is what to give to --set.

    \b
    Example: aliprod tune jobs/aliproducts.toml resnet50/dcl --set tune.trials=16
    """
    from aliprod.orchestration.tune import search
    from aliprod.report.status import table

    found = search(asked.request(), job, lambda trial: click.echo(_line(trial), err=asked.as_json))
    best = found.trials[0]
    override = f'overrides."{job}".lr={{ backbone = {best.backbone:.3g}, heads = {best.heads:.3g} }}'
    if not asked.as_json:
        rows = [[f"{trial.backbone:.3g}", f"{trial.heads:.3g}", _error(trial)] for trial in found.trials]
        click.echo(table(rows, ["backbone", "heads", "top-1 error on val"]))
        click.echo(_verdict(found, override))
    trials = [asdict(trial) for trial in found.trials]
    answer(asked.as_json, {"job": job, "trials": trials, "own": asdict(found.own), "best": trials[0], "set": override})


def _line(trial: "Trial") -> str:
    return f"lr.backbone {trial.backbone:.3g}, lr.heads {trial.heads:.3g}: {_error(trial)}"


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
    own_error = "diverged" if own is None else f"had {own:.2%}"
    return (
        f"The plan's own {own_error}; one standard error on {found.images:,} images is {noise:.2%}. "
        f"To take the best: --set '{override}'"
    )

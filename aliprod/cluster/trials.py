"""What a search tries: short stages of a job, what is known of their trainings, when the hours are spent. No Ray."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from aliprod.catalogue.catalogue import Integers
from aliprod.ensemble.compare import Gain, gains
from aliprod.errors import Refused
from aliprod.plan.checks import stage_with
from aliprod.plan.schema import Plan, Tune
from aliprod.recipe import PerClass, Stage
from aliprod.recipe.search import draws, searched
from aliprod.store import commit
from aliprod.store.layout import key_of


@dataclass(frozen=True)
class Trial:
    """A training that was tried.

    Attributes:
        stage: sha256 of its stage.
        settings: its values of what is searched, by dotted name.
        errors: the lowest top-1 error on val so far, 0 to 1, behind each epoch.
        seconds: on its GPU (rank), those of attempts that were broken off included.
        ended: at its last epoch, stopped by the others' errors, or since its loss diverged; False: it begins anew.
        wrong: rows of val that its best weights take for another class; of those with other seeds alone.
    """

    stage: str
    settings: dict[str, Any]
    seed: int
    errors: tuple[float, ...] = ()
    seconds: float = 0.0
    ended: bool = False
    diverged: bool = False
    wrong: tuple[int, ...] = ()

    @property
    def top1_error(self) -> float:
        """The lowest; where the loss diverged all is wrong."""
        return self.errors[-1] if self.errors and not self.diverged else 1.0


def search_of(plan: Plan, job: str) -> dict[str, Any]:
    """What is searched for a job: what the plan says, or the two learning rates around its own."""
    lr, span = plan.stage(job).lr, plan.tune.span
    rates = {"backbone": lr.backbone, "heads": lr.heads}
    around = {name: {"low": rate / span, "high": rate * span, "log": True} for name, rate in rates.items()}
    return plan.tune.search or {"lr": around}


def drawn_stages(plan: Plan, job: str) -> dict[Stage, dict[str, Any]]:
    """The stages that are tried for a job, its own first, each with its settings as tables.

    Raises:
        Refused: the job can have none of the settings, or not one of the choices.
    """
    stage = plan.stage(job)
    try:
        return draws(search_of(plan, job), stage.seed, plan.tune.trials, partial(stage_with, plan, job))
    except ValueError as error:
        raise Refused(
            f"{error}.", f"plan {plan.name}, [tune.search] for {job}", "Leave it out of the search."
        ) from None


def short(stage: Stage, recipe: Tune) -> Stage:
    """A stage of few epochs and few images, with its schedule drawn together in proportion."""
    epochs = min(stage.epochs, recipe.epochs)
    shrink = epochs / stage.epochs
    milestones = {max(1, round(shrink * milestone)) for milestone in stage.lr.milestones}
    lr = {
        "warmup_epochs": shrink * stage.lr.warmup_epochs,
        "warmup_steps": None if stage.lr.warmup_steps is None else max(1, round(shrink * stage.lr.warmup_steps)),
        "milestones": tuple(sorted(milestone for milestone in milestones if milestone < epochs)),
    }
    most = min(recipe.per_class, stage.images.per_class) if isinstance(stage.images, PerClass) else recipe.per_class
    return stage.model_copy(
        update={"epochs": epochs, "images": PerClass(per_class=most), "lr": stage.lr.model_copy(update=lr)}
    )


def finalists(trials: Sequence[Trial], epochs: int, most: int) -> list[int]:
    """Places of the trials that went through all epochs to a lower error than the first, the best first."""
    whole = [place for place, trial in enumerate(trials) if trial.ended and len(trial.errors) == epochs]
    better = [place for place in whole if trials[place].top1_error < trials[0].top1_error]
    return sorted(better, key=lambda place: trials[place].top1_error)[:most]


@dataclass
class Log:
    """The trials of a job, in a file that is written anew at each epoch.

    Attributes:
        images: of val.
        report: is told each trial that has ended.
    """

    file: Path
    images: int
    report: Callable[[Trial], None]

    def __post_init__(self) -> None:
        commit.refresh(self.file.parent)
        try:
            read = TypeAdapter(list[Trial]).validate_json(self.file.read_bytes())
        except (OSError, ValueError):  # there is none, or it is no such file
            read = []
        self.trials = {one.stage: one for one in read if all(0 <= row < self.images for row in one.wrong)}

    def of(self, wanted: Trial) -> Trial:
        """What is known of a trial; its settings are those of this search, whichever one has trained it."""
        return replace(self.trials.get(wanted.stage, wanted), settings=wanted.settings)

    def keep(self, trial: Trial) -> None:
        """Write a trial as it is now."""
        self.trials[trial.stage] = trial
        lines = ",\n".join(json.dumps(asdict(one)) for one in self.trials.values())
        commit.write_file(self.file, f"[\n{lines}\n]\n")
        if trial.ended:
            self.report(trial)


def trial_of(stage: Stage, search: dict[str, Any]) -> Trial:
    """A trial of a stage that has not begun; an option that its objective has not is None."""
    said = stage.model_dump(mode="json")

    def value(table: Any, name: str) -> Any:
        return table.get(name) if isinstance(table, dict) else None

    return Trial(key_of(said), {".".join(way): reduce(value, way, said) for way, _ in searched(search)}, stage.seed)


def is_spent(trials: Sequence[Trial], recipe: Tune) -> bool:
    """Whether no further trial may begin: what is left of the hours is for the finalists, at the pace of the first of
    the trials, the plan's own, which may always."""
    kept = trials[0].seconds * (1 + recipe.finalists) * recipe.seeds
    spent = sum(trial.seconds for trial in trials) + kept
    return recipe.hours is not None and trials[0].ended and spent >= 3600 * recipe.hours


def judged(trials: Sequence[Trial], labels: Integers, seeds: int, seed: int) -> list[Gain]:
    """What settings gain on the first: of each the trials of all seeds stand side by side. Where the loss diverged,
    all is wrong.

    Args:
        labels: of val; those below 0 (unknown) are left out.
    """
    wrong = np.zeros((len(trials), len(labels)))
    for row, trial in zip(wrong, trials, strict=True):
        row[list(trial.wrong)] = 1
        row[:] = np.maximum(row, trial.diverged)
    known = labels >= 0
    return gains(wrong[:, known].reshape(-1, seeds, known.sum()), labels[known], seed)

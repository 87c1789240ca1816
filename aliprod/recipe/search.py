"""Settings of a stage that are searched: a range or choices of each, and draws of them."""

import json
import math
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from pydantic import Field, model_validator

from aliprod.recipe import TAKEN, Frozen, Stage

MOST_CHOICES = 100
TRIES = 100  # draws in a row that may be refused, or known
UNSEARCHED = {  # settings of a stage that a search leaves as they are, and why
    "epochs": "those of a trial are tune.epochs",
    "images": "those of a trial are tune.per_class",
    "seed": "finalists are trained with tune.seeds of them",
} | dict.fromkeys((*TAKEN, "teachers", "soup", "gradients"), "it is no matter of how a stage is trained on one rank")
Way = tuple[str, ...]  # names of tables and, last, of a setting: ("lr", "backbone")


class Range(Frozen):
    """Numbers that a setting is drawn from: whole ones where both ends are, with three digits otherwise."""

    low: int | float
    high: int | float
    log: bool = Field(False, description="evenly in the logarithm")

    @model_validator(mode="after")
    def _upwards(self) -> "Range":
        if not self.low < self.high:
            raise ValueError("low must be below high")
        if self.log and self.low <= 0:
            raise ValueError("the logarithm needs a low above 0")
        return self

    def draw(self, source: random.Random) -> float:
        """A number from low to high."""
        whole = isinstance(self.low, int) and isinstance(self.high, int)
        if whole and not self.log:
            return source.randint(int(self.low), int(self.high))
        ends = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        drawn = math.exp(source.uniform(*ends)) if self.log else source.uniform(*ends)
        return min(self.high, max(self.low, round(drawn) if whole else float(f"{drawn:.3g}")))


def searched(search: dict[str, Any], way: Way = ()) -> Iterator[tuple[Way, Any]]:
    """Each setting of a table, which has the form of a stage's: its way, and what stands there, unchecked. A table with
    ``low`` or ``high`` is a range, any other has settings of its own."""
    for name, said in search.items():
        if isinstance(said, dict) and not {"low", "high"} & said.keys():
            yield from searched(said, (*way, name))
        else:
            yield (*way, name), said


def nested(settings: dict[Way, Any]) -> dict[str, Any]:
    """Settings by their way as tables."""
    found: dict[str, Any] = {}
    for way, value in settings.items():
        table = found
        for name in way[:-1]:
            table = table.setdefault(name, {})
        table[way[-1]] = value
    return found


def draws(
    search: dict[str, Any], seed: int, count: int, stage_of: Callable[[dict[str, Any]], Stage]
) -> dict[Stage, dict[str, Any]]:
    """Stages to be tried, each with its settings as tables: first that of none, the plan's own; then what is drawn:
    ``count``, or fewer where there are no more. The same each time; more of them begin with the same.

    Args:
        search: checked: what `searched` yields are ranges and lists of choices.
        stage_of: the stage with other settings. It raises ValueError where there is none: then others are drawn.
    Raises:
        ValueError: no stage is possible, or none with one of the choices; says which, and why.
    """
    ways = {way: Range.model_validate(said) if isinstance(said, dict) else said for way, said in searched(search)}
    choices = [{way: choice} for way, said in ways.items() if isinstance(said, list) for choice in said]
    for fixed in [{}, *choices]:
        _check_possible(ways, fixed, random.Random(seed), stage_of)
    found, source, misses = {stage_of({}): dict[str, Any]()}, random.Random(seed), 0
    while len(found) < count and misses < TRIES:
        settings, known = _drawn(ways, source), len(found)
        with suppress(ValueError):
            found.setdefault(stage_of(settings), settings)
        misses = misses + 1 if len(found) == known else 0
    return found


def _drawn(ways: dict[Way, Any], source: random.Random) -> dict[str, Any]:
    drawn = {w: said.draw(source) if isinstance(said, Range) else source.choice(said) for w, said in ways.items()}
    return nested(drawn)


def _check_possible(
    ways: dict[Way, Any], fixed: dict[Way, Any], source: random.Random, stage_of: Callable[[dict[str, Any]], Stage]
) -> None:
    """Raise ValueError where no draw with a choice makes a stage."""
    why = ""
    for _ in range(TRIES):
        try:
            stage_of(_drawn(ways | {way: [choice] for way, choice in fixed.items()}, source))
            return
        except ValueError as error:
            why = why or str(error)
    said = "".join(f" with {'.'.join(way)} = {json.dumps(choice)}" for way, choice in fixed.items())
    raise ValueError(f"no stage{said} is possible: {why}")

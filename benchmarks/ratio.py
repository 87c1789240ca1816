"""Two sides in turn, and what their ratio is worth: medians, spread, interval, machine, versions."""

import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")


@dataclass(frozen=True)
class Side:
    """What one side took, a number a round."""

    name: str
    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)


def cpu() -> float:
    """Seconds of CPU of this process so far, all threads, with the children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def alternate(
    sides: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = cpu, warm_up: int = 1
) -> list[Side]:
    """Run the sides in turn, ``rounds`` times each, after ``warm_up`` rounds that are not counted.

    Args:
        clock: seconds so far; `cpu` hides no thread and no neighbour's load.
    """
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(warm_up + rounds):
        for name, side in sides.items():
            began = clock()
            side()
            if number >= warm_up:
                taken[name].append(clock() - began)
    return [Side(name, tuple(seconds)) for name, seconds in taken.items()]


def interleave(
    sides: Mapping[str, Callable[[Item, int], object]],
    items: Sequence[Item],
    rounds: int,
    clock: Callable[[], float] = cpu,
    warm_up: int = 1,
) -> list[Side]:
    """Run the sides in turn over all items, the first of a round last in the next; a side is told item and round.

    Over all items, and not item by item: a process that loads pictures does nothing else in between, and the side
    with more code would pay for caches that the other one emptied.

    Returns:
        The seconds of a round over its items.
    """
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(warm_up + rounds):
        for name in list(sides) if number % 2 else reversed(list(sides)):
            began = clock()
            for item in items:
                sides[name](item, number)
            taken[name].append((clock() - began) / len(items))
    return [Side(name, tuple(seconds[warm_up:])) for name, seconds in taken.items()]


def ratios(ours: Side, theirs: Side) -> list[float]:
    """How many times as long theirs took, round by round."""
    return [b / a for a, b in zip(ours.rounds, theirs.rounds, strict=True)]


def interval(ours: Side, theirs: Side) -> tuple[float, float, float]:
    """Theirs / ours over all rounds, and what 95 % of 2,000 draws of as many rounds of them lie between (bootstrap)."""
    a, b = np.array(ours.rounds), np.array(theirs.rounds)
    drawn = np.random.default_rng(0).integers(0, len(a), (2000, len(a)))
    low, high = np.percentile(b[drawn].sum(1) / a[drawn].sum(1), [2.5, 97.5])
    return float(b.sum() / a.sum()), float(low), float(high)


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Two of the values between which the median of what they are drawn from lies with 95 % (order statistics: the
    sign test turned around; no law is assumed, but that the draws are independent)."""
    ranked = sorted(values)
    off = int((len(ranked) - 1.96 * len(ranked) ** 0.5) / 2)  # the binomial's 2.5 % point, by its normal limit
    return ranked[max(0, off)], ranked[len(ranked) - 1 - max(0, off)]


def show(what: str, ours: Side, theirs: Side, unit: str = "s", scale: float = 1.0) -> None:
    """Print both sides, each the median with its spread, and their ratio (theirs / ours) with its 95 % interval."""
    for side in (ours, theirs):
        low, high = min(side.rounds) * scale, max(side.rounds) * scale
        print(f"  {side.name}: {side.median * scale:.4g} {unit} ({low:.4g} to {high:.4g})")
    found, (ratio, low, high) = ratios(ours, theirs), interval(ours, theirs)
    print(
        f"{what}: ratio {ratio:.3f}, 95 % within {low:.3f} to {high:.3f}; "
        f"{len(found)} rounds of {min(found):.3f} to {max(found):.3f}"
    )


def header(packages: Sequence[str] = ("torch", "torchvision", "pillow", "numpy")) -> str:
    """Date, machine and versions: what every figure stands under."""
    date = datetime.now(tz=UTC).date()
    processor = platform.processor() or platform.machine()
    machine = f"{processor}, {os.cpu_count()} cores, Python {platform.python_version()}"
    return ", ".join([str(date), machine, *(f"{name} {version(name)}" for name in packages)])

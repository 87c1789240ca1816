"""Two sides in turn, and what their ratio is worth: medians, spread, machine, versions."""

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
    """Run the sides in turn on every item; a round is all items, and a side is told the item and the round.

    Returns:
        The seconds of a round over its items.
    """
    taken = {name: [0.0] * (warm_up + rounds) for name in sides}
    for number in range(warm_up + rounds):
        for item in items:
            for name, side in sides.items():
                began = clock()
                side(item, number)
                taken[name][number] += (clock() - began) / len(items)
    return [Side(name, tuple(seconds[warm_up:])) for name, seconds in taken.items()]


def ratios(ours: Side, theirs: Side) -> list[float]:
    """How many times as long theirs took, round by round."""
    return [b / a for a, b in zip(ours.rounds, theirs.rounds, strict=True)]


def show(what: str, ours: Side, theirs: Side, unit: str = "s", scale: float = 1.0) -> None:
    """Print both sides and their ratio (theirs / ours), each the median with its spread."""
    for side in (ours, theirs):
        low, high = min(side.rounds) * scale, max(side.rounds) * scale
        print(f"  {side.name}: {side.median * scale:.4g} {unit} ({low:.4g} to {high:.4g})")
    found = ratios(ours, theirs)
    print(f"{what}: ratio {statistics.median(found):.3f} ({min(found):.3f} to {max(found):.3f})")


def header(packages: Sequence[str] = ("torch", "torchvision", "pillow", "numpy")) -> str:
    """Date, machine and versions: what every figure stands under."""
    date = datetime.now(tz=UTC).date()
    processor = platform.processor() or platform.machine()
    machine = f"{processor}, {os.cpu_count()} cores, Python {platform.python_version()}"
    return ", ".join([str(date), machine, *(f"{name} {version(name)}" for name in packages)])

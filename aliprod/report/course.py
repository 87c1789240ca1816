"""When each target of a plan was made, beside what was forecast."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from aliprod.build.events import Standing, Task
from aliprod.forecast.simulate import Span


class Course(NamedTuple):
    """The spans of each target, in seconds of work: time in which nothing of the plan was made is left out.

    Attributes:
        fact: in the order in which they began. forecast: of the whole plan, as it was kept; {} where there was none.
        now: where what runs stands; None while nothing runs.
    """

    fact: Mapping[str, Sequence[Span]]
    forecast: Mapping[str, Sequence[Span]]
    now: float | None


def end(spans: Mapping[str, Sequence[Span]]) -> float:
    """Of the last span."""
    return max((span.end for one in spans.values() for span in one), default=0.0)


def course(standing: Standing, forecast: Mapping[str, Sequence[Span]], now: float) -> Course:
    """Lay out what a run, and the runs before it, have made; ``now`` in seconds since the epoch."""
    tasks = sorted((*standing.past, *standing.tasks), key=lambda task: task.since)
    busy = _busy(tasks, now)

    def worked(time: float) -> float:
        return sum(min(max(time - begin, 0.0), end - begin) for begin, end in busy)

    fact = defaultdict(list)
    for task in tasks:
        fact[task.name].append(Span(worked(task.since), worked(task.until or now), task.world_size))
    return Course(dict(fact), forecast, worked(now) if standing.running else None)


def rank_hours(tasks: Iterable[Task], now: float) -> dict[str, float]:
    """Hours of all ranks by target, of those on GPUs where there are such; every attempt counts."""
    tasks = list(tasks)
    on_gpus, hours = any(task.gpus for task in tasks), defaultdict[str, float](float)
    for task in tasks:
        ranks = task.world_size * (task.gpus if on_gpus else 1)
        hours[task.name] += ranks * ((task.until or now) - task.since) / 3600
    return dict(hours)


def _busy(tasks: Iterable[Task], now: float) -> list[tuple[float, float]]:
    """Stretches of time in which something was made."""
    found: list[tuple[float, float]] = []
    for task in tasks:
        begin, end = task.since, task.until or now
        if found and begin <= found[-1][1]:
            begin, last = found.pop()
            end = max(end, last)
        found.append((begin, end))
    return found

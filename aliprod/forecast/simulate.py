"""What the unfinished rest of a plan will take: the policy of a run, simulated with measured rates.

Not counted, since nothing measures it beforehand: the start of a job's processes, adding up the ensemble, and what
CPUs do beside the GPUs. Filters of duplicates and pseudo labels count as if they left and added all that they may.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from aliprod.errors import Refused
from aliprod.forecast.bill import Bill, Cost, scaled
from aliprod.orchestration.prepare import Prepared
from aliprod.orchestration.scheduler import Share, Task, execute
from aliprod.plan.graph import Job


@dataclass(frozen=True)
class JobForecast:
    """A job's training, with the validation of its epochs.

    Attributes:
        seconds: that it takes; 0 where it is finished, None where no rate is known.
        begin, end: seconds from now; None where it is finished, or anything of the plan is not known.
        images_per_second: of all its ranks together; ``source``: where that was seen.
    """

    name: str
    seconds: float | None
    begin: float | None
    end: float | None
    images_per_second: float | None
    source: str | None


@dataclass(frozen=True)
class Width:
    """What the plan takes with so many ranks a job."""

    workers: int
    seconds: float


@dataclass(frozen=True)
class Forecast:
    """What the unfinished rest takes on so many GPUs; where jobs run on CPUs, on so many ranks at a time.

    Attributes:
        seconds, gpu_hours: predictions included; None where a rate is missing.
        lower_bound_seconds: no order is faster on these GPUs.
        prediction_seconds: GPU-seconds of all predictions.
        workers: other values of ``cluster.workers``.
        devices: on which the rates were seen.
        missing: tasks whose rate nobody has measured.
    """

    gpus: int
    jobs: list[JobForecast]
    seconds: float | None = None
    gpu_hours: float | None = None
    lower_bound_seconds: float | None = None
    prediction_seconds: float | None = None
    workers: list[Width] = field(default_factory=list)
    devices: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def forecast(prepared: Prepared, gpus: int) -> Forecast:
    """Simulate what `aliprod run` would do.

    Raises:
        Refused: a job takes more than ``gpus``; an objective does not fit the catalogue.
    """
    width, most = prepared.plan.cluster.workers, prepared.plan.cluster.max_parallel_jobs
    if width > gpus:
        what = f"{gpus} is less than the {width} that a job takes ([cluster] workers)."
        raise Refused(what, "--gpus", "Give more, or --set cluster.workers=1.")
    bill = Bill(prepared)
    phases = bill.phases(width)
    costs = [cost for phase in phases for cost in phase]
    if missing := [cost.step.name for cost in costs if math.isnan(cost.seconds)]:
        return Forecast(gpus, _rows(bill, costs, {}), missing=missing)
    spans = simulate(phases, gpus, most)
    return Forecast(
        gpus=gpus,
        jobs=_rows(bill, costs, spans),
        seconds=_end(spans),
        gpu_hours=sum(_gpu_seconds(cost) for cost in costs) / 3600,
        lower_bound_seconds=lower_bound(costs, gpus),
        prediction_seconds=sum(cost.seconds for cost in costs if cost.step.kind == "predict"),
        devices=bill.devices(),
        workers=[Width(k, _end(simulate(bill.phases(k), gpus, most))) for k in bill.widths(gpus)],
    )


def simulate(phases: Sequence[Sequence[Cost]], gpus: int, most: int | None = None) -> dict[str, tuple[float, float]]:
    """When each task would begin and end, in seconds from now; a phase begins when the one before has ended.

    Args:
        phases: tasks in the order of a run.
        most: tasks side by side.
    """
    spans: dict[str, tuple[float, float]] = {}
    for costs in phases:
        clock = _Clock(_end(spans))
        tasks = [Task(cost.step.name, cost.step.needs, cost.step.share, partial(clock.start, cost)) for cost in costs]
        for _ in execute(tasks, lambda: Share(sys.maxsize, gpus), clock.wait, most=most):
            pass
        spans |= clock.spans
    return spans


def lower_bound(costs: Sequence[Cost], gpus: int) -> float:
    """Seconds that no order goes below: all work spread evenly, or the longest chain of needs.

    Args:
        costs: each behind what it needs.
    """
    chains: dict[str, float] = {}
    for cost in costs:
        before = (chains[need] for need in cost.step.needs if need in chains)
        chains[cost.step.name] = cost.seconds + max(before, default=0.0)
    return max(sum(map(_gpu_seconds, costs)) / gpus, max(chains.values(), default=0.0))


def _rows(bill: Bill, costs: Sequence[Cost], spans: Mapping[str, tuple[float, float]]) -> list[JobForecast]:
    """Every job of the plan; a finished one costs nothing."""
    seconds = {cost.step.name: cost.seconds for cost in costs}
    return [_row(bill, job, seconds.get(name, 0.0), spans) for name, job in bill.prepared.jobs.items()]


def _row(bill: Bill, job: Job, seconds: float, spans: Mapping[str, tuple[float, float]]) -> JobForecast:
    begin, end = spans.get(job.name, (None, None))
    rate = bill.rate(job) if job.name in bill.prepared.todo else None
    return JobForecast(
        name=job.name,
        seconds=None if math.isnan(seconds) else seconds,
        begin=begin,
        end=end,
        images_per_second=None if rate is None else scaled(rate, bill.prepared.plan.cluster.workers),
        source=None if rate is None else f"{rate.source}, {rate.device}",
    )


class _Clock:
    """Stands for a cluster: tasks that are started end when their seconds are over, and waiting takes no time."""

    def __init__(self, now: float) -> None:
        self.now, self.running = now, dict[str, float]()
        self.spans: dict[str, tuple[float, float]] = {}

    def start(self, cost: Cost) -> str:
        end = self.now + cost.seconds
        self.running[cost.step.name], self.spans[cost.step.name] = end, (self.now, end)
        return cost.step.name

    def wait(self, handles: list[Any]) -> list[tuple[Any, str]]:
        """To the next end; all that end then."""
        self.now = min(self.running[handle] for handle in handles)
        over = [handle for handle in handles if self.running[handle] == self.now]
        return [(handle, "") for handle in over]


def _gpu_seconds(cost: Cost) -> float:
    return cost.seconds * cost.step.share.gpus


def _end(spans: dict[str, tuple[float, float]]) -> float:
    return max((end for _, end in spans.values()), default=0.0)

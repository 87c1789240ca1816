"""What the unfinished rest of a plan will take: its graph, scheduled on a simulated clock with measured rates.

Filters of duplicates and pseudo labels count as if they left and added all that they may. Adding up the ensemble, and
what CPUs do beside the GPUs, count nothing; nor does what a bank of features takes to be searched.
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from aliprod.build.allot import RESTART_SECONDS
from aliprod.build.graph import targets
from aliprod.build.paths import Paths
from aliprod.build.room import Node
from aliprod.build.schedule import execute
from aliprod.build.target import Resources, Target, lacking
from aliprod.errors import Refused
from aliprod.forecast.clock import Clock, Span
from aliprod.forecast.rates import Rate, predictors
from aliprod.forecast.seconds import Estimates, scaled
from aliprod.plan.jobs import Job
from aliprod.plan.open import Opened

STARTING_SECONDS = 8.9  # of a training: benchmarks/RESULTS.md, the median of job_start.py, one at a time
A_NODE = 8  # GPUs of a machine, where there are more in all


@dataclass(frozen=True)
class JobForecast:
    """A job's training, with the validation of its epochs.

    Attributes:
        seconds: that it is being made, its starts included; 0 where it is finished, None where no rate is known.
        begin, end: seconds from now; None where it is finished, or anything of the plan is not known.
        ranks: at first, and at last where that is another number.
        images_per_second: of all its ranks together, as many as at last; ``source``: where that was seen.
    """

    name: str
    seconds: float | None
    begin: float | None
    end: float | None
    ranks: tuple[int, ...]
    images_per_second: float | None
    source: str | None


@dataclass(frozen=True)
class Forecast:
    """What the unfinished rest takes on so many GPUs; where jobs run on CPUs, on so many ranks at a time.

    Attributes:
        seconds, gpu_hours: predictions included; None where a rate is missing.
        lower_bound_seconds: no order, and no number of ranks, is faster on these GPUs.
        prediction_seconds: GPU-seconds of all predictions.
        devices: on which the rates were seen.
        missing: targets whose rate nobody has measured.
    """

    gpus: int
    jobs: list[JobForecast]
    seconds: float | None = None
    gpu_hours: float | None = None
    lower_bound_seconds: float | None = None
    prediction_seconds: float | None = None
    devices: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def forecast(opened: Opened, gpus: int, todo: Mapping[str, Target] | None = None) -> Forecast:
    """Simulate what `aliprod run` would do; ``todo``: what it would make, where that is known already.

    Raises:
        Refused: a job takes more than ``gpus``; there is no catalogue.
    """
    todo = lacking(targets(opened, gpu=True), opened.places.storage) if todo is None else todo
    if (most := max((target.floor for target in todo.values()), default=0)) > gpus:
        what = f"{gpus} is less than the {most} that a job takes ([cluster] ranks)."
        raise Refused(what, "--gpus", 'Give more, or --set cluster.ranks="auto".')
    estimates = Estimates(opened, beside=gpus > 1)
    if missing := [name for name, target in todo.items() if math.isnan(estimates.known(target, target.floor))]:
        alone = {name: estimates.known(target, target.floor) for name, target in todo.items()}
        return Forecast(gpus, [_row(job, estimates, alone.get(job.name), ()) for job in _jobs(opened)], missing=missing)
    spans = simulate(todo, estimates.seconds, machines(gpus), opened.plan.cluster.max_parallel_jobs)
    taken = {name: _taken(spans[name]) * target.resources.gpus for name, target in todo.items()}
    return Forecast(
        gpus=gpus,
        jobs=[_row(job, estimates, None, spans.get(job.name, ())) for job in _jobs(opened)],
        seconds=max((one[-1].end for one in spans.values()), default=0.0),
        gpu_hours=sum(taken.values()) / 3600,
        lower_bound_seconds=lower_bound(todo, estimates.seconds, gpus),
        prediction_seconds=sum(taken[name] for name, target in todo.items() if target.kind == "prediction"),
        devices=_devices(opened, estimates, todo),
    )


def simulate(
    todo: Mapping[str, Target],
    seconds: Callable[[Target, int], float],
    nodes: Sequence[Node],
    most: int | None = None,
) -> dict[str, list[Span]]:
    """When each target would be made, by how many ranks.

    Args:
        todo: each behind what it needs. seconds: that one takes at a world size. most: targets side by side.
    """
    clock = Clock(nodes, seconds, STARTING_SECONDS, RESTART_SECONDS)
    for _ in execute(todo, clock, most):
        pass
    return clock.spans


def lower_bound(todo: Mapping[str, Target], seconds: Callable[[Target, int], float], gpus: int) -> float:
    """Seconds that no schedule goes below: all work spread evenly, or the longest chain of needs at its widest.

    Args:
        todo: each behind what it needs.
    """
    work = sum(seconds(target, target.floor) * target.floor * target.resources.gpus for target in todo.values())
    return max(Paths.of(todo, seconds).longest, work / gpus) if todo else 0.0


def machines(gpus: int) -> list[Node]:
    """Nodes of eight GPUs, the last of what is left; of CPUs they have enough."""
    sizes = [A_NODE] * (gpus // A_NODE) + [gpus % A_NODE] * (gpus % A_NODE > 0)
    return [Node(f"node {number}", Resources(sys.maxsize, size)) for number, size in enumerate(sizes)]


def _jobs(opened: Opened) -> list[Job]:
    return list(opened.jobs.values())


def _taken(spans: Sequence[Span]) -> float:
    """Seconds of all ranks."""
    return sum((span.end - span.begin) * span.ranks for span in spans)


def _rate(estimates: Estimates, job: Job) -> Rate | None:
    """The rate of a job; a soup only predicts."""
    return estimates.training(job) if job.stage.is_trained else estimates.predicting(job, "center")


def _devices(opened: Opened, estimates: Estimates, todo: Mapping[str, Target]) -> list[str]:
    """Those on which the rates were seen."""
    trained = [target.owner for target in todo.values() if target.kind == "training"]
    found = [rate for job in trained for rate in (_rate(estimates, job), estimates.predicting(job, "center"))]
    found += [estimates.predicting(opened.jobs[name], opened.plan.ensemble.views) for name in predictors(opened)]
    return sorted({rate.device for rate in found if rate is not None})


def _row(job: Job, estimates: Estimates, alone: float | None, spans: Sequence[Span]) -> JobForecast:
    """A job of the plan; a finished one costs nothing.

    Args:
        alone: its seconds where there is no schedule; None where there is one, or it is finished.
    """
    rate = _rate(estimates, job) if spans or alone is not None else None
    seconds = sum(span.end - span.begin for span in spans) if alone is None else alone
    widths = tuple(dict.fromkeys((spans[0].ranks, spans[-1].ranks))) if spans else ()
    return JobForecast(
        name=job.name,
        seconds=None if math.isnan(seconds) else seconds,
        begin=spans[0].begin if spans else None,
        end=spans[-1].end if spans else None,
        ranks=widths,
        images_per_second=None if rate is None else scaled(rate, widths[-1] if widths else 1),
        source=None if rate is None else f"{rate.source}, {rate.device}",
    )

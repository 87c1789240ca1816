"""What the unfinished rest of a plan will take: its graph, scheduled on a simulated clock with measured rates.

Filters of duplicates and pseudo labels count as if they left and added all that they may. Adding up the ensemble, and
what CPUs do beside the GPUs, count nothing.
"""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aliprod.build.graph import targets
from aliprod.build.schedule import execute
from aliprod.build.target import Resources, Target, lacking
from aliprod.build.trainings import epoch_of
from aliprod.errors import Refused
from aliprod.forecast.rates import Rate, Rates, predictors
from aliprod.plan.jobs import Job
from aliprod.plan.open import Opened

UNKNOWN = math.nan  # seconds of what nobody has measured; whatever depends on it is unknown too


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
class WorldSize:
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
        missing: targets whose rate nobody has measured.
    """

    gpus: int
    jobs: list[JobForecast]
    seconds: float | None = None
    gpu_hours: float | None = None
    lower_bound_seconds: float | None = None
    prediction_seconds: float | None = None
    workers: list[WorldSize] = field(default_factory=list)
    devices: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def forecast(opened: Opened, gpus: int) -> Forecast:
    """Simulate what `aliprod run` would do.

    Raises:
        Refused: a job takes more than ``gpus``; there is no catalogue.
    """
    ranks, most = opened.plan.cluster.workers, opened.plan.cluster.max_parallel_jobs
    if ranks > gpus:
        what = f"{gpus} is less than the {ranks} that a job takes ([cluster] workers)."
        raise Refused(what, "--gpus", "Give more, or --set cluster.workers=1.")
    rates = Rates(opened)
    work = _work(opened, rates, ranks)
    if missing := [item.target.name for item in work if math.isnan(item.seconds)]:
        return Forecast(gpus, _rows(opened, rates, work, {}), missing=missing)
    spans = simulate(work, gpus, most)
    others = ((k, _work(opened, rates, k)) for k in _world_sizes(opened, work, gpus))
    return Forecast(
        gpus=gpus,
        jobs=_rows(opened, rates, work, spans),
        seconds=_end(spans),
        gpu_hours=sum(item.gpu_seconds for item in work) / 3600,
        lower_bound_seconds=lower_bound(work, gpus),
        prediction_seconds=sum(item.seconds for item in work if item.target.kind == "prediction"),
        devices=_devices(opened, rates, work),
        workers=[WorldSize(k, _end(simulate(other, gpus, most))) for k, other in others],
    )


@dataclass(frozen=True)
class Estimate:
    """A target and its seconds; `UNKNOWN` where its rate is."""

    target: Target
    seconds: float

    @property
    def gpu_seconds(self) -> float:
        return self.seconds * self.target.resources.gpus


def simulate(work: Sequence[Estimate], gpus: int, most: int | None = None) -> dict[str, tuple[float, float]]:
    """When each target would begin and end, in seconds from now.

    Args:
        work: in the order of a run. most: targets side by side.
    """
    clock = _Clock(gpus, {item.target.name: item.seconds for item in work})
    for _ in execute({item.target.name: item.target for item in work}, clock, most):
        pass
    return clock.spans


def lower_bound(work: Sequence[Estimate], gpus: int) -> float:
    """Seconds that no order goes below: all work spread evenly, or the longest chain of needs.

    Args:
        work: each behind what it needs.
    """
    chains: dict[str, float] = {}
    for item in work:
        before = (chains[need.name] for need in item.target.needed() if need.name in chains)
        chains[item.target.name] = item.seconds + max(before, default=0.0)
    return max(sum(item.gpu_seconds for item in work) / gpus, max(chains.values(), default=0.0))


def speed_up(ranks: int) -> float:
    """How many times faster several ranks are than one: each more costs all of them 2 %.

    7.0 on eight. NVIDIA's DeepLearningExamples, eight A100 80GB against one, mixed precision, PyTorch: resnet50 6.7,
    SE-ResNeXt101-32x4d 6.8, efficientnet-b4 7.8.
    """
    return ranks / (1 + 0.02 * (ranks - 1))


def _work(opened: Opened, rates: Rates, ranks: int) -> list[Estimate]:
    """All that is not made, with so many ranks a job."""
    cluster = opened.plan.cluster.model_copy(update={"workers": ranks})
    graph = targets(opened.with_cluster(cluster), gpu=True)
    missing = lacking(graph, opened.places.storage)
    return [Estimate(target, _seconds(target, rates)) for target in missing.values()]


def _seconds(target: Target, rates: Rates) -> float:
    cost = target.cost
    if not cost.known:
        return UNKNOWN
    if cost.job is None:
        return 0.0
    ranks = max(1, target.ranks)
    trained = _lasts(cost.trained, rates.training(cost.job) if cost.trained else None, ranks)
    return trained + _lasts(cost.seen, rates.predicting(cost.job, cost.views), ranks)


def _lasts(images: int, rate: Rate | None, ranks: int) -> float:
    if images == 0:
        return 0.0
    return UNKNOWN if rate is None else images / _scaled(rate, ranks)


def _scaled(rate: Rate, ranks: int) -> float:
    """Images a second of so many ranks together."""
    return rate.images_per_second * speed_up(ranks) / speed_up(rate.ranks)


def _world_sizes(opened: Opened, work: Sequence[Estimate], gpus: int) -> Iterator[int]:
    """Numbers of ranks that every batch can be dealt to: powers of two, and all GPUs."""
    stages = [item.target.owner.stage for item in work if item.target.kind == "training"]
    batches = [stage.batch_size // epoch_of(stage, opened.read_catalogue()).group for stage in stages]
    for ranks in sorted({*(2**power for power in range(gpus.bit_length())), gpus}):
        if all(batch % ranks == 0 for batch in batches):
            yield ranks


def _rate(rates: Rates, job: Job) -> Rate | None:
    """The rate of a job; a soup only predicts."""
    return rates.predicting(job, "center") if job.stage.soup else rates.training(job)


def _devices(opened: Opened, rates: Rates, work: Sequence[Estimate]) -> list[str]:
    """Those on which the rates were seen."""
    todo = [item.target.owner for item in work if item.target.kind == "training"]
    found = [rate for job in todo for rate in (_rate(rates, job), rates.predicting(job, "center"))]
    found += [rates.predicting(opened.jobs[name], opened.plan.ensemble.views) for name in predictors(opened)]
    return sorted({rate.device for rate in found if rate is not None})


def _rows(
    opened: Opened, rates: Rates, work: Sequence[Estimate], spans: Mapping[str, tuple[float, float]]
) -> list[JobForecast]:
    """Every job of the plan; a finished one costs nothing."""
    seconds = {item.target.name: item.seconds for item in work}
    return [_row(job, rates, seconds.get(name), opened, spans) for name, job in opened.jobs.items()]


def _row(
    job: Job, rates: Rates, seconds: float | None, opened: Opened, spans: Mapping[str, tuple[float, float]]
) -> JobForecast:
    begin, end = spans.get(job.name, (None, None))
    rate = None if seconds is None else _rate(rates, job)
    return JobForecast(
        name=job.name,
        seconds=0.0 if seconds is None else None if math.isnan(seconds) else seconds,
        begin=begin,
        end=end,
        images_per_second=None if rate is None else _scaled(rate, opened.plan.cluster.workers),
        source=None if rate is None else f"{rate.source}, {rate.device}",
    )


class _Clock:
    """Stands for a cluster: what is started ends when its seconds are over, and waiting takes no time."""

    def __init__(self, gpus: int, seconds: Mapping[str, float]) -> None:
        self.gpus, self.seconds, self.now = gpus, seconds, 0.0
        self.running: dict[str, float] = {}
        self.spans: dict[str, tuple[float, float]] = {}

    def capacity(self) -> Resources:
        return Resources(sys.maxsize, self.gpus)

    def stopping(self) -> bool:
        return False

    def start(self, target: Target) -> str:
        end = self.now + self.seconds[target.name]
        self.running[target.name], self.spans[target.name] = end, (self.now, end)
        return target.name

    def wait(self, handles: list[Any]) -> list[tuple[Any, str]]:
        """To the next end; all that end then."""
        self.now = min(self.running[handle] for handle in handles)
        return [(handle, "") for handle in handles if self.running[handle] == self.now]


def _end(spans: Mapping[str, tuple[float, float]]) -> float:
    return max((end for _, end in spans.values()), default=0.0)

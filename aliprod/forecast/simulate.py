"""What a plan will take: its graph, scheduled on a simulated clock with measured rates.

Filters of duplicates and pseudo labels count as if they left and added all that they may. Adding up the ensemble, and
what CPUs do beside the GPUs, count nothing; nor does what a bank of features takes to be searched.

STORAGE/PLAN/forecast.json     of the whole plan, as soon as a rate was known, until the plan says something else: what
                               the report holds against the facts
"""

import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from aliprod.build.allot import RESTART_SECONDS, Paths
from aliprod.build.graph import targets, targets_on
from aliprod.build.room import Node, check_room
from aliprod.build.schedule import Outcome, execute
from aliprod.build.target import Resources, Target, lacking
from aliprod.errors import AliprodError, Refused
from aliprod.forecast.rates import Estimates, Rate, predictors, scaled
from aliprod.plan.jobs import Job
from aliprod.plan.open import Opened
from aliprod.store import commit

STARTING_SECONDS = 3.6  # of a training: benchmarks/RESULTS.md, the median of job_start.py, two side by side
A_NODE = 8  # GPUs of a machine, where there are more in all
FILE = "forecast.json"
_MOST = 300  # jobs that are simulated for the report: seconds


class Span(NamedTuple):
    """A stretch of time, in seconds from the clock's beginning, in which a target was made by so many ranks."""

    begin: float
    end: float
    ranks: int


@dataclass(frozen=True)
class _Begun:
    nodes: tuple[str, ...]
    begin: float
    works: float  # from when on
    end: float


class Clock:
    """A simulated cluster of fixed nodes: what is started ends when its seconds are over, and waiting takes no time.
    ``seconds``: that a target takes at a world size. ``starting``: that the start of a training takes; ``again``: every
    other start of it. ``spans`` says when each target was being made."""

    def __init__(
        self, nodes: Sequence[Node], seconds: Callable[[Target, int], float], starting: float, again: float
    ) -> None:
        self._nodes, self._seconds, self.starting, self.again, self.time = nodes, seconds, starting, again, 0.0
        self.spans: dict[str, list[Span]] = {}
        self._left: dict[str, float] = {}
        self._begun: dict[str, _Begun] = {}
        self._stopped: list[str] = []

    def now(self) -> float:
        return self.time

    def nodes(self) -> Sequence[Node]:
        return self._nodes

    def types(self) -> Sequence[Resources]:
        return ()

    def stopping(self) -> bool:
        return False

    def elsewhere(self, _: Target) -> str:
        return ""

    def seconds(self, target: Target, world_size: int) -> float:
        return self._seconds(target, world_size) * self._left.get(target.name, 1.0)

    def start(self, target: Target, nodes: Sequence[str]) -> str:
        starting = self.again if target.name in self.spans else self.starting
        works = self.time + (starting if target.kind == "training" else 0.0)
        end = works + self.seconds(target, len(nodes))
        self._begun[target.name] = _Begun(tuple(nodes), self.time, works, end)
        return target.name

    def stop(self, handle: str) -> None:
        self._stopped.append(handle)

    def request(self, ranks: Sequence[Resources]) -> None:
        """Nothing grows here."""

    def wait(self, handles: Sequence[str], patience: float) -> list[tuple[str, Outcome]]:
        """To the next end; all that end then. What was stopped has ended already."""
        if paused := self._stopped:
            self._stopped = []
            return [(name, self._pause(name)) for name in paused]
        self.time = min([self.time + patience, *(self._begun[name].end for name in handles)])
        over = [name for name in handles if self._begun[name].end <= self.time]
        for name in over:
            self._note(name)
        return [(name, Outcome("done")) for name in over]

    def _pause(self, name: str) -> Outcome:
        one = self._note(name)
        if one.end > one.works:
            self._left[name] = self._left.get(name, 1.0) * min(1.0, (one.end - self.time) / (one.end - one.works))
        return Outcome("paused")

    def _note(self, name: str) -> _Begun:
        one = self._begun.pop(name)
        self.spans.setdefault(name, []).append(Span(one.begin, self.time, len(one.nodes)))
        return one


@dataclass(frozen=True)
class JobForecast:
    """A job's training, with the validation of its epochs."""

    name: str
    seconds: float | None  # that it is being made, its starts included; 0: it is finished, None: no rate is known
    begin: float | None  # in seconds from now, as end; None: it is finished, or anything of the plan is not known
    end: float | None
    ranks: tuple[int, ...]  # at first, and at last where that is another number
    images_per_second: float | None  # of all its ranks together, as many as at last
    source: str | None  # where that was seen


@dataclass(frozen=True)
class Forecast:
    """What the unfinished rest takes on so many GPUs; where jobs run on CPUs, on so many ranks at a time."""

    gpus: int
    jobs: list[JobForecast]
    seconds: float | None = None  # predictions included, as in gpu_hours; None where a rate is missing
    gpu_hours: float | None = None
    lower_bound_seconds: float | None = None  # no order, and no number of ranks, is faster on these GPUs
    prediction_seconds: float | None = None  # GPU-seconds of all predictions
    devices: list[str] = field(default_factory=list)  # on which the rates were seen
    missing: list[str] = field(default_factory=list)  # targets whose rate nobody has measured


class Kept(NamedTuple):
    """The spans of each target of the whole plan; ``time``: when that was forecast, in seconds since the epoch."""

    time: float
    spans: Mapping[str, Sequence[Span]]


def forecast(opened: Opened, gpus: int, todo: Mapping[str, Target] | None = None) -> Forecast:
    """Simulate what `aliprod run` would do; ``todo``: what it would make, where that is known already. Refused: a job
    takes more than ``gpus``; there is no catalogue."""
    todo = lacking(targets(opened, gpu=True), opened.places.storage) if todo is None else todo
    if (most := max((target.floor for target in todo.values()), default=0)) > gpus:
        what = f"{gpus} is less than the {most} that a job takes ([cluster] ranks)."
        raise Refused(what, "--gpus", 'Give more, or --set cluster.ranks="auto".')
    estimates = Estimates(opened, beside=gpus > 1)
    alone = {name: estimates.known(target, target.floor) for name, target in todo.items()}
    missing = [name for name, seconds in alone.items() if math.isnan(seconds)]
    spans = {} if missing else simulate(todo, estimates.seconds, machines(gpus), opened.plan.cluster.max_parallel_jobs)
    jobs = [_row(job, estimates, alone.get(job.name), spans.get(job.name, ())) for job in opened.jobs.values()]
    if missing:
        return Forecast(gpus, jobs, missing=missing)
    ranks = {name: sum((span.end - span.begin) * span.ranks for span in own) for name, own in spans.items()}
    taken = {name: ranks[name] * target.resources.gpus for name, target in todo.items()}
    return Forecast(
        gpus=gpus,
        jobs=jobs,
        seconds=max((one[-1].end for one in spans.values()), default=0.0),
        gpu_hours=sum(taken.values()) / 3600,
        lower_bound_seconds=lower_bound(todo, estimates.seconds, gpus),
        prediction_seconds=sum(taken[name] for name, target in todo.items() if target.kind == "prediction"),
        devices=_devices(opened, estimates, todo),
    )


def simulate(
    todo: Mapping[str, Target], seconds: Callable[[Target, int], float], nodes: Sequence[Node], most: int | None = None
) -> dict[str, list[Span]]:
    """When each target would be made, by how many ranks. ``todo``: each behind what it needs. ``seconds``: that one
    takes at a world size. ``most``: targets side by side."""
    clock = Clock(nodes, seconds, STARTING_SECONDS, RESTART_SECONDS)
    for _ in execute(todo, clock, most):
        pass
    return clock.spans


def lower_bound(todo: Mapping[str, Target], seconds: Callable[[Target, int], float], gpus: int) -> float:
    """Seconds that no schedule goes below: all work spread evenly, or the longest chain of needs at its widest.
    ``todo``: each behind what it needs."""
    work = sum(seconds(target, target.floor) * target.floor * target.resources.gpus for target in todo.values())
    return max(Paths.of(todo, seconds).longest, work / gpus) if todo else 0.0


def machines(gpus: int) -> list[Node]:
    """Nodes of eight GPUs, the last of what is left; of CPUs they have enough."""
    sizes = [A_NODE] * (gpus // A_NODE) + [gpus % A_NODE] * (gpus % A_NODE > 0)
    return [Node(f"node {number}", Resources(sys.maxsize, size)) for number, size in enumerate(sizes)]


def keep(opened: Opened, nodes: Sequence[Node]) -> None:
    """Write down how the scheduler would make the whole plan on the nodes that a run has, by the rates known now.
    Nothing is written where none are, or an earlier forecast of the same plan is there. StorageFull: no room, no right
    to write, or the path is gone."""
    cluster = opened.plan.cluster
    if kept(opened) is not None or len(opened.jobs) > _MOST:
        return
    estimates = Estimates(opened, beside=cluster.max_parallel_jobs != 1)
    if not estimates.paces:
        return
    graph = targets_on(opened, nodes)
    try:
        check_room(graph, nodes)
    except AliprodError:  # what is finished asked for more than this cluster has
        return
    spans = simulate(graph, estimates.seconds, nodes, cluster.max_parallel_jobs)
    said = {"plan": opened.plan.digest, "time": time.time(), "spans": spans}
    commit.write_file(opened.folder / FILE, json.dumps(said))


def kept(opened: Opened) -> Kept | None:
    """What was forecast of the plan as it is; None where nothing was."""
    said = commit.read_json(opened.folder / FILE)
    if said.get("plan") != opened.plan.digest:
        return None
    return Kept(said["time"], {name: [Span(*one) for one in own] for name, own in said["spans"].items()})


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
    """A job of the plan; a finished one costs nothing. ``alone``: its seconds by itself; None where it is finished."""
    rate = None if alone is None else _rate(estimates, job)
    seconds = sum(span.end - span.begin for span in spans) if spans else alone or 0.0
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

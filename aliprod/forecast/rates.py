"""How fast a plan's work goes: what its jobs have reported, else what `aliprod benchmark` has measured; and how long
each target takes by that.

Never a count of operations: measured training throughput of these backbones differs by five at equal GMACs
(timm's published training benchmarks).
"""

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from statistics import fmean, median
from typing import Any, get_args

from aliprod.build.preflight import check_backbones, prepare
from aliprod.build.target import Target
from aliprod.errors import Failed
from aliprod.plan.jobs import Job
from aliprod.plan.open import Opened, Request
from aliprod.recipe import NO_COST, LearningRate, Part, Stage, Views
from aliprod.recipe.options import needs
from aliprod.store import commit, epochs
from aliprod.store.layout import key_of

FILE = "benchmark.json"
FORWARD = 3  # times as fast as training, about, where nobody has measured it
UNKNOWN = math.nan  # seconds of what nobody has measured; whatever depends on it is unknown too
LOSS = 0.02
_BESIDE = 0.71  # of its rate alone: what a job has beside another on two cores, benchmarks/RESULTS.md
_GUESS = 500 * 224**2  # pixels a second that a network is guessed to train on where no rate is known at all
_CROPS: dict[Views, int] = {"ten_crop": 10, "center": 1}

# The cost of a step depends on none of these. What is not listed stays in a digest: a setting too many there costs a
# second measurement, one too few a wrong forecast. Rates so low that no measurement diverges.
_SAME_COST: dict[str, Any] = {name: Stage.model_fields[name].default for name in NO_COST} | {
    "lr": LearningRate(backbone=1e-6, heads=1e-6)
}


@dataclass(frozen=True)
class Rate:
    """Images a second, of all ranks together, and where that was seen. ``source``: a job's name, or "benchmark"."""

    images_per_second: float
    ranks: int
    device: str
    source: str


@dataclass(frozen=True)
class Piece:
    """Work that several jobs share: measured once. ``jobs``: their names; ``job`` is the first of them."""

    part: Part | Views
    digest: str
    job: Job
    jobs: tuple[str, ...]


def bare(stage: Stage) -> Stage:
    """A stage without what does not change what a step of it costs: what is measured, and what a digest covers."""
    return stage.model_copy(update=_SAME_COST)


def pieces(opened: Opened, part: Part) -> Iterator[Piece]:
    """The distinct work of a plan's jobs, finished or not; the predictions too, where whole trainings are asked for."""
    jobs, predicting, views = opened.jobs.values(), predictors(opened), opened.plan.ensemble.views
    asked: list[tuple[Part | Views, Job]] = [(part, job) for job in jobs if job.stage.is_trained]
    if part == "train":
        asked += [("center", job) for job in jobs]
        asked += [(views, job) for job in jobs if views != "center" and job.name in predicting]
    same: dict[tuple[Part | Views, str], list[Job]] = {}
    for what, job in asked:
        same.setdefault((what, _digest(opened, what, job)), []).append(job)
    for (what, digest), alike in same.items():
        yield Piece(what, digest, alike[0], tuple(job.name for job in alike))


def predictors(opened: Opened) -> set[str]:
    """Names of the jobs that predict whole splits: members, those who label test images, and floors."""
    labellers = (name for job in opened.jobs.values() for name in job.labellers)
    floors = (job.name for job in opened.jobs.values() if job.is_floor)
    return {*opened.plan.ensemble.members, *labellers, *floors}


def measure_plan(request: Request, part: Part, steps: int) -> Iterator[dict[str, Any]]:
    """Measure each distinct piece of a plan's work on this machine, one rank's share of a batch on its first GPU where
    it has one, for so many ``steps``, a quarter as many batches of predictions; keep each result, and yield it.
    Refused: there is no catalogue, or timm knows no such network. Failed: a step does not fit in the GPU's memory; what
    was measured before is kept."""
    from torch import OutOfMemoryError

    opened = prepare(request)
    check_backbones(request.plan)
    for piece in pieces(opened, part):
        try:
            measured = _measured(opened, piece, steps)
        except OutOfMemoryError as error:
            advice = "Lower batch_size or crop, or raise shares: so many images at a time fit better."
            raise Failed("does not fit in the GPU's memory.", piece.job.name, advice) from error
        measured |= {"cpus": len(os.sched_getaffinity(0))}
        keep(opened, piece, measured)
        yield {"part": piece.part, "jobs": list(piece.jobs), **measured}


def _measured(opened: Opened, piece: Piece, steps: int) -> dict[str, Any]:
    from aliprod.training.speed import measure, measure_prediction

    job, cluster, catalogue = piece.job, opened.plan.cluster, opened.read_catalogue()
    match piece.part:
        case "center" | "ten_crop" as views:
            batches = max(1, steps // 4)
            return measure_prediction(job.stage, job.network, views, catalogue, batches, cluster)
        case part:
            stage = bare(job.stage)
            if stage.shares == "ranks":  # one of them is measured
                _, ranks = cluster.ranks_of(job.name)
                stage = stage.model_copy(update={"batch_size": max(1, stage.batch_size // ranks)})
            return measure(part, stage, job.network, catalogue, steps, cluster)


def keep(opened: Opened, piece: Piece, measured: Mapping[str, Any]) -> None:
    """Keep what a piece was measured at, in place of what was known of it. ``measured``: JSON: ``images_per_second`` of
    one rank, ``device``, and whatever else a person may want to know."""
    known = commit.read_json(opened.folder / FILE)
    known[piece.digest] = {"part": piece.part, "jobs": piece.jobs, **measured}
    commit.write_file(opened.folder / FILE, json.dumps(known, indent=1))


def speed_up(ranks: int) -> float:
    """How many times faster several ranks are than one: each more costs all of them 2 %; 7.0 on eight. NVIDIA's
    DeepLearningExamples, eight A100 80GB against one, mixed precision, PyTorch: resnet50 6.7, SE-ResNeXt101-32x4d 6.8,
    efficientnet-b4 7.8."""
    return ranks / (1 + LOSS * (ranks - 1))


def scaled(rate: Rate, ranks: int) -> float:
    """Images a second of so many ranks together."""
    return rate.images_per_second * speed_up(ranks) / speed_up(rate.ranks)


class Estimates:
    """Rates of a plan's jobs, and seconds of its targets: of what their costs say is left to do. ``fresh_seconds``:
    after which rates are read anew: jobs that run tell theirs. ``beside``: whether ranks run side by side: on CPUs they
    slow each other, which no benchmark of one has seen."""

    def __init__(self, opened: Opened, fresh_seconds: float = math.inf, beside: bool = False) -> None:
        self.opened, self.fresh_seconds, self.beside = opened, fresh_seconds, beside
        self._renew()

    def _renew(self) -> None:
        jobs, self.read = self.opened.jobs, time.monotonic()
        self._known = commit.read_json(self.opened.folder / FILE)
        reported = {name: rate for name, job in jobs.items() if (rate := _reported(self.opened, job))}
        alike = {_digest(self.opened, "train", jobs[name]): rate for name, rate in reported.items()}
        self._measured = cache(lambda name, part: self._benchmark(_digest(self.opened, part, jobs[name])))
        self._training = {
            name: reported.get(name) or alike.get(_digest(self.opened, "train", job)) or self._measured(name, "train")
            for name, job in jobs.items()
        }
        looking = (job for job in jobs.values() if job.stage.features == "computed")
        found = [(job, rate) for job in looking if (rate := self.training(job))]
        # pixels a second in training of one rank, of the jobs whose rate is known
        self.paces = {job.name: _pixels(job) * rate.images_per_second / speed_up(rate.ranks) for job, rate in found}

    def training(self, job: Job) -> Rate | None:
        """What the job itself has reported, else one of the plan with the same digest, else the benchmark."""
        return self._training[job.name]

    def predicting(self, job: Job, views: Views) -> Rate | None:
        """The benchmark; of the centre view, else, what training says, whose steps go forward and back."""
        rate: Rate | None = self._measured(job.name, views)
        if rate is None and views == "center" and job.stage.features == "computed" and (own := self.training(job)):
            return replace(own, images_per_second=FORWARD * own.images_per_second)
        return rate

    def _benchmark(self, digest: str) -> Rate | None:
        if (entry := self._known.get(digest)) is None:
            return None
        slower = _BESIDE if self.beside and entry["device"] == "cpu" else 1.0
        return Rate(slower * entry["images_per_second"], 1, entry["device"], "benchmark")

    def known(self, target: Target, world_size: int) -> float:
        """By measured rates; `UNKNOWN` where one is missing."""
        cost = target.cost
        if not cost.known:
            return UNKNOWN
        if cost.job is None:
            return 0.0
        faster = speed_up(world_size)
        apart = faster if target.kind == "training" else world_size  # parts of a prediction do not talk to each other
        trained = _lasts(cost.trained, self.training(cost.job) if cost.trained else None) / faster
        return trained + _lasts(cost.seen, self.predicting(cost.job, cost.views) if cost.seen else None) / apart

    def seconds(self, target: Target, world_size: int) -> float:
        """Always a number: where no rate is known, by images and pixels, at the pace of what is known of the plan."""
        if time.monotonic() - self.read > self.fresh_seconds:
            self._renew()
        known, cost = self.known(target, world_size), target.cost
        if not math.isnan(known):
            return known
        if cost.job is None:
            return 0.0
        looks = cost.seen * _CROPS[cost.views] / FORWARD * cost.job.stage.test_view[1] ** 2
        return (cost.trained * _pixels(cost.job) + looks) / self._pace(cost.job) / speed_up(world_size)

    def _pace(self, job: Job) -> float:
        """Pixels a second in training, the mean of the plan's jobs of the same network, else of all."""
        jobs = self.opened.jobs
        alike = [pace for name, pace in self.paces.items() if jobs[name].network == job.network]
        return fmean(alike or self.paces.values() or [_GUESS])


def _digest(opened: Opened, part: Part | Views, job: Job) -> str:
    cluster = opened.plan.cluster
    facts: dict[str, Any] = {
        "part": part,
        "network": job.network,
        "classes": opened.read_catalogue().num_classes,
        "threads": cluster.threads,
        "loader_processes": cluster.loader_processes,
    }
    if part in get_args(Views):
        resize, crop = job.stage.test_view
        facts |= {"resize": resize, "crop": crop, "branches": needs(job.stage.objective.name).branches}
    else:
        stage = bare(job.stage).model_dump(mode="json")
        facts |= {"stage": stage, "compile": cluster.compile, "exact": cluster.exact}
    return key_of(facts)


def _reported(opened: Opened, job: Job) -> Rate | None:
    """What a job says of itself: the median of its epochs, since the first one warms up and a disturbed one is slow;
    before the first has ended, its pace."""
    if lines := [line for line in opened.metrics(job.name) if line.get("speed/images_per_second")]:
        speed, last = median(line["speed/images_per_second"] for line in lines), lines[-1]
        return Rate(speed, int(last.get("speed/ranks", 1)), last.get("device", "an unknown device"), job.name)
    pace = epochs.pace(opened.job_folder(job.name)) if job.key else None
    return Rate(pace["images_per_second"], pace["ranks"], pace["device"], job.name) if pace else None


def _lasts(images: int, rate: Rate | None) -> float:
    """Seconds of one rank."""
    if images == 0:
        return 0.0
    return UNKNOWN if rate is None else images * speed_up(rate.ranks) / rate.images_per_second


def _pixels(job: Job) -> float:
    """What a step of a job looks at for each image; nothing where features are cached."""
    if job.stage.features == "cached":
        return 0.0
    asked = needs(job.stage.objective.name, job.stage.objective.options)
    return float(job.stage.crop**2 * (2 if asked.distorts or asked.second else 1))

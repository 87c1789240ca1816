"""How long each target takes at each world size: measured rates, else a guess, so that a scheduler has a number."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from statistics import fmean

from aliprod.build.target import Target
from aliprod.forecast.rates import FORWARD, Rate, Rates
from aliprod.plan.jobs import Job
from aliprod.plan.open import Opened
from aliprod.recipe import Views
from aliprod.recipe.options import needs

UNKNOWN = math.nan  # seconds of what nobody has measured; whatever depends on it is unknown too
LOSS = 0.02
_BESIDE = 0.71  # of its rate alone: what a job has beside another on two cores, benchmarks/RESULTS.md
_GUESS = 500 * 224**2  # pixels a second that a network is guessed to train on where no rate is known at all
_CROPS: dict[Views, int] = {"ten_crop": 10, "center": 1}


def speed_up(ranks: int) -> float:
    """How many times faster several ranks are than one: each more costs all of them 2 %.

    7.0 on eight. NVIDIA's DeepLearningExamples, eight A100 80GB against one, mixed precision, PyTorch: resnet50 6.7,
    SE-ResNeXt101-32x4d 6.8, efficientnet-b4 7.8.
    """
    return ranks / (1 + LOSS * (ranks - 1))


def apart(ranks: int) -> float:
    """How many times faster parts of a prediction are, which do not talk to each other."""
    return float(ranks)


class Estimates:
    """Seconds of a plan's targets, of what their costs say is left to do.

    Args:
        fresh_seconds: after which rates are read anew: jobs that run tell theirs.
        beside: whether ranks run side by side: on CPUs they slow each other, which no benchmark of one has seen.
    Attributes:
        paces: pixels a second in training of one rank, of the jobs whose rate is known.
    """

    def __init__(self, opened: Opened, fresh_seconds: float = math.inf, beside: bool = False) -> None:
        self.opened, self.fresh_seconds, self.beside = opened, fresh_seconds, beside
        self._renew()

    def training(self, job: Job) -> Rate | None:
        """Its rate in training."""
        return self._training(job.name)

    def predicting(self, job: Job, views: Views) -> Rate | None:
        """The rate at which its network looks at images."""
        return self._predicting(job.name, views)

    def _renew(self) -> None:
        rates, jobs, self.read = Rates(self.opened), self.opened.jobs, time.monotonic()
        self._training = cache(lambda name: self._slowed(rates.training(jobs[name])))
        self._predicting = cache(lambda name, views: self._slowed(rates.predicting(jobs[name], views)))
        looking = [job for job in jobs.values() if job.stage.is_trained and job.stage.features == "computed"]
        found = [(job, rate) for job in looking if (rate := self.training(job))]
        self.paces = {job.name: _pixels(job) * rate.images_per_second / speed_up(rate.ranks) for job, rate in found}

    def _slowed(self, rate: Rate | None) -> Rate | None:
        if rate is None or not self.beside or (rate.source, rate.device) != ("benchmark", "cpu"):
            return rate
        return replace(rate, images_per_second=_BESIDE * rate.images_per_second)

    def known(self, target: Target, world_size: int) -> float:
        """By measured rates; `UNKNOWN` where one is missing."""
        cost = target.cost
        if not cost.known:
            return UNKNOWN
        if cost.job is None:
            return 0.0
        trained = _lasts(cost.trained, self.training(cost.job) if cost.trained else None, world_size, speed_up)
        faster = speed_up if target.kind == "training" else apart
        return trained + _lasts(cost.seen, self.predicting(cost.job, cost.views), world_size, faster)

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


def scaled(rate: Rate, ranks: int) -> float:
    """Images a second of so many ranks together."""
    return rate.images_per_second * speed_up(ranks) / speed_up(rate.ranks)


def _lasts(images: int, rate: Rate | None, ranks: int, faster: Callable[[int], float]) -> float:
    if images == 0:
        return 0.0
    return UNKNOWN if rate is None else images * speed_up(rate.ranks) / rate.images_per_second / faster(ranks)


def _pixels(job: Job) -> float:
    """What a step of a job looks at for each image; nothing where features are cached."""
    if job.stage.features == "cached":
        return 0.0
    asked = needs(job.stage.objective.name, job.stage.objective.options)
    return float(job.stage.crop**2 * (2 if asked.distorts or asked.second else 1))

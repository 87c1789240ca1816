"""How long each target takes at each world size: measured rates, else a guess, so that a scheduler has a number."""

import math
import time
from collections.abc import Callable
from functools import cache

from aliprod.build.target import Cost, Target
from aliprod.forecast.rates import Rate, Rates
from aliprod.plan.jobs import Job
from aliprod.plan.open import Opened
from aliprod.recipe import Views

UNKNOWN = math.nan  # seconds of what nobody has measured; whatever depends on it is unknown too
LOSS = 0.02
_GUESS = 500 * 224**2  # pixels a second that a network is guessed to train on where no rate is known at all
_FORWARD = 3  # times as fast as training
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
    """

    def __init__(self, opened: Opened, fresh_seconds: float = math.inf) -> None:
        self.opened, self.fresh_seconds = opened, fresh_seconds
        self._renew()

    def training(self, job: Job) -> Rate | None:
        """Its rate in training."""
        return self._training(job.name)

    def predicting(self, job: Job, views: Views) -> Rate | None:
        """The rate at which its network looks at images."""
        return self._predicting(job.name, views)

    def _renew(self) -> None:
        rates, jobs, self.read = Rates(self.opened), self.opened.jobs, time.monotonic()
        self._training = cache(lambda name: rates.training(jobs[name]))
        self._predicting = cache(lambda name, views: rates.predicting(jobs[name], views))
        self._pace = cache(self._typical)

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
        known = self.known(target, world_size)
        if not math.isnan(known):
            return known
        return _pixels(target.cost) / self._pace() / speed_up(world_size)

    def _typical(self) -> float:
        """Pixels a second in training, the mean of the jobs whose rate is known."""
        rates = [(job, rate) for job in self.opened.jobs.values() if not job.soup and (rate := self.training(job))]
        paces = [rate.images_per_second / speed_up(rate.ranks) * job.stage.crop**2 for job, rate in rates]
        return sum(paces) / len(paces) if paces else _GUESS


def scaled(rate: Rate, ranks: int) -> float:
    """Images a second of so many ranks together."""
    return rate.images_per_second * speed_up(ranks) / speed_up(rate.ranks)


def _lasts(images: int, rate: Rate | None, ranks: int, faster: Callable[[int], float]) -> float:
    if images == 0:
        return 0.0
    return UNKNOWN if rate is None else images * speed_up(rate.ranks) / rate.images_per_second / faster(ranks)


def _pixels(cost: Cost) -> float:
    """As a training counts them: an image that is only looked at is a third."""
    job: Job | None = cost.job
    if job is None:
        return 0.0
    return (cost.trained + cost.seen * _CROPS[cost.views] / _FORWARD) * job.stage.crop**2

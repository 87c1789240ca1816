"""What each task of the unfinished rest of a plan costs: its images over a measured rate."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from aliprod.catalogue.catalogue import Catalogue
from aliprod.forecast.rates import Rate, Rates, predictors
from aliprod.orchestration import steps
from aliprod.orchestration.prepare import Prepared
from aliprod.orchestration.steps import Step
from aliprod.plan.graph import Job
from aliprod.plan.options import needs
from aliprod.recipe import PerClass, Stage
from aliprod.store import commit
from aliprod.training import checkpoint
from aliprod.training.candidates import STATISTICS_BATCHES
from aliprod.training.job import RESUME

UNKNOWN = math.nan  # seconds of what nobody has measured; whatever hangs on it is unknown too


@dataclass(frozen=True)
class Cost:
    """A task and its seconds; `UNKNOWN` where its rate is."""

    step: Step
    seconds: float


@dataclass(frozen=True)
class Epoch:
    """An epoch of a stage.

    Attributes:
        images: that it trains on as rates count them, steps times batch size.
        seen: images that pass forward alone behind it: each kind of weights on val, norm statistics.
        group: images of one class that stand together in a batch.
    """

    steps: int
    images: int
    seen: int
    group: int


class Bill:
    """What each task of the unfinished rest costs.

    Attributes:
        begun: the step of the newest checkpoint of each unfinished job, None where there is none.
    """

    def __init__(self, prepared: Prepared) -> None:
        self.prepared, self.rates = prepared, Rates(prepared)
        self.epochs = {name: epoch_of(prepared.jobs[name].stage, prepared.catalogue) for name in prepared.todo}
        self.which = steps.splits(prepared.catalogue, prepared.plan.ensemble.score)
        self.begun = {name: checkpoint.newest_step(prepared.job_folder(name) / RESUME) for name in prepared.todo}

    def phases(self, ranks: int) -> list[list[Cost]]:
        """What a run does: the trainings with their inputs and predictions, then what finished members lack."""
        prepared = self.prepared
        cluster = prepared.plan.cluster.model_copy(update={"workers": ranks})
        training = steps.training(prepared.jobs, prepared.todo, self.which, cluster, gpu=True)
        finished = [name for name in prepared.plan.ensemble.members if name not in prepared.todo]
        lacking = [steps.prediction(name, split, cluster, gpu=True) for name in finished for split in self.which.all]
        return [[Cost(step, self._seconds(step, ranks)) for step in phase] for phase in (training, lacking)]

    def widths(self, gpus: int) -> Iterator[int]:
        """Numbers of ranks that every batch can be dealt to: powers of two, and all GPUs."""
        todo = [(self.prepared.jobs[name].stage.batch_size, self.epochs[name].group) for name in self.prepared.todo]
        for ranks in sorted({*(2**power for power in range(gpus.bit_length())), gpus}):
            if all(batch // group % ranks == 0 for batch, group in todo):
                yield ranks

    def devices(self) -> list[str]:
        """Those on which the rates were seen."""
        prepared, views = self.prepared, self.prepared.plan.ensemble.views
        todo = [prepared.jobs[name] for name in prepared.todo]
        found = [rate for job in todo for rate in (self.rate(job), self.rates.predicting(job, "center"))]
        found += [self.rates.predicting(prepared.jobs[name], views) for name in predictors(prepared)]
        return sorted({rate.device for rate in found if rate is not None})

    def rate(self, job: Job) -> Rate | None:
        """At which a job goes; a soup only looks."""
        return self.rates.predicting(job, "center") if job.stage.soup else self.rates.training(job)

    def _seconds(self, step: Step, ranks: int) -> float:
        job = self.prepared.jobs[step.job]
        match step.kind:
            case "train":
                return self._training(job, ranks)
            case "predict":
                return self._predicting(job, step.of)
            case "pseudo_labels":
                return 0.0  # reads what has been predicted
        if self.begun[job.name] is not None:
            return 0.0  # a job that has begun has its inputs
        if step.kind == "hashes":
            return UNKNOWN if commit.read(self.prepared.hashes) is None else 0.0
        images = int(_counts(job.stage, self.prepared.catalogue).sum())
        return _lasts(images, self.rates.predicting(self.prepared.jobs[step.of], "center"), 1)

    def _training(self, job: Job, ranks: int) -> float:
        """From the newest checkpoint on."""
        epoch, done = self.epochs[job.name], self.begun[job.name] or 0
        left = max(0, job.stage.epochs * epoch.steps - done)
        validations = job.stage.epochs - done // max(1, epoch.steps)
        trained = _lasts(left * job.stage.batch_size, self.rates.training(job), ranks)
        return trained + _lasts(validations * epoch.seen, self.rates.predicting(job, "center"), ranks)

    def _predicting(self, job: Job, split: str) -> float:
        views = self.prepared.plan.ensemble.views
        stores = (self.prepared.job_folder(job.name) / "probabilities").glob(steps.store_name("*", split, views))
        if job.name not in self.prepared.todo and any(commit.read(store) is not None for store in stores):
            return 0.0
        return _lasts(len(getattr(self.prepared.catalogue, split)), self.rates.predicting(job, views), 1)


def speed_up(ranks: int) -> float:
    """How many times faster several ranks are than one: each more costs all of them 2 %.

    7.0 on eight. NVIDIA's DeepLearningExamples, eight A100 80GB against one, mixed precision, PyTorch: resnet50 6.7,
    SE-ResNeXt101-32x4d 6.8, efficientnet-b4 7.8.
    """
    return ranks / (1 + 0.02 * (ranks - 1))


def epoch_of(stage: Stage, catalogue: Catalogue) -> Epoch:
    """An epoch of a stage, counted; `aliprod.data.loader.TrainBatches` makes the same number of steps.

    Raises:
        Refused: the objective does not fit the catalogue.
    """
    asked = needs(stage.objective.name, stage.objective.options)
    groups = int((-(-_counts(stage, catalogue) // asked.group)).sum())
    at_once = max(1, min(stage.batch_size // asked.group, groups))
    number = groups // at_once
    kinds = 1 if stage.ema is None else 2
    restated = min(STATISTICS_BATCHES, number) * at_once * asked.group
    seen = len(catalogue.val) + (restated + len(catalogue.val) if asked.distorts else 0)
    if stage.soup is not None:
        kinds = len(stage.soup.of) if stage.soup.greedy and len(catalogue.val) else 1
        return Epoch(0, 0, kinds * (restated + len(catalogue.val)), asked.group)
    return Epoch(number, number * stage.batch_size, kinds * seen, asked.group)


def _counts(stage: Stage, catalogue: Catalogue) -> np.ndarray:
    """Images of each class that a stage trains on, at most; pseudo-labelled ones stand behind."""
    counts = catalogue.class_counts
    if isinstance(stage.images, PerClass):
        counts = np.minimum(counts, stage.images.per_class)
    if stage.pseudo_labels is None:
        return counts
    return np.append(counts, min(len(catalogue.test), stage.pseudo_labels.per_class * catalogue.num_classes))


def _lasts(images: int, rate: Rate | None, ranks: int) -> float:
    if images == 0:
        return 0.0
    return UNKNOWN if rate is None else images / scaled(rate, ranks)


def scaled(rate: Rate, ranks: int) -> float:
    """Images a second of so many ranks together."""
    return rate.images_per_second * speed_up(ranks) / speed_up(rate.ranks)

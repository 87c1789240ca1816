"""What a training takes, counted as it will count: its steps, and the images that it sees."""

from dataclasses import dataclass

import numpy as np

from aliprod.build.target import Cost
from aliprod.catalogue.catalogue import Catalogue, Integers
from aliprod.data.selection import epoch_size
from aliprod.errors import Refused
from aliprod.plan.jobs import Job
from aliprod.recipe import STATISTICS_BATCHES, PerClass, Stage, options


@dataclass(frozen=True)
class Epoch:
    """An epoch of a stage. ``steps``: of training. ``seen``: images that pass forward alone behind them: each kind of
    weights on val, norm statistics."""

    steps: int
    seen: int


def epoch_of(stage: Stage, catalogue: Catalogue) -> Epoch:
    """Count an epoch of a stage, as its training would. Refused: a batch cannot be dealt in groups of one class."""
    needs, val = options.needs(stage.objective.name, stage.objective.options), len(catalogue.val)
    size = epoch_size(images_of(stage, catalogue), stage.batch_size, needs.group)
    restated = min(STATISTICS_BATCHES, size.steps) * size.groups_per_batch * needs.group
    steps = size.steps if stage.is_trained else 0
    if stage.features == "cached":
        seen = 0
    elif stage.soup is not None:
        seen = (len(stage.soup.of) if stage.soup.greedy and val else 1) * (restated + val)
    else:
        again = restated + val if needs.distorts and stage.norm_statistics == "batch" else 0
        seen = (val + again) * (1 if stage.ema is None else 2)
    return Epoch(steps, seen)


def images_of(stage: Stage, catalogue: Catalogue) -> Integers:
    """Images of each class that a stage trains on, at most; pseudo-labelled ones stand behind."""
    counts = catalogue.class_counts
    if isinstance(stage.images, PerClass):
        counts = np.minimum(counts, stage.images.per_class)
    if stage.pseudo_labels is None:
        return counts
    return np.append(counts, min(len(catalogue.test), stage.pseudo_labels.per_class * catalogue.num_classes))


def cost_of(job: Job, catalogue: Catalogue, done: int) -> Cost:
    """What is left of a job's training once so many steps are done. Refused: as `epoch_of`, naming the job."""
    try:
        epoch, epochs = epoch_of(job.stage, catalogue), job.stage.epochs
    except Refused as error:
        raise Refused(error.what, job.name, error.advice) from None
    trained = max(0, epochs * epoch.steps - done) * job.stage.batch_size
    return Cost(job, trained=trained, seen=(epochs - done // max(1, epoch.steps)) * epoch.seen)

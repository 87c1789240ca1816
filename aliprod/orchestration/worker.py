"""One rank of a job inside a TorchTrainer: it iterates the training and reports each epoch to Ray."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train

from aliprod.catalogue import sources
from aliprod.errors import NonFiniteLoss, Refused
from aliprod.training.job import run
from aliprod.training.training_job import TrainingJob

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rank:
    """What each rank is given."""

    job: TrainingJob
    catalogue: Path


def train_rank(config: dict[str, Any]) -> str:
    """Train on this rank.

    A checkpoint is what the storage path has committed; Ray is told numbers only, once an epoch, since its
    report is a barrier. What an exact replay would repeat is returned, not raised: Ray would try it again.

    Returns:
        Why the job failed for good; empty where it finished.
    """
    rank: Rank = config["rank"]
    try:
        for progress in run(rank.job, sources.read(rank.catalogue)):
            if progress.last is not None:
                ray.train.report({"epoch": progress.state.epoch, **progress.metrics})
    except (NonFiniteLoss, Refused) as error:
        return str(error)
    return ""

"""One rank of a job inside a TorchTrainer: it iterates the training and reports each epoch to Ray.

Importing this module is cheap: only the worker that trains imports what trains.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import cloudpickle

if TYPE_CHECKING:
    from aliprod.training.job import Work


@dataclass(frozen=True)
class Rank:
    """What each rank is given, packed: its classes import torch, and the launcher only passes it on."""

    job: str
    run: str  # Ray Train resumes a name: the key keeps it unique
    packed: bytes = field(repr=False)


def pack(work: "Work", catalogue: Path) -> Rank:
    """A job, and the catalogue that it trains on, for its ranks."""
    run = f"{work.name.replace('/', '.')}-{work.key[:12]}"
    return Rank(work.name, run, cloudpickle.dumps((work, catalogue)))


def train_rank(config: dict[str, Any]) -> str:
    """Train on this rank.

    A checkpoint is what the storage path has committed; Ray is given numbers only, once an epoch, since its
    report is a barrier. What an exact replay would repeat is returned, not raised: Ray would try it again.

    Returns:
        Why the job failed for good; empty where it finished.
    """
    import ray.train

    from aliprod.catalogue import sources
    from aliprod.errors import NonFiniteLoss, Refused
    from aliprod.training import job

    work, catalogue = cloudpickle.loads(config["rank"].packed)
    try:
        for progress in job.run(work, sources.read(catalogue)):
            if progress.end is not None:
                ray.train.report({"epoch": progress.state.epoch, **progress.metrics})
    except (NonFiniteLoss, Refused) as error:
        return str(error)
    return ""

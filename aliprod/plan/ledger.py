"""What is finished, and where a job keeps what it has: asked of the storage folder alone, never of MLflow."""

from pathlib import Path
from typing import Any

from aliprod.plan.graph import Job
from aliprod.store import commit


def folder(storage: Path, job: Job) -> Path:
    """Where a job keeps all it has: STORAGE/jobs/BACKBONE/STAGE/KEY.

    Raises:
        ValueError: the job has no key, since its catalogue is not there.
    """
    if job.key is None:
        raise ValueError(f"{job.name} has no key: its catalogue is not there")
    return storage / "jobs" / job.backbone / job.stage_name / job.key


def finished(storage: Path, job: Job) -> dict[str, Any] | None:
    """The record of a job's committed weights, the last thing that it writes; None where it has not ended."""
    return None if job.key is None else commit.read(folder(storage, job) / "weights")

"""What is finished, and how far the rest has come: asked of the storage folder alone, never of MLflow."""

import json
from pathlib import Path
from typing import Any

from aliprod import commit
from aliprod.plan.graph import Job


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


def epochs(folder: Path) -> list[dict[str, Any]]:
    """What a job's metrics.jsonl says, an epoch once: after a resume the first record counts.

    Half a line, as a killed worker leaves it, is skipped.
    """
    try:
        lines = (folder / "metrics.jsonl").read_bytes().splitlines()
    except OSError:
        return []
    found: dict[int, dict[str, Any]] = {}
    for record in filter(None, map(_record, lines)):
        found.setdefault(record["epoch"], record)
    return [found[epoch] for epoch in sorted(found)]


def progress(folder: Path) -> dict[str, Any] | None:
    """The record of the last epoch that a job has ended; None before the first."""
    return next(reversed(epochs(folder)), None)


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("epoch"), int) else None

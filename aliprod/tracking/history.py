"""A job's metrics.jsonl: one JSON object an epoch, the outbox that survives everything."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mlflow.entities import Metric

TOP1 = "val/top1_error"  # mean over classes, 0 to 1: what checkpoints are picked by

Record = Mapping[str, Any]


def read(path: Path) -> list[Record]:
    """The records of a file in order of epoch; the first of each epoch, since after a resume one is told twice.

    A line torn by a crash, or one that is no record, is left out.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    records: dict[int, Record] = {}
    for line in lines:
        record = _parse(line)
        if record is not None:
            records.setdefault(record["epoch"], record)
    return [records[epoch] for epoch in sorted(records)]


def of_epoch(records: Iterable[Record], epoch: int) -> Record:
    """The record of one epoch; an empty one where there is none."""
    return next((record for record in records if record["epoch"] == epoch), {})


def metrics(record: Record) -> list[Metric]:
    """The numbers of a record as points at its epoch and its time, non-finite ones too."""
    return [
        Metric(name, float(value), record["time_ms"], record["epoch"])
        for name, value in record.items()
        if name not in ("epoch", "time_ms") and isinstance(value, int | float) and not isinstance(value, bool)
    ]


def is_finite(metric: Metric) -> bool:
    """MLflow stores infinity as 1.8e308: such a value is told as a tag instead."""
    return math.isfinite(metric.value)


def _parse(line: str) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(record, dict) and isinstance(record.get("epoch"), int) and isinstance(record.get("time_ms"), int)
    return record if whole else None

"""A record of a job's metrics.jsonl becomes points of MLflow's.

The file has one JSON object an epoch: the outbox that survives everything.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from mlflow.entities import Metric

TOP1 = "val/top1_error"  # mean over classes, 0 to 1: what checkpoints are picked by

Record = Mapping[str, Any]


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

"""What a training job tells of itself, for whoever wants to know: a line an epoch, and its pace between them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aliprod.store.commit import parsed, read_json
from aliprod.store.layout import PACE, RESUME

TOP1 = "val/top1_error"  # mean over classes, 0 to 1: what checkpoints are picked by
KINDS = {  # of the weights that an epoch ends with, as aliprod.training.candidates scores them, for people
    "raw": "",
    "raw_restated": "norm statistics taken anew",
    "averaged": "averaged weights",
    "averaged_restated": "averaged weights, norm statistics taken anew",
}


def read(path: Path) -> list[dict[str, Any]]:
    """The records in the order of their epochs, each once: after a resume the first one counts. Half a line is skipped;
    a file that is not there has none."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return []
    found: dict[int, dict[str, Any]] = {}
    for record in filter(None, map(parse, lines)):
        found.setdefault(record["epoch"], record)
    return [found[epoch] for epoch in sorted(found)]


def parse(line: bytes) -> dict[str, Any] | None:
    """The record of one line; None of half a line, as a killed worker leaves it."""
    record = parsed(line)
    return record if isinstance(record.get("epoch"), int) else None


def error(line: Mapping[str, Any]) -> tuple[float | None, str]:
    """The lowest top-1 error of an epoch, by which its weights are picked, and of which kind they are: of equals the
    later one."""
    found = {kind: line.get(TOP1 if kind == "raw" else f"{TOP1}_{kind}") for kind in reversed(KINDS)}
    known = {kind: value for kind, value in found.items() if value is not None}
    kind = min(known, key=known.__getitem__, default="raw")
    return known.get(kind), kind


def pace(folder: Path) -> dict[str, Any] | None:
    """How far a job is, and how fast: ``step``, ``images_per_second`` of its ``ranks`` on a ``device``, ``time_ms``.
    None before its second step, and once it is finished."""
    return read_json(folder / RESUME / PACE) or None

"""Lines and tables for a terminal."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aliprod.plan import ledger
from aliprod.plan.events import Changed, Event, Reported, Said
from aliprod.plan.graph import Job
from aliprod.plan.places import Places
from aliprod.plan.schema import Plan
from aliprod.store import epochs

_TOP1 = "val/top1_error"


def line(event: Event, clock: float | None = None) -> str:
    """One line for an event; '' for one that says nothing to a person.

    Args:
        clock: seconds since the epoch to put in front; None: now.
    """
    stamp = time.strftime("%H:%M:%S", time.localtime(clock))
    if isinstance(event, Said):
        return f"{stamp}  {event.text}"
    if isinstance(event, Reported):
        return f"{stamp}  {event.job:<26} epoch {event.line['epoch'] + 1}: {_numbers(event.line)}"
    if isinstance(event, Changed):
        return f"{stamp}  {event.job:<26} {event.state.replace('_', ' ')}{_after(event)}"
    return ""


def table(rows: Sequence[Sequence[object]], header: Sequence[str]) -> str:
    """Rows in aligned columns, numbers to the right."""
    cells = [list(header), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    right = [any(isinstance(row[c], int | float) for row in rows) for c in range(len(header))]
    lines = [
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def states(plan: Plan, jobs: Mapping[str, Job], places: Places) -> list[dict[str, Any]]:
    """What `aliprod status --json` says of each job, from the storage path alone."""
    told = _told(places.of(plan) / "state.json")
    found = {name: _state(job, places.storage, told.get(name, "waiting")) for name, job in jobs.items()}
    return [row | {"gain": _gain(jobs[name], found)} for name, row in found.items()]


def outcome_table(outcome: Mapping[str, Any]) -> str:
    """The error of each member and of the ensemble, per cent."""
    ensemble = outcome["ensemble"]
    rows: list[list[object]] = [
        [name, _percent(m["top1_error"]), m["version"]] for name, m in ensemble["members"].items()
    ]
    errors = [m["top1_error"] for m in ensemble["members"].values() if m["top1_error"] is not None]
    if errors:
        rows.append(["mean of the members", _percent(sum(errors) / len(errors)), None])
    rows.append(["ensemble", _percent(ensemble["top1_error"]), None])
    return table(rows, ["member", f"top-1 error on {ensemble['split'] or 'nothing labelled'}, %", "version"])


def _state(job: Job, storage: Path, told: str) -> dict[str, Any]:
    record = ledger.finished(storage, job)
    lines = epochs.read(ledger.folder(storage, job) / epochs.FILE) if job.key else []
    last = lines[-1] if lines else {}
    done = len(lines)
    state = told if record is None else ("reused" if told == "reused" else "finished")
    if record is None and state in ("finished", "reused"):
        state = "waiting"
    seconds = (lines[-1]["time_ms"] - lines[-2]["time_ms"]) / 1000 if done > 1 else None
    left = job.stage.epochs - done
    return {
        "name": job.name,
        "key": job.key,
        "state": state,
        "epoch": done,
        "epochs": job.stage.epochs,
        "top1_error": record["top1_error"] if record else last.get(_TOP1),
        "images_per_second": last.get("speed/images_per_second"),
        "eta_seconds": 0.0 if record else (seconds * left if seconds is not None else None),
    }


def _gain(job: Job, states: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Top-1 error less that of the job whose weights it starts from, in -1 to 1; None while either has not ended."""
    if job.start is None:
        return None
    both = states[job.name], states[job.start]
    own, before = (row["top1_error"] if row["state"] in ("finished", "reused") else None for row in both)
    return None if own is None or before is None else own - before


def _told(path: Path) -> dict[str, str]:
    """What the last driver said of the jobs; a running job of a driver of this machine that is gone waits again."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        jobs = dict(told["jobs"])
    except (OSError, ValueError, TypeError, KeyError):
        return {}
    if told.get("host") == os.uname().nodename and not Path(f"/proc/{told.get('pid')}").exists():
        jobs = {name: "waiting" if state == "running" else state for name, state in jobs.items()}
    return jobs


def _after(event: Changed) -> str:
    error = event.record.get("top1_error")
    if event.state in ("finished", "reused"):
        seconds = f" in {event.record['seconds']:.0f} s" if event.state == "finished" else ""
        return seconds + (
            "" if error is None else f", top-1 error {error:.2%} after epoch {event.record['best_epoch'] + 1}"
        )
    return f": {event.detail}" if event.detail else ""


def _numbers(line: Mapping[str, Any]) -> str:
    error, speed = line.get(_TOP1), line.get("speed/images_per_second", 0.0)
    told = "" if error is None else f"top-1 error {error:.2%}, "
    return f"loss {line.get('train/loss', float('nan')):.4f}, {told}{speed:.0f} images/s"


def _percent(error: float | None) -> float | None:
    return None if error is None else round(100 * error, 2)


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if isinstance(value, float) else str(value)

"""Lines and tables for a terminal."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aliprod.build.events import DONE, Changed, Event, Reported, Said
from aliprod.plan.jobs import Job
from aliprod.plan.open import Opened
from aliprod.store import epochs


def line(event: Event, clock: float | None = None) -> str:
    """One line for an event; '' for one that says nothing to a person.

    Args:
        clock: seconds since the epoch to put in front; None: now.
    """
    stamp = time.strftime("%H:%M:%S", time.localtime(clock))
    match event:
        case Said():
            return f"{stamp}  {event.text}"
        case Reported():
            return f"{stamp}  {event.job:<26} epoch {event.line['epoch'] + 1}: {_numbers(event.line)}"
        case Changed():
            said = event.detail if event.state == "waiting" and event.detail else event.state.replace("_", " ")
            return f"{stamp}  {event.job:<26} {said}{_after(event)}"
    return ""


def table(rows: Sequence[Sequence[object]], header: Sequence[str]) -> str:
    """Rows in aligned columns, numbers to the right."""
    columns = []
    for name, *values in zip(header, *rows, strict=True):
        texts = [name, *map(_cell, values)]
        width = max(map(len, texts))
        align = ">" if any(isinstance(value, int | float) for value in values) else "<"
        columns.append([f"{text:{align}{width}}" for text in [name, "-" * width, *texts[1:]]])
    return "\n".join("  ".join(cells).rstrip() for cells in zip(*columns, strict=True))


def states(opened: Opened) -> list[dict[str, Any]]:
    """What `aliprod status --json` says of each job, from the storage path alone."""
    reported = _reported(opened.folder / "state.json")
    found = {name: _state(opened, name, reported.get(name, "waiting")) for name in opened.jobs}
    return [row | {"gain": _gain(opened.jobs[name], found)} for name, row in found.items()]


def states_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of `states`."""
    header = ["job", "state", "epoch", "top-1 error, %", "gain, points", "images/s", "seconds left"]
    shown = [
        [
            row["name"],
            row["state"].replace("_", " "),
            f"{row['epoch']}/{row['epochs']}",
            _percent(row["top1_error"]),
            "" if row["gain"] is None else f"{100 * row['gain']:+6.2f}",
            row["images_per_second"],
            row["eta_seconds"],
        ]
        for row in rows
    ]
    return table(shown, header)


def summary(outcome: Mapping[str, Any]) -> str:
    """What a run did, and the errors and files of its ensemble where there is one."""
    counts = ", ".join(f"{name} {len(outcome[name])}" for name in ("trained", "reused", "failed"))
    lines = [f"{counts.capitalize()}."]
    if ensemble := outcome["ensemble"]:
        submission = ensemble["submission"] or "none, as there are no test images"
        lines += [outcome_table(outcome), f"Submission: {submission}", f"Probabilities: {ensemble['probabilities']}"]
    return "\n".join(lines)


def outcome_table(outcome: Mapping[str, Any]) -> str:
    """The error of each member and of the ensemble, per cent."""
    ensemble = outcome["ensemble"]
    rows = [[name, _percent(one["top1_error"]), one["version"]] for name, one in ensemble["members"].items()]
    errors = [one["top1_error"] for one in ensemble["members"].values() if one["top1_error"] is not None]
    if errors:
        rows.append(["mean of the members", _percent(sum(errors) / len(errors)), None])
    rows.append(["ensemble", _percent(ensemble["top1_error"]), None])
    return table(rows, ["member", f"top-1 error on {ensemble['split'] or 'nothing labelled'}, %", "version"])


def _state(opened: Opened, name: str, reported: str) -> dict[str, Any]:
    job, record, lines = opened.jobs[name], opened.record(name), opened.metrics(name)
    last: Mapping[str, Any] = lines[-1] if lines else {}
    if record is None:
        state = "waiting" if reported in DONE else reported
    else:
        state = "reused" if reported == "reused" else "finished"
    return {
        "name": job.name,
        "key": job.key,
        "state": state,
        "epoch": len(lines),
        "epochs": job.stage.epochs,
        "top1_error": record["top1_error"] if record else last.get(epochs.TOP1),
        "images_per_second": last.get("speed/images_per_second"),
        "eta_seconds": _seconds_left(lines, job.stage.epochs) if record is None else 0.0,
    }


def _seconds_left(lines: Sequence[Mapping[str, Any]], wanted: int) -> float | None:
    """As many times the last epoch as are to come; None before the second epoch."""
    if len(lines) < 2:
        return None
    seconds: float = (lines[-1]["time_ms"] - lines[-2]["time_ms"]) / 1000
    return seconds * (wanted - len(lines))


def _gain(job: Job, states: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Top-1 error less that of the job whose weights it starts from, in -1 to 1; None while either has not ended."""
    if job.start is None:
        return None
    both = states[job.name], states[job.start]
    own, before = (row["top1_error"] if row["state"] in DONE else None for row in both)
    return None if own is None or before is None else own - before


def _reported(path: Path) -> dict[str, str]:
    """What the last driver said of the jobs; a running job of a driver of this machine that is gone waits again."""
    try:
        reported = json.loads(path.read_text(encoding="utf-8"))
        jobs = dict(reported["jobs"])
    except (OSError, ValueError, TypeError, KeyError):
        return {}
    if reported.get("host") == os.uname().nodename and not Path(f"/proc/{reported.get('pid')}").exists():
        jobs = {name: "waiting" if state == "running" else state for name, state in jobs.items()}
    return jobs


def _after(event: Changed) -> str:
    """What follows the state in an event's line."""
    if event.state == "waiting":
        return ""
    if event.state not in DONE:
        return f": {event.detail}" if event.detail else ""
    error = event.record.get("top1_error")
    seconds = f" in {event.record['seconds']:.0f} s" if event.state == "finished" else ""
    return seconds + (
        "" if error is None else f", top-1 error {error:.2%} after epoch {event.record['best_epoch'] + 1}"
    )


def _numbers(line: Mapping[str, Any]) -> str:
    error, speed = line.get(epochs.TOP1), line.get("speed/images_per_second", 0.0)
    scored = "" if error is None else f"top-1 error {error:.2%}, "
    return f"loss {line.get('train/loss', float('nan')):.4f}, {scored}{speed:.0f} images/s"


def _percent(error: float | None) -> float | None:
    return None if error is None else round(100 * error, 2)


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if isinstance(value, float) else str(value)

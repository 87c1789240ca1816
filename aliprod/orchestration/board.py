"""The state of every job, told at once to whoever watches: events, MLflow, and a file that `aliprod status` reads."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from aliprod.orchestration.prepare import Prepared
from aliprod.orchestration.scheduler import Change
from aliprod.plan import ledger
from aliprod.plan.events import Changed, Event, Reported, State
from aliprod.store import commit
from aliprod.store.layout import METRICS
from aliprod.tracking.runs import Tracking


class Board:
    """The states of a run's jobs. Predictions, tasks named ``JOB SPLIT``, show only when they fail."""

    def __init__(self, prepared: Prepared, tracking: Tracking) -> None:
        self.prepared, self.tracking = prepared, tracking
        self.states: dict[str, State] = dict.fromkeys(prepared.jobs, "waiting")
        self._tails = {name: _Tail(prepared.job_folder(name) / METRICS) for name in prepared.todo}

    def reuse(self) -> Iterator[Event]:
        """What was finished before this run began; MLflow is sent what it lacks of it."""
        for name in self.prepared.jobs:
            if name not in self.prepared.todo:
                yield self._set(name, "reused")
                self.tracking.job_finished(self.prepared.jobs[name], self.prepared.job_folder(name))
        self._publish()

    def tell(self, change: Change) -> Iterator[Event]:
        """What a change of a task means for its job."""
        name, _, split = change.name.partition(" ")
        job = self.prepared.jobs[name]
        if change.state == "failed":
            yield self._set(name, "failed", f"{split}: {change.detail}" if split else change.detail)
            self.tracking.job_failed(job, change.detail)
        elif split:
            return
        elif change.state == "dropped":
            if self.states[name] == "failed":  # what was made for it failed first
                return
            yield self._set(name, "not_run", f"{change.detail} failed")
        elif change.state == "started":
            yield self._set(name, "running")
            self.tracking.job_started(job, {"host": os.uname().nodename})
        else:
            yield from self.reports()
            yield self._set(name, "finished")
            self.tracking.job_finished(job, self.prepared.job_folder(name))
        self._publish()

    def reports(self) -> Iterator[Event]:
        """What running jobs have written since the last call."""
        for name, tail in self._tails.items():
            if self.states[name] == "running":
                for line in tail.lines():
                    self.tracking.epoch(self.prepared.jobs[name], line)
                    yield Reported(name, line)

    def jobs_in(self, *states: State) -> list[str]:
        return [name for name, state in self.states.items() if state in states]

    def table(self) -> str:
        """All jobs in Markdown, for the description of the plan's run in MLflow."""
        rows = ["| job | state | top-1 error | best epoch | key |", "|---|---|---|---|---|"]
        for name, job in self.prepared.jobs.items():
            record = ledger.finished(self.prepared.places.storage, job) or {}
            error = record.get("top1_error")
            shown = "" if error is None else f"{error:.2%}"
            rows.append(
                f"| {name} | {self.states[name]} | {shown} | {record.get('best_epoch', '')} | {str(job.key)[:12]} |"
            )
        return "\n".join(rows)

    def _set(self, name: str, state: State, detail: str = "") -> Changed:
        self.states[name] = state
        record = ledger.finished(self.prepared.places.storage, self.prepared.jobs[name])
        return Changed(name, state, detail, record or {})

    def _publish(self) -> None:
        told = {"host": os.uname().nodename, "pid": os.getpid(), "jobs": self.states}
        commit.write_file(self.prepared.folder / "state.json", json.dumps(told))
        self.tracking.note(self.table())


class _Tail:
    """The whole lines that a file has gained since they were last asked for."""

    def __init__(self, path: Path) -> None:
        self.path, self.offset = path, path.stat().st_size if path.exists() else 0

    def lines(self) -> list[Mapping[str, Any]]:
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                whole, newline, _ = file.read().rpartition(b"\n")
        except OSError:
            return []
        self.offset += len(whole) + len(newline)
        return [record for line in whole.splitlines() if (record := _parsed(line))]


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        return dict(json.loads(line))
    except (ValueError, TypeError):  # torn by a crash
        return {}

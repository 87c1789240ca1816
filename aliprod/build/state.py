"""The state of a run: of every job, in a file that `aliprod status` reads, and as events."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from aliprod.build.events import Changed, Event, JobState, Reported
from aliprod.build.schedule import Change
from aliprod.build.target import Target
from aliprod.plan.open import Opened
from aliprod.store import commit, epochs
from aliprod.store.layout import METRICS

FILE = "state.json"


class RunState:
    """The states of a run's jobs.

    Attributes:
        failure: why the plan as a whole has failed; '' while it has not.
    """

    def __init__(self, opened: Opened) -> None:
        self.opened, self.failure = opened, ""
        self.states: dict[str, JobState] = dict.fromkeys(opened.jobs, "waiting")
        self.details: dict[str, str] = {}
        self._tails = {name: _Tail(opened.job_folder(name) / METRICS) for name in opened.jobs}

    def reuse(self) -> Iterator[Event]:
        """Report what was finished before this run began."""
        for name in self.opened.jobs:
            if self.opened.record(name) is not None:
                yield self._set(name, "reused")
        self._publish()

    def apply(self, target: Target, change: Change) -> Iterator[Event]:
        """Report what a change of a target means for its job: of what is no training only that it failed."""
        if target.job is None:
            self.failure = change.detail if change.state == "failed" else self.failure
            return
        name, trains = target.job.name, target.kind == "training"
        if change.state == "failed":
            what = "" if trains else f"{target.name.removeprefix(name).strip()}: "
            yield self._set(name, "failed", what + change.detail)
        elif not trains or (change.state == "dropped" and self.states[name] == "failed"):
            return  # what was made for a job may have failed first
        elif change.state == "dropped":
            yield self._set(name, "not_run", f"{change.detail} failed")
        elif change.state == "started":  # another driver may have made it while this one waited for it
            yield self._set(name, "running" if self.opened.record(name) is None else "reused")
        elif change.state in ("waiting", "paused"):
            yield self._set(name, "waiting", change.detail)
        elif self.states[name] == "reused":
            return
        else:
            yield from self.reports()
            yield self._set(name, "finished")
        self._publish()

    def reports(self) -> Iterator[Event]:
        """Report what running jobs have written since the last call."""
        for name, tail in self._tails.items():
            if self.states[name] == "running":
                yield from (Reported(name, line) for line in tail.lines())

    def jobs_in(self, *states: JobState) -> list[str]:
        return [name for name, state in self.states.items() if state in states]

    def table(self) -> str:
        """All jobs in Markdown, for the description of the plan's run in MLflow."""
        rows = ["| job | state | top-1 error | best epoch | key |", "|---|---|---|---|---|"]
        for name, job in self.opened.jobs.items():
            record = self.opened.record(name) or {}
            error = record.get("top1_error")
            cells = [name, self.states[name], "" if error is None else f"{error:.2%}", record.get("best_epoch", "")]
            rows.append(f"| {' | '.join(map(str, cells))} | {str(job.key)[:12]} |")
        return "\n".join(rows)

    def _set(self, name: str, state: JobState, detail: str = "") -> Changed:
        self.states[name], self.details[name] = state, detail
        return Changed(name, state, detail, self.opened.record(name) or {})

    def _publish(self) -> None:
        state = {"host": os.uname().nodename, "pid": os.getpid(), "jobs": self.states}
        commit.write_file(self.opened.folder / FILE, json.dumps(state))


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
        return [record for line in whole.splitlines() if (record := epochs.parse(line))]

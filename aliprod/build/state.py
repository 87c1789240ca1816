"""The state of a run: of every job and task, in a file that `aliprod status` reads, and as events."""

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from aliprod.build.events import DONE, LOST, Changed, Event, JobState, Reported, Standing, Task
from aliprod.build.room import Node
from aliprod.build.schedule import Change
from aliprod.build.target import Target
from aliprod.plan.jobs import Job
from aliprod.plan.open import Opened
from aliprod.store import commit, epochs
from aliprod.store.layout import METRICS
from aliprod.store.lease import ended, sign

FILE = "state.json"
_STANDING = TypeAdapter(Standing)
_STANDING.rebuild(_types_namespace={"Node": Node})
_STANDING_SECONDS = 1.0


class RunState:
    """The states of a run's jobs, and its tasks. ``before``: what was told of the plan, where jobs that failed then are
    not tried again. ``failure`` says why the plan as a whole has failed, '' while it has not; ``nodes`` are the
    cluster's, none before it is joined; ``page`` is where MLflow shows the jobs."""

    def __init__(self, opened: Opened, before: Standing | None = None) -> None:
        self.opened, self.failure, self.page, self.nodes = opened, "", "", tuple[Node, ...]()
        lost = {name: state for name, state in (before or Standing()).states.items() if state in LOST}
        self.states: dict[str, JobState] = {
            name: lost.get(name, "waiting") if opened.record(name) is None else "reused" for name in opened.jobs
        }
        self.reasons = {name: why for name, why in (before or Standing()).reasons.items() if name in lost}
        self.tasks: dict[str, Task] = {}
        said, _ = _said(opened)
        self._past = [task for task in (*said.past, *said.tasks) if task.until is not None]
        self._tails = {name: _Tail(opened.job_folder(name) / METRICS) for name in opened.jobs}
        self._signed = sign() | {"keys": {name: job.key for name, job in opened.jobs.items()}}
        self._stood = 0.0

    def reuse(self, of: JobState = "reused") -> Iterator[Event]:
        """Report what was finished before this run began; of what waits, what another driver has finished since."""
        for name in self.jobs_in(of):
            if self.opened.record(name) is not None:
                yield self._set(name, "reused")
        self._publish()

    def apply(self, target: Target, change: Change) -> Iterator[Event]:
        """Report what a change of a target means: for its job, where it is a training, else for itself."""
        task = self._task(target, change)
        if target.kind == "training":
            yield from self._trained(target.name, change, task)
        elif task is not None:
            yield task
        if change.state == "failed" and target.job is None:
            self.failure = change.detail
        elif change.state == "failed" and target.kind != "training" and target.job is not None:
            what = target.name.removeprefix(target.job.name).strip()
            yield self._set(target.job.name, "failed", f"{what}: {change.detail}")
        self._publish()

    def reports(self) -> Iterator[Event]:
        """Report what running jobs have written since the last call and, about once a second, how the run stands."""
        yield from self._lines()
        if time.monotonic() - self._stood >= _STANDING_SECONDS:
            self._stood = time.monotonic()
            yield self.standing()

    def standing(self) -> Standing:
        reasons = waits(self.opened.jobs, self.states) | self.reasons
        tasks, past = tuple(self.tasks.values()), tuple(self._past)
        return Standing(dict(self.states), reasons, tasks, self.nodes, past, self.page)

    def jobs_in(self, *states: JobState) -> list[str]:
        return [name for name, state in self.states.items() if state in states]

    def table(self) -> str:
        """All jobs in Markdown, for the description of the plan's run in MLflow."""
        rows = ["| job | state | top-1 error | best epoch | key |", "|---|---|---|---|---|"]
        reasons = self.standing().reasons
        for name, job in self.opened.jobs.items():
            record = self.opened.record(name) or {}
            error, state = record.get("top1_error"), self.states[name].replace("_", " ")
            if reason := reasons.get(name):
                state += f" for {reason}" if state == "waiting" else f": {reason}"
            cells = [name, state, "" if error is None else f"{error:.2%}", record["best_epoch"] + 1 if record else ""]
            rows.append(f"| {' | '.join(map(str, cells))} | {str(job.key)[:12]} |")
        return "\n".join(rows)

    def _task(self, target: Target, change: Change) -> Task | None:
        """The task that a change begins or ends."""
        if change.state == "started":
            self._past += filter(None, [self.tasks.get(target.name)])
            job = target.job.name if target.job else None
            task = Task(target.name, target.kind, job, change.nodes, time.time(), gpus=target.resources.gpus)
        elif target.name in self.tasks and change.state in ("done", "failed"):
            task = replace(self.tasks[target.name], until=time.time())
        else:
            if change.state == "paused" and (begun := self.tasks.pop(target.name, None)):
                self._past.append(replace(begun, until=time.time()))
            return None
        self.tasks[target.name] = task
        return task

    def _trained(self, name: str, change: Change, task: Task | None) -> Iterator[Event]:
        match change.state:
            case "started":  # another driver may have made it while this one waited for it
                yield self._set(name, "running" if self.opened.record(name) is None else "reused", task=task)
            case "waiting":  # no event: there may be hundreds
                self._set(name, "waiting", change.detail.removeprefix("waiting for "))
            case "paused":
                yield self._set(name, "waiting", "other ranks, to go on with them")
            case "failed":
                yield self._set(name, "failed", change.detail)
            case "dropped" if self.states[name] != "failed":  # what was made for it may have failed first
                yield self._set(name, "not_run", f"{change.detail} failed")
            case "done" if self.states[name] != "reused":
                yield from self._lines()
                yield self._set(name, "finished", task=task)

    def _lines(self) -> Iterator[Event]:
        for name, tail in self._tails.items():
            if self.states[name] == "running":
                yield from (Reported(name, line) for line in tail.lines())

    def _set(self, name: str, state: JobState, reason: str = "", task: Task | None = None) -> Changed:
        self.states[name] = state
        self.reasons.pop(name, None)
        if reason:
            self.reasons[name] = reason
        seconds = task.until - task.since if task and task.until else None
        ranks = task.world_size if task else 1
        return Changed(name, state, reason, self.opened.record(name) or {}, seconds, ranks)

    def _publish(self) -> None:
        commit.write_file(self.opened.folder / FILE, json.dumps(self._signed | asdict(self.standing())))


def waits(jobs: Mapping[str, Job], states: Mapping[str, JobState]) -> dict[str, str]:
    """The jobs that each waiting job waits for; those that wait for none are left out."""
    found = {}
    for name, job in jobs.items():
        missing = [parent for parent in job.parents if states[parent] not in DONE]
        if states[name] == "waiting" and missing:
            found[name] = ", ".join(missing)
    return found


def told(opened: Opened) -> Standing:
    """How a plan stands, by its committed weights and what the last driver said; what ran in one of this machine that
    is gone runs no more."""
    said, gone = _said(opened)
    states: dict[str, JobState] = {}
    for name in opened.jobs:
        state = said.states.get(name, "waiting")
        if opened.record(name) is not None:
            states[name] = "reused" if state == "reused" else "finished"
        else:
            states[name] = "waiting" if state in DONE or (gone and state == "running") else state
    kept = {name: why for name, why in said.reasons.items() if states.get(name) in LOST}
    if not gone:
        kept |= {name: why for name, why in said.reasons.items() if states.get(name) == "waiting"}
    tasks = tuple(task for task in said.tasks if task.until is not None or not gone)
    return Standing(states, waits(opened.jobs, states) | kept, tasks, said.nodes, said.past, said.page)


def _said(opened: Opened) -> tuple[Standing, bool]:
    """What a driver has said, of jobs as the plan has them now, and whether it is known to be gone."""
    try:
        said = (opened.folder / FILE).read_bytes()
        standing = _STANDING.validate_json(said)
    except (OSError, ValueError):
        return Standing(), True
    keys = commit.parsed(said).get("keys")
    known = keys if isinstance(keys, dict) else {}
    other = {name for name, job in opened.jobs.items() if known.get(name, job.key) != job.key}
    states = {name: state for name, state in standing.states.items() if name not in other}
    reasons = {name: why for name, why in standing.reasons.items() if name not in other}
    return replace(standing, states=states, reasons=reasons), ended(said)


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

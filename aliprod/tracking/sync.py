"""Makes MLflow show what storage holds: one thread compares, and sends the difference.

There is no queue: the thread looks at the newest progress and at each running job's metrics.jsonl every few seconds.
So an outage costs time only, and what one driver could not send, a later one sends.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from aliprod.store.layout import METRICS
from aliprod.store.mirror import size_of
from aliprod.tracking.registry import Registry
from aliprod.tracking.runs import JobProgress, PlanProgress, Runs, status_of
from aliprod.tracking.server import connect, sentence, view_page

LOOK_SECONDS = 2.0  # between two looks at what has changed
TRIES = 3  # of one part, by a server that answers other calls
FIRST_SECONDS, HURRIED_SECONDS, SLOWEST_SECONDS = 0.5, 0.25, 30.0  # between two tries


@dataclass(frozen=True)
class Part:
    """A part of what MLflow is to show, sent anew once its state differs."""

    label: str  # what a person reads when it could not be sent; no other part has it
    state: object
    send: Callable[[], None]  # may be called again, after it raised too


class Sender:
    """A thread that sends the parts whose state has changed, in their order, again and again while MLflow is away.

    ``probe`` is called after a failure, and raises while MLflow is away; ``say`` prints one line.
    """

    def __init__(self, probe: Callable[[], None], say: Callable[[str], object]) -> None:
        self._probe, self._say = probe, say
        self._parts: Callable[[], Iterable[Part]] = tuple
        self._wanted = self._reached = 0  # looks asked for; of them, those after which nothing was left to send
        self._changed, self._hurry = threading.Condition(), threading.Event()
        self._shown: dict[str, Part] = {}  # as sent or refused, by label
        self._tries: Counter[str] = Counter()
        self._refused: dict[str, str] = {}  # why, or "", by label
        self._away = ""  # why
        threading.Thread(target=self._work, name="mlflow-sender", daemon=True).start()

    def show(self, parts: Callable[[], Iterable[Part]]) -> None:
        """Send these parts instead of those of the last call; they are asked for at every look."""
        with self._changed:
            self._parts, self._wanted = parts, self._wanted + 1
            self._changed.notify_all()

    def flush(self, seconds: float) -> list[str]:
        """Wait until all is sent as it is now, at most this long; what was refused, or is left to a later run, a
        sentence each."""
        self.show(self._parts)
        self._hurry.set()
        with self._changed:
            all_sent = self._changed.wait_for(lambda: self._reached == self._wanted, timeout=seconds)
        self._hurry.clear()
        why = "MLflow is away" if self._away else "not sent in time"
        left = [] if all_sent else [f"{part.label}: {why}" for part in self._parts() if self._is_new(part)]
        return [*filter(None, self._refused.values()), *left]

    def _work(self) -> None:
        pause = FIRST_SECONDS
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._reached < self._wanted, timeout=LOOK_SECONDS)
                parts, wanted = self._parts, self._wanted
            if all(self._send(part) for part in parts() if self._is_new(part)):
                pause = FIRST_SECONDS
                with self._changed:
                    self._reached = wanted
                    self._changed.notify_all()
            elif self._hurry.wait(pause):  # somebody waits for the end
                time.sleep(HURRIED_SECONDS)
            else:
                pause = min(2 * pause, SLOWEST_SECONDS)

    def _is_new(self, part: Part) -> bool:
        return part.label not in self._shown or self._shown[part.label].state != part.state

    def _send(self, part: Part) -> bool:
        """Send a part; False where it is to be tried again. What is refused `TRIES` times is put aside."""
        failure = _failure(part.send)
        self._set_away(_failure(self._probe) if failure else "")
        self._tries[part.label] += bool(failure and not self._away)
        if failure and self._tries[part.label] < TRIES:
            return False
        refusal = f"{part.label}: {failure}" if failure else ""
        if refusal not in ("", self._refused.get(part.label)):  # once, though a running job changes at each epoch
            self._say(f"MLflow refused {refusal}")
        self._refused[part.label], self._tries[part.label], self._shown[part.label] = refusal, 0, part
        return True

    def _set_away(self, why: str) -> None:
        if why and not self._away:
            self._say(f"MLflow is away ({why}); training goes on, what it lacks is sent later.")
        elif self._away and not why:
            self._say("MLflow is back; sending what it lacks.")
        self._away = why


class Tracking:
    """One plan in MLflow, for one driver."""

    def __init__(self, uri: str, experiment: str, artifacts: Path | None, say: Callable[[str], object] = print) -> None:
        """Reach MLflow before anything starts, as `server.connect` does; ``say`` is told one line."""
        self._server = server = connect(uri, experiment, artifacts)
        self._sender = Sender(server.probe, say)
        self.flush = self._sender.flush
        self._begun = set[str]()  # jobs that have a run, since they have run here
        self.registry = Registry(server)  # versions and aliases; its methods block and raise
        # where a person sees the jobs, and their charts
        self.page, self.charts = (server.page(view_page(server.experiment_id, charts)) for charts in (False, True))

    def show(self, plan: PlanProgress) -> None:
        """Make MLflow show this, and a running job's metrics as they grow. Returns at once, never raises."""
        self._begun |= {progress.job.name for progress in plan.jobs if progress.state not in ("waiting", "not_run")}
        self._sender.show(partial(self._parts, plan))

    def _parts(self, plan: PlanProgress) -> Iterator[Part]:
        runs = Runs(self._server, self.registry, plan)
        own = Part("plan", (plan.note, plan.status), runs.show_plan)
        if plan.status == "RUNNING":
            yield own
        for progress in plan.jobs:
            if progress.job.name in self._begun:
                yield Part(progress.job.name, _state(plan, progress), partial(runs.show_job, progress))
        if plan.ensemble:
            yield Part("ensemble", plan.ensemble.key, partial(runs.show_ensemble, plan.ensemble))
        if plan.status != "RUNNING":
            yield own


def _failure(call: Callable[[], None]) -> str:
    """What a call raises, in a sentence; "" where it succeeds."""
    try:
        call()
    except Exception as error:  # noqa: BLE001 - the thread's door: one part must not keep back the others
        return sentence(error)
    return ""


def _state(plan: PlanProgress, progress: JobProgress) -> tuple[object, ...]:
    """What a job's part depends on; while it runs, the size of its metrics shows that an epoch was added."""
    size = size_of(progress.folder / METRICS) if progress.state == "running" else 0
    return status_of(plan, progress), progress.state, progress.detail, size

"""MLflow as the driver sees it: every call returns at once, none raises, nothing is lost for good."""

import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from aliprod.plan.graph import Job
from aliprod.tracking.history import Record
from aliprod.tracking.outbox import Outbox
from aliprod.tracking.registry import Choice, Registry
from aliprod.tracking.server import Server, connect
from aliprod.tracking.view import View


class Tracking:
    """One plan's runs in MLflow, sent by one thread in the order of the calls; one a driver.

    What could not be sent by the end is sent by a later driver's `job_finished`, from the storage path.
    """

    def __init__(self, server: Server, say: Callable[[str], None]) -> None:
        self._server, self._view = server, View(server)
        self._outbox = Outbox(server.probe, say)
        self._running: set[str] = set()
        self._done: set[str] = set()

    @classmethod
    def connect(
        cls, uri: str, experiment: str, artifacts: Path | None, say: Callable[[str], None] | None = None
    ) -> "Tracking":
        """Reach MLflow before anything starts, and alone: in a fresh database this runs its migrations.

        Args:
            uri: ``http://HOST:PORT`` or ``sqlite:////ABSOLUTE/mlflow.db``.
            experiment: the plan's name.
            artifacts: where artifacts go where no server decides it.
            say: prints one line; to stderr by default.
        Raises:
            Refused: the address is of a kind that cannot work.
            Unreachable: nothing answers within about 10 s, it refuses us, keeps no artifacts, or needs an upgrade.
        """
        return cls(connect(uri, experiment, artifacts), say or partial(print, file=sys.stderr, flush=True))

    @property
    def page(self) -> str:
        """Where a person sees the runs, and how to open it where no server runs."""
        return self._server.page(f"experiments/{self._server.experiment_id}/runs")

    @property
    def registry(self) -> Registry:
        """Versions and aliases; unlike everything here, its methods block and raise."""
        return self._view.registry

    def plan_started(self, text: str, plan_hash: str, note: str) -> None:
        """The plan's run: its file (passwords taken out), its hash, its table in Markdown. Call it first."""
        self._put("plan", partial(self._view.plan, text, plan_hash, note))

    def plan_finished(self, status: str) -> None:
        """How the plan ended.

        Args:
            status: "FINISHED", "FAILED" or "KILLED" (interrupted).
        """
        self._put("plan", partial(self._view.end_plan, status, _now()))

    def note(self, markdown: str) -> None:
        """The table of the plan's run anew."""
        self._put("table of the jobs", partial(self._view.note, markdown), only_latest=True)

    def job_started(self, job: Job, facts: Mapping[str, object]) -> None:
        """A job was launched.

        Args:
            facts: what may differ between attempts (attempt, host, devices): tags ``aliprod.NAME``. The settings
                that the key covers become params by themselves.
        """
        self._running.add(job.name)
        self._put(job.name, partial(self._view.start, job, dict(facts)))
        self._count()

    def epoch(self, job: Job, record: Record) -> None:
        """One line of the job's metrics.jsonl: ``epoch``, ``time_ms`` and metrics under their names."""
        self._put(job.name, partial(self._view.epochs, job, [dict(record)]), spare=True)

    def job_finished(self, job: Job, folder: Path) -> None:
        """A job is finished, now or before this run began: send what MLflow lacks of it, from its folder.

        Args:
            folder: the job's, with ``weights/`` committed.
        """
        self._done.add(job.name)
        self._put(job.name, partial(self._view.finish, job, folder))
        if job.name in self._running:
            self._running.remove(job.name)
            self._count()

    def job_failed(self, job: Job, sentence: str) -> None:
        """A job failed, and why."""
        self._put(job.name, partial(self._view.fail, job, sentence, _now()))
        self._running.discard(job.name)
        self._count()

    def ensemble(self, key: str, choices: Mapping[str, Choice], result: Mapping[str, Any]) -> None:
        """The ensemble's run; nothing where the run of this key is complete.

        Args:
            key: of the members' bytes and of how they are added up.
            choices: one a member, by job.
            result: the object `ensemble` of ``aliprod run --json``.
        """
        self._put("ensemble", partial(self._view.ensemble, key, dict(choices), dict(result), _now()))

    def flush(self, seconds: float) -> list[str]:
        """Wait until all is sent, at most this long.

        Returns:
            What was refused or could not be sent, one sentence each; a later run sends it.
        """
        return self._outbox.flush(seconds)

    def _count(self) -> None:
        self._put(
            "count of the jobs", partial(self._view.count, len(self._done), len(self._running), _now()), spare=True
        )

    def _put(self, label: str, send: Callable[[], None], *, only_latest: bool = False, spare: bool = False) -> None:
        self._outbox.put(label, partial(self._view.repeat, send), only_latest=only_latest, spare=spare)


def _now() -> int:
    return time.time_ns() // 1_000_000

"""MLflow's view of a plan: its run, a run a job below it, and the runs of its ensembles.

Every method blocks, may raise, and may be repeated: it looks by tag before it makes anything, and sends a point
only where there is none at that step. A run is complete when it has the tag ``aliprod.result``.
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlflow.entities import LoggedModelInput, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException

from aliprod.errors import Failed
from aliprod.plan.graph import Job
from aliprod.store import commit, epochs
from aliprod.tracking import history
from aliprod.tracking.registry import Choice, Registry, Weights
from aliprod.tracking.server import Server, is_away, redacted

TAG_LIMIT = 8000  # characters; MLflow cuts the rest off without a word
PARAM_LIMIT = 6000


@dataclass
class Known:
    """A run of MLflow's and what it holds, as far as one sender can know."""

    run_id: str
    start_ms: int
    tags: dict[str, str]
    has_params: bool
    points: set[tuple[str, int]] = field(default_factory=set)  # metric, step


class View:
    """One plan in MLflow.

    Args:
        server: with the plan's experiment.
    """

    def __init__(self, server: Server) -> None:
        self._server, self._client = server, server.client
        self.registry = Registry(server)
        self._plan_hash = self._plan_text = ""
        self._runs: dict[tuple[str, str], Known] = {}  # (kind, key)

    def repeat(self, send: Callable[[], None]) -> None:
        """Send; once more with nothing remembered where a run was deleted under our hands."""
        try:
            send()
        except MlflowException as error:
            if is_away(error):
                raise
            self._runs.clear()
            send()

    def plan(self, text: str, plan_hash: str, note: str) -> None:
        """The plan's run, running, with its file and its table."""
        self._plan_hash, self._plan_text = plan_hash, redacted(text)
        self._client.update_run(self._plan().run_id, status="RUNNING")
        self.note(note)

    def note(self, markdown: str) -> None:
        """The description that the UI shows with the plan's run."""
        self._client.set_tag(self._plan().run_id, "mlflow.note.content", _cut(markdown))

    def count(self, done: int, running: int, time_ms: int) -> None:
        """A point of ``jobs/done`` and ``jobs/running`` on the plan's run; step: seconds since it began."""
        plan = self._plan()
        step = max(0, time_ms - plan.start_ms) // 1000
        points = [Metric("jobs/done", done, time_ms, step), Metric("jobs/running", running, time_ms, step)]
        self._client.log_batch(plan.run_id, metrics=points)

    def end_plan(self, status: str, time_ms: int) -> None:
        """Decoration: status is never the truth."""
        self._client.set_terminated(self._plan().run_id, status, time_ms)

    def start(self, job: Job, facts: Mapping[str, object]) -> None:
        """A job's run, running; a complete one whose result was lost makes way for a new one."""
        known = self._job(job)
        if "aliprod.result" in known.tags:
            known = self._replace(job, known)
        if "aliprod.error" in known.tags:
            self._client.delete_tag(known.run_id, "aliprod.error")
            del known.tags["aliprod.error"]
        self._client.log_batch(known.run_id, tags=[RunTag(f"aliprod.{k}", _cut(str(v))) for k, v in facts.items()])
        self._client.update_run(known.run_id, status="RUNNING")

    def epochs(self, job: Job, records: Iterable[history.Record]) -> None:
        """The metrics of epochs, on the job's run; the error also on the plan's, whose charts it keeps alive."""
        points = [point for record in records for point in history.metrics(record)]
        errors = [_renamed(point, f"top1_error/{job.name}") for point in points if point.key == history.TOP1]
        self._log(self._job(job), points)
        self._log(self._plan(), errors)

    def fail(self, job: Job, sentence: str, time_ms: int) -> None:
        """A job's run, failed, and why."""
        known = self._job(job)
        known.tags["aliprod.error"] = _cut(sentence)
        self._client.set_tag(known.run_id, "aliprod.error", _cut(sentence))
        self._client.set_terminated(known.run_id, "FAILED", time_ms)

    def finish(self, job: Job, folder: Path) -> None:
        """All that MLflow lacks of a finished job: epochs, versions, aliases and, last, the tag of its result.

        Raises:
            Failed: nothing is committed in the job's folder.
        """
        best, last = Weights.read(folder / "weights"), Weights.read(folder / "last")
        if best is None:
            raise Failed("has no committed weights.", folder)
        records, result = epochs.read(folder / epochs.FILE), commit.digest(folder / "weights")
        known = self._job(job, records)
        if known.tags.get("aliprod.result", result) != result:  # trained again, to other bytes
            known = self._replace(job, known, records)
        self.epochs(job, records)
        versions = [self.registry.publish(job.name, _key(job), known.run_id, best, "best" if last else "best, last")]
        if last:
            versions.append(self.registry.publish(job.name, _key(job), known.run_id, last, "last"))
        self.registry.point(job.name, versions[0])
        if "aliprod.result" not in known.tags:
            self._bind(known, versions, records)
            self._complete(known, _final(best, records), result)

    def ensemble(self, key: str, choices: Mapping[str, Choice], result: Mapping[str, Any], time_ms: int) -> None:
        """The run of an ensemble, which names each member's version and bytes, with its table and submission."""
        known = self._find("ensemble", key) or self._make("ensemble", key, "ensemble", {}, time_ms)
        if "aliprod.result" in known.tags:
            return
        choices = {job: self._completed(choice) for job, choice in choices.items()}
        tags = {f"member.{job}": str(choice.version) for job, choice in choices.items()}
        tags |= {f"sha256.{job}": choice.sha256 for job, choice in choices.items()}
        tags |= {f"model.{job}": choice.model_id for job, choice in choices.items() if choice.source}
        tags |= {"aliprod.split": str(result["split"]), "mlflow.loggedArtifacts": _TABLE}
        self._client.log_batch(known.run_id, tags=[RunTag(name, value) for name, value in tags.items()])
        models = {choice.model_id for choice in choices.values() if choice.source}
        self._client.log_inputs(known.run_id, models=[LoggedModelInput(model_id) for model_id in sorted(models)])
        self._client.log_dict(known.run_id, _table(choices, result), "members.json")
        submission = result.get("submission")
        if submission:
            self._client.log_artifact(known.run_id, str(submission))
        points = _errors(result, time_ms)
        self._log(self._plan(), [_renamed(point, "top1_error") for point in points if point.key == "top1_error"])
        self._complete(known, points, commit.sha256(Path(submission)) if submission else key)

    def _bind(self, known: Known, versions: Sequence[Choice], records: Sequence[history.Record]) -> None:
        """Tell each model's epoch again with its id: the run stores a point once, its table of models shows it."""
        for version in versions:
            points = history.metrics(history.of_epoch(records, version.epoch))
            bound = [
                Metric(p.key, p.value, p.timestamp, p.step, version.model_id) for p in points if history.is_finite(p)
            ]
            self._client.log_batch(known.run_id, metrics=bound)

    def _completed(self, choice: Choice) -> Choice:
        """A choice made while MLflow was away, with the version it has by now."""
        if choice.version is not None:
            return choice
        version = self.registry.find(choice.name, choice.key, choice.sha256)
        if version is None:
            return choice
        number, source = int(version.version), version.source or ""
        return Choice(choice.name, number, choice.key, choice.sha256, choice.epoch, source)

    def _plan(self) -> Known:
        known = self._find("plan", self._plan_hash)
        if known is None:
            known = self._make("plan", self._plan_hash, f"{self._server.experiment} {self._plan_hash[:8]}", {}, _now())
            self._client.log_text(known.run_id, self._plan_text, "plan.toml")
        return known

    def _job(self, job: Job, records: Sequence[history.Record] = ()) -> Known:
        known = self._find("job", _key(job)) or self._make_job(job, records)
        if not known.has_params:
            settings = {"backbone": job.backbone, "network": job.network, **job.stage.model_dump(mode="json")}
            params = [Param(name, value[:PARAM_LIMIT]) for name, value in _flat(settings).items()]
            self._client.log_batch(known.run_id, params=params)
            known.has_params = True
        return known

    def _make_job(self, job: Job, records: Sequence[history.Record]) -> Known:
        began = records[0]["time_ms"] if records else _now()
        names = {"job": job.name, "backbone": job.backbone, "stage": job.stage_name}
        return self._make("job", _key(job), job.name, names, began)

    def _replace(self, job: Job, known: Known, records: Sequence[history.Record] = ()) -> Known:
        self._client.set_tag(known.run_id, "aliprod.kind", "superseded")
        del self._runs["job", _key(job)]
        return self._job(job, records)

    def _find(self, kind: str, key: str) -> Known | None:
        """The oldest run of a kind with this key: two drivers may have made two."""
        if (kind, key) not in self._runs:
            found = self._client.search_runs(
                [self._server.experiment_id],
                f"tags.`aliprod.kind` = '{kind}' and tags.`aliprod.key` = '{key}'",
                order_by=["attributes.start_time ASC", "attributes.run_id ASC"],
                max_results=1,
            )
            if found:
                self._runs[kind, key] = self._known(found[0])
        return self._runs.get((kind, key))

    def _make(self, kind: str, key: str, name: str, names: Mapping[str, str], start_ms: int) -> Known:
        tags = {"kind": kind, "key": key, "plan": self._plan_hash, **names}
        parent = {} if kind == "plan" else {"mlflow.parentRunId": self._plan().run_id}
        run = self._client.create_run(
            self._server.experiment_id, start_ms, {f"aliprod.{k}": v for k, v in tags.items()} | parent, name
        )
        self._runs[kind, key] = known = self._known(run)
        return known

    def _known(self, run: Run) -> Known:
        points = {
            (name, point.step)
            for name in run.data.metrics
            for point in self._client.get_metric_history(run.info.run_id, name)
        }
        tags = dict(run.data.tags)
        return Known(
            run.info.run_id, run.info.start_time, tags, bool(run.data.params) or "aliprod.job" not in tags, points
        )

    def _log(self, known: Known, points: Sequence[Metric]) -> None:
        """Send the points that the run lacks; what is not finite as a tag."""
        new = [point for point in points if (point.key, point.step) not in known.points]
        odd = [RunTag(f"aliprod.nonfinite.{p.key}", f"{p.value} at {p.step}") for p in new if not history.is_finite(p)]
        odd = [tag for tag in odd if known.tags.get(tag.key) != tag.value]
        finite = [point for point in new if history.is_finite(point)]
        if finite or odd:
            self._client.log_batch(known.run_id, metrics=finite, tags=odd)
        known.points |= {(point.key, point.step) for point in finite}
        known.tags |= {tag.key: tag.value for tag in odd}

    def _complete(self, known: Known, points: Sequence[Metric], result: str) -> None:
        """The last batch: MLflow writes tags after metrics, so the tag says that all is there."""
        end = max((point.timestamp for point in points), default=_now())
        self._client.log_batch(known.run_id, metrics=list(points), tags=[RunTag("aliprod.result", result)])
        known.tags["aliprod.result"] = result
        self._client.set_terminated(known.run_id, "FINISHED", end)


_TABLE = json.dumps([{"path": "members.json", "type": "table"}])  # so that the UI shows it as one


def _table(choices: Mapping[str, Choice], result: Mapping[str, Any]) -> dict[str, Any]:
    columns = ["member", "version", "epoch", "top1_error", "key", "sha256"]
    errors = {name: member.get("top1_error") for name, member in result["members"].items()}
    rows = [[job, c.version, c.epoch, errors.get(job), c.key, c.sha256] for job, c in choices.items()]
    return {"columns": columns, "data": rows}


def _errors(result: Mapping[str, Any], time_ms: int) -> list[Metric]:
    """``top1_error`` of the ensemble and ``top1_error/JOB`` of each member, where there were labels."""
    errors = {f"top1_error/{name}": member.get("top1_error") for name, member in result["members"].items()}
    errors["top1_error"] = result["top1_error"]
    return [Metric(name, error, time_ms, 0) for name, error in errors.items() if error is not None]


def _final(best: Weights, records: Sequence[history.Record]) -> list[Metric]:
    at = history.of_epoch(records, best.epoch).get("time_ms", 0)
    error = [] if best.top1_error is None else [Metric("best/top1_error", best.top1_error, at, best.epoch)]
    return [Metric("best/epoch", best.epoch, at, best.epoch), *error]


def _renamed(point: Metric, name: str) -> Metric:
    return Metric(name, point.value, point.timestamp, point.step)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """``{"lr": {"heads": 0.1}}`` becomes ``{"lr.heads": "0.1"}``; lists as JSON."""
    flat: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, str) else json.dumps(value)
    return flat


def _key(job: Job) -> str:
    return str(job.key)  # a job that runs has one: it is None only where the catalogue is not there


def _cut(text: str) -> str:
    """At most what a tag holds, cut at the end of a line."""
    text = redacted(text)
    return text if len(text) <= TAG_LIMIT else text[: TAG_LIMIT - 4].rpartition("\n")[0] + "\n..."


def _now() -> int:
    return time.time_ns() // 1_000_000

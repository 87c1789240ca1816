"""The runs of a plan in MLflow: its own and, below it, one a job and one an ensemble.

Every method blocks, may raise, and may be repeated: it looks by tag before it creates, and writes what a run lacks.
Points are sent in the order of their steps, which are epochs from 1, so a metric's latest step says which of them a run
has, whoever sent them. A run with the tag ``aliprod.result`` is complete.
"""

import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelInput, Metric, Param, Run, RunTag
from numpy.typing import NDArray
from PIL import Image

from aliprod.build.events import DONE, JobState
from aliprod.catalogue.catalogue import Catalogue
from aliprod.ensemble.guesses import guesses, read_predictions
from aliprod.errors import Failed
from aliprod.plan.jobs import Job
from aliprod.shown import redacted
from aliprod.store import commit, epochs, mirror
from aliprod.store.layout import LAST, METRICS, WEIGHTS, flat
from aliprod.store.lineage import revision
from aliprod.tracking.registry import Choice, Registry, Weights
from aliprod.tracking.server import BEST, EPOCH, STATE, Server, view_page

TAG_LIMIT = 8000  # characters; MLflow cuts the rest off without a word
PARAM_LIMIT = 6000
RESULT, ERROR, NOTE = "aliprod.result", "aliprod.error", "mlflow.note.content"
_CLASSES = 24  # that a picture of confusions has room for

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]  # of a run; KILLED: interrupted
Record = Mapping[str, Any]  # an epoch of metrics.jsonl: epoch, time_ms and metrics under their names


@dataclass(frozen=True)
class JobProgress:
    """A job as MLflow is to show it; its metrics and weights are read from its folder."""

    job: Job
    folder: Path
    state: JobState
    detail: str = ""  # why it failed


@dataclass(frozen=True)
class EnsembleResult:
    """An ensemble that has been written."""

    key: str  # of the members' bytes and of how they are added up
    choices: Mapping[str, Choice]  # one a member, by job
    result: Mapping[str, Any]  # the object `ensemble` of ``aliprod run --json``


@dataclass(frozen=True)
class PlanProgress:
    """A plan as MLflow is to show it."""

    text: str  # of its file; passwords are taken out before it is sent
    digest: str  # sha256 that its run is found by
    status: Status
    note: str  # a table of the jobs in Markdown
    jobs: tuple[JobProgress, ...] = ()
    ensemble: EnsembleResult | None = None
    catalogue: Catalogue | None = None  # that the jobs are trained on, where it is known


def status_of(plan: PlanProgress, progress: JobProgress) -> str:
    """MLflow's word for the state of a job: one that waits anew, stopped with a checkpoint, is SCHEDULED, and whatever
    has not ended when its plan does was KILLED."""
    if progress.state == "failed":
        return "FAILED"
    if progress.state in DONE:
        return "FINISHED"
    return "KILLED" if plan.status != "RUNNING" else ("RUNNING" if progress.state == "running" else "SCHEDULED")


@dataclass(frozen=True)
class Runs:
    """The runs of a plan, on a server with its experiment."""

    server: Server
    registry: Registry
    plan: PlanProgress

    def show_plan(self) -> None:
        """The plan's run with its file and its table, below which links lead to the jobs."""
        run, own = self._plan_run(), self.server.experiment_id
        if NOTE not in run.data.tags:  # it is sent after the file
            self.server.client.log_text(run.info.run_id, redacted(self.plan.text), "plan.toml")
        links = f"[Jobs side by side](#/{view_page(own)}), [their charts](#/{view_page(own, charts=True)})"
        self._write(run, tags={NOTE: f"{self.plan.note}\n\n{links}"})
        self._set_status(run, self.plan.status)

    def show_job(self, progress: JobProgress) -> None:
        """A job's run: settings, host, epochs (the error on the plan's run too, whose charts it keeps alive).

        A finished one gets its versions and aliases and, last, the tag of its result. Failed: it has no weights.
        """
        folder, records = progress.folder, epochs.read(progress.folder / METRICS)
        weights = Weights.read(folder / WEIGHTS) if progress.state in DONE else None
        if weights is None and progress.state in DONE:
            raise Failed("has no committed weights.", folder)
        run = self._job_run(progress, records, commit.digest(folder / WEIGHTS) if weights else "")
        tags = {STATE: progress.state, EPOCH: f"{len(records)}/{progress.job.stage.epochs}"}
        tags["aliprod.host"] = os.uname().nodename
        if progress.state == "failed":
            tags[ERROR] = progress.detail
        elif ERROR in run.data.tags:
            self.server.client.delete_tag(run.info.run_id, ERROR)
        points = [point for record in records for point in _metrics(record)]
        self._write(run, [*points, *_best(records)], tags)
        shared = f"top1_error/{progress.job.name}"
        errors = [Metric(shared, p.value, p.timestamp, p.step) for p in points if p.key == epochs.TOP1]
        self._write(self._plan_run(), errors)
        if weights:
            self._publish(run, progress, weights, {record["epoch"]: record for record in records})
        self._set_status(run, status_of(self.plan, progress), records[-1]["time_ms"] if weights and records else None)

    def show_ensemble(self, ensemble: EnsembleResult) -> None:
        """The run of an ensemble, which names each member's version and bytes, with its table and submission."""
        key, result = ensemble.key, ensemble.result
        run = self._find("ensemble", key) or self._create("ensemble", key, "ensemble")
        if RESULT in run.data.tags:
            return
        find = self.registry.find  # the version that a choice made while MLflow was away has by now
        choices = {job: c if c.version else find(c.name, c.key, c.sha256) or c for job, c in ensemble.choices.items()}
        models = {job: choice.model_id for job, choice in choices.items() if choice.source}
        tags = {f"member.{job}": str(choice.version) for job, choice in choices.items()}
        tags |= {f"sha256.{job}": choice.sha256 for job, choice in choices.items()}
        tags |= {f"model.{job}": model_id for job, model_id in models.items()}
        shown = json.dumps([{"path": "members.json", "type": "table"}])  # so that the UI shows it as one
        self._write(run, tags=tags | {"aliprod.split": str(result["split"]), "mlflow.loggedArtifacts": shown})
        if self.plan.catalogue and result["split"]:
            found = confusions(mirror.local(result["probabilities"]), self.plan.catalogue, result["split"])
            if found is not None:  # among the charts
                self.server.client.log_image(run.info.run_id, found, key="confusions/ensemble", step=0)
        self.server.client.log_inputs(run.info.run_id, models=[LoggedModelInput(i) for i in sorted({*models.values()})])
        errors = {name: member.get("top1_error") for name, member in result["members"].items()}
        told = {"top1_error": result["top1_error"]} | {f"top1_error/{name}": error for name, error in errors.items()}
        points = [Metric(name, float(e), run.info.start_time, 0) for name, e in told.items() if e is not None]
        columns = ["member", "version", "epoch", "top1_error", "key", "sha256"]
        rows = [[job, c.version, c.epoch + 1, errors.get(job), c.key, c.sha256] for job, c in choices.items()]
        self.server.client.log_dict(run.info.run_id, {"columns": columns, "data": rows}, "members.json")
        if submission := result.get("submission"):
            self.server.client.log_artifact(run.info.run_id, str(mirror.local(submission)))
        self._write(self._plan_run(), [point for point in points if point.key == "top1_error"])
        self._write(run, points, {RESULT: commit.sha256(mirror.local(submission)) if submission else key})
        self._set_status(run, "FINISHED")

    def _publish(self, run: Run, progress: JobProgress, best: Weights, records: Mapping[int, Record]) -> None:
        """Versions of the best and the last weights, the aliases and, last, the tag of the result."""
        job, last = progress.job, Weights.read(progress.folder / LAST)
        versions = [self.registry.publish(job, run.info.run_id, best, "best" if last else "best, last")]
        if last:
            versions.append(self.registry.publish(job, run.info.run_id, last, "last"))
        self.registry.point(job.name, versions[0])
        if RESULT in run.data.tags:
            return
        for version in versions:  # points with a model's id: the run keeps each once, its table of models shows them
            points = [point for point in _metrics(records.get(version.epoch, {})) if math.isfinite(point.value)]
            bound = [Metric(p.key, p.value, p.timestamp, p.step, version.model_id) for p in points]
            self.server.client.log_batch(run.info.run_id, metrics=bound)
        self._write(run, tags={"aliprod.best_epoch": str(best.epoch + 1), RESULT: commit.digest(best.folder)})

    def _plan_run(self) -> Run:
        digest = self.plan.digest
        return self._find("plan", digest) or self._create("plan", digest, f"{self.server.experiment} {digest[:8]}")

    def _job_run(self, progress: JobProgress, records: Sequence[Record], result: str) -> Run:
        """A job's run with its settings. One that is complete with another result (sha256 of the manifest of its
        weights, "" where there are none yet) makes way: its weights were lost."""
        job, key = progress.job, str(progress.job.key)  # a job that runs has one
        run = self._find("job", key)
        if run and progress.state != "failed" and run.data.tags.get(RESULT, result) != result:
            self.server.client.set_tag(run.info.run_id, "aliprod.kind", "superseded")
            run = None
        if run is None:
            tags = {"aliprod.job": job.name, "aliprod.backbone": job.backbone, "aliprod.stage": job.stage_name}
            run = self._create("job", key, job.name, tags, records[0]["time_ms"] if records else None)
        if not run.data.params:
            settings = {"backbone": job.backbone, "network": job.network, **job.stage.model_dump(mode="json")}
            texts = {name: one if isinstance(one, str) else json.dumps(one) for name, one in flat(settings)}
            params = [Param(name, text[:PARAM_LIMIT]) for name, text in texts.items()]
            if self.plan.catalogue:  # before the settings, which say that it is there
                self.server.client.log_inputs(run.info.run_id, [_dataset(self.plan.catalogue)])
            self.server.client.log_batch(run.info.run_id, params=params)
        return run

    def _find(self, kind: str, key: str) -> Run | None:
        """The run of a kind with this key: a complete one, else the oldest. Two drivers may have made two, or a server
        that carried out late what it had not answered: the others are deleted."""
        found = self.server.client.search_runs(
            [self.server.experiment_id],
            f"tags.`aliprod.kind` = '{kind}' and tags.`aliprod.key` = '{key}'",
            order_by=["attributes.start_time ASC", "attributes.run_id ASC"],
        )
        kept = min(found, key=lambda run: RESULT not in run.data.tags, default=None)
        for other in found:
            if other is not kept:
                self.server.client.delete_run(other.info.run_id)
        return kept

    def _create(
        self, kind: str, key: str, name: str, tags: Mapping[str, str] | None = None, start_ms: int | None = None
    ) -> Run:
        parent = {} if kind == "plan" else {"mlflow.parentRunId": self._plan_run().info.run_id}
        ours = {"aliprod.kind": kind, "aliprod.key": key, "aliprod.plan": self.plan.digest}
        source = {"mlflow.source.name": "aliprod", "mlflow.source.git.commit": revision()}
        tags = ours | dict(tags or {}) | parent | {name: value for name, value in source.items() if value}
        return self.server.client.create_run(self.server.experiment_id, start_ms, tags, name)

    def _write(self, run: Run, points: Iterable[Metric] = (), tags: Mapping[str, str] | None = None) -> None:
        """Send the points and tags that a run lacks.

        MLflow writes tags after metrics: a tag says that the points sent with it are there. It stores infinity as
        1.8e308, so a value that is not finite becomes a tag.
        """
        latest = {metric.key: metric.step for metric in run.data.to_proto().metrics}
        new = [point for point in points if point.step > latest.get(point.key, -1)]
        finite = [point for point in new if math.isfinite(point.value)]
        odd = {f"aliprod.nonfinite.{p.key}": f"{p.value} in epoch {p.step}" for p in new if not math.isfinite(p.value)}
        texts = {name: _cut(text) for name, text in (odd | dict(tags or {})).items()}
        lacking = [RunTag(name, text) for name, text in texts.items() if run.data.tags.get(name) != text]
        self.server.client.log_batch(run.info.run_id, metrics=finite, tags=lacking)

    def _set_status(self, run: Run, status: str, end_ms: int | None = None) -> None:
        """Decorate: a run's status is never the truth, as a killed driver leaves it running."""
        if run.info.status == status:
            return
        if status in ("RUNNING", "SCHEDULED"):
            self.server.client.update_run(run.info.run_id, status=status)
        else:
            self.server.client.set_terminated(run.info.run_id, status, end_ms)  # now, where it is not said


def _metrics(record: Record) -> list[Metric]:
    """The numbers of an epoch as points at its epoch, from 1, and its time, those that are not finite too."""
    return [
        Metric(name, float(value), record["time_ms"], record["epoch"] + 1)
        for name, value in record.items()
        if name not in ("epoch", "time_ms") and isinstance(value, int | float) and not isinstance(value, bool)
    ]


def _best(records: Sequence[Record]) -> list[Metric]:
    """The lowest error so far at each epoch, of weights as trained, averaged or with other norm statistics."""
    known = [(record, error) for record in records if (error := epochs.error(record)[0]) is not None]
    lowest = accumulate((error for _, error in known), min)
    return [Metric(BEST, e, r["time_ms"], r["epoch"] + 1) for e, (r, _) in zip(lowest, known, strict=True)]


def _dataset(catalogue: Catalogue) -> DatasetInput:
    """What jobs train on: a catalogue by its name and the beginning of its fingerprint; MLflow takes 36 characters."""
    counts = {images.split: len(images) for images in catalogue.splits} | {"classes": catalogue.num_classes}
    source = json.dumps({"uri": redacted(str(catalogue.root))})
    found = Dataset(catalogue.root.name, catalogue.fingerprint[:12], "local", source, profile=json.dumps(counts))
    return DatasetInput(found, [InputTag("mlflow.data.context", "training")])


def _cut(text: str) -> str:
    """At most what a tag holds, cut at the end of a line."""
    text = redacted(text)
    return text if len(text) <= TAG_LIMIT else text[: TAG_LIMIT - 4].rpartition("\n")[0] + "\n..."


def confusions(folder: Path, catalogue: Catalogue, split: str) -> Image.Image | None:
    """The confusion matrix of what a committed ensemble predicts for a split, of the classes with the most errors; None
    where no predicted image has a label."""
    known, _, truth, guess = guesses(*read_predictions(folder), catalogue, split)
    if not len(known):
        return None
    wrong = truth != guess
    errors = np.bincount(np.concatenate([truth[wrong], guess[wrong]]), minlength=catalogue.num_classes)
    shown = np.sort(np.argsort(-errors, kind="stable")[:_CLASSES])
    inside = np.isin(truth, shown) & np.isin(guess, shown)
    counts = np.zeros((len(shown), len(shown)), np.int64)
    np.add.at(counts, (np.searchsorted(shown, truth[inside]), np.searchsorted(shown, guess[inside])), 1)
    names = [catalogue.name(row) for row in shown]
    return _drawn(counts, names, f"{len(known):,} images of {split}; {len(shown)} of {catalogue.num_classes:,} classes")


def _drawn(counts: NDArray[np.int64], names: list[str], title: str) -> Image.Image:
    from matplotlib.figure import Figure  # most runs draw none until their end

    figure = Figure(figsize=(7, 6.5), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(counts / counts.sum(axis=1, keepdims=True).clip(1), cmap="Blues", vmin=0, vmax=1)
    for truth, guess in np.argwhere(counts):
        share = counts[truth, guess] / counts[truth].sum()
        colour = "white" if share > 0.5 else "black"
        axes.text(guess, truth, counts[truth, guess], ha="center", va="center", color=colour, fontsize=8)
    short = [name if len(name) <= 20 else f"{name[:19]}\N{HORIZONTAL ELLIPSIS}" for name in names]
    axes.set_xticks(range(len(short)), short, rotation=90, fontsize=8)
    axes.set_yticks(range(len(short)), short, fontsize=8)
    axes.set(xlabel="predicted", ylabel="label", title=title)
    pixels = io.BytesIO()
    figure.savefig(pixels, format="png")
    return Image.open(pixels)

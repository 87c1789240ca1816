"""A job and its folder: train, write metrics and checkpoints, commit the weights last.

Checkpoints are written by a thread, one at a time: the step that is due waits for a copy in memory, and for the write
before where that has not ended. An error of a write is raised after the next step. `aliprod.store.layout` names
the parts of the folder.

A hang ends: where a step takes too long, all stacks are printed and the process exits with status 1. A thread of C
(`faulthandler`) watches, so that code that never lets go of the interpreter is ended too, and a collective whose other
ranks are gone. Whoever started the process starts it again; the job goes on from its newest checkpoint.
"""

import faulthandler
import json
import logging
import math
import os
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist

from aliprod.catalogue.catalogue import Catalogue
from aliprod.data.training_set import training_set
from aliprod.errors import StorageFull
from aliprod.models import weights
from aliprod.models.classifier import normalisation
from aliprod.recipe import TrainingJob, never, without_training
from aliprod.recipe.options import needs
from aliprod.store import commit, epochs
from aliprod.store.layout import LAST, METRICS, PACE, RESUME, WEIGHTS, step_of
from aliprod.training import checkpoint
from aliprod.training.candidates import Candidate, blended, remembered
from aliprod.training.checkpoint import Background, TrainingState, background
from aliprod.training.learner import set_up
from aliprod.training.loop import Progress, Step, steps

_PACE_SECONDS = 10.0
_STDERR = 2  # the file itself: Python's own may have been replaced

log = logging.getLogger(__name__)


def run(job: TrainingJob, catalogue: Catalogue, stop: Callable[[], bool] = never) -> Iterator[Progress]:
    """Train a job from its newest checkpoint on, and keep its results in its folder (on rank 0).

    ``stop``, NonFiniteLoss and Refused are as of `aliprod.training.loop.steps`. StorageFull: what is finished stays;
    the same job goes on from its newest checkpoint later.
    """
    began, first = time.time(), not dist.is_initialized() or dist.get_rank() == 0
    agreed = [_found(job.folder) if first else (False, None)]
    if dist.is_initialized():
        dist.broadcast_object_list(agreed, src=0)
    [(finished, resume)] = agreed
    if finished:
        return
    if resume is not None:
        log.info("%s goes on from %s.", job.name, resume)
    with background() as writer, closing(_events(job, catalogue, resume, stop)) as events:
        results, pace = _Results(job, catalogue, writer, began), _Pace(job, step_of(resume) if resume else 0)
        for event in events:
            if isinstance(event, Progress):
                if event.state.epoch == job.stage.epochs and pace.teller.is_alive():
                    pace.teller.join()  # what it writes goes with the checkpoints
                if first:
                    results.keep(event)
                yield event
            else:
                writer.check()
                if first:
                    pace.add(event)


def _events(
    job: TrainingJob, catalogue: Catalogue, resume: Path | None, stop: Callable[[], bool]
) -> Generator[Step | Progress]:
    """The events of a training, whose steps are watched, or of a mean of weights."""
    inputs, machine = job.inputs, job.machine
    data = training_set(catalogue, job.stage, inputs)
    if not job.stage.is_trained:
        setup = set_up(job.stage, job.network, catalogue, without_training(machine), data)
        best, errors = blended(setup, inputs.soup) if inputs.soup else remembered(setup, inputs)
        state = TrainingState(epoch=job.stage.epochs, best=best)
        yield Progress(state, errors, lambda: lambda _: None, setup.learner.place, best)  # made in one go
        return
    _watch(machine.longest_seconds)
    try:
        for event in steps(set_up(job.stage, job.network, catalogue, machine, data), inputs, resume, stop):
            if isinstance(event, Step):
                _watch(machine.longest_seconds if event.last else machine.watchdog_seconds)
            yield event
    finally:
        faulthandler.cancel_dump_traceback_later()


def _watch(seconds: float) -> None:
    """What begins may take so long."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=_STDERR)


def _found(folder: Path) -> tuple[bool, Path | None]:
    """Whether the job is finished, and the checkpoint that it goes on from; cleans up."""
    commit.sweep(folder)
    commit.refresh(folder)
    if commit.read(folder / WEIGHTS) is not None:
        commit.remove(folder / RESUME)  # a killed process may have left it
        return True, None
    commit.sweep(folder / RESUME)
    return False, checkpoint.newest(folder / RESUME)


class _Results:
    """The results that rank 0 writes: lines, checkpoints (beside the training) and, at the end, weights."""

    def __init__(self, job: TrainingJob, catalogue: Catalogue, writer: Background, began: float) -> None:
        self.job, self.catalogue, self.writer, self.began = job, catalogue, writer, began
        self.reported = {record["epoch"] for record in epochs.read(job.folder / METRICS)}  # before a resume, too
        self.saved = checkpoint.last_time(job.folder / RESUME, began)

    def keep(self, progress: Progress) -> None:
        """Append the line of an epoch; save a checkpoint where it is due, or the weights after the last epoch."""
        last, place = progress.last, progress.place
        if last is not None and last.epoch not in self.reported:
            self.reported.add(last.epoch)
            now = time.time_ns() // 1_000_000  # set once and kept, so that MLflow never draws a point twice
            line = {"epoch": last.epoch, "time_ms": now, "device": place.environment()["device"]}
            _append(self.job.folder / METRICS, line | {"speed/ranks": place.world_size} | progress.metrics)
        if last is not None and progress.state.epoch == self.job.stage.epochs:
            self.writer.wait()
            self._finish(progress, last)
        elif last is None or time.time() - self.saved >= self.job.machine.save_seconds:
            target, key = checkpoint.place_of(self.job.folder / RESUME, progress.state), {"key": self.job.key}
            self.writer.start(lambda: partial(checkpoint.write, target, progress.snapshot(), key))
            self.saved = time.time()

    def _finish(self, progress: Progress, last: Candidate) -> None:
        job, best = self.job, progress.state.best or last
        if best.epoch != last.epoch:
            self._commit_weights(last, LAST, {})
        record = {
            "job": job.name,
            "key": job.key,
            "network": job.network,
            "epochs": job.stage.epochs,
            "steps": progress.state.step,
            "best_epoch": best.epoch,
            "top1_error": best.top1_error,
            "kind": best.kind,
            "stage": job.stage.model_dump(mode="json"),
            "environment": progress.place.environment(),
            "seconds": round(time.time() - self.began, 1),
        }
        self._commit_weights(best, WEIGHTS, record)
        commit.remove(job.folder / RESUME)

    def _commit_weights(self, candidate: Candidate, name: str, record: dict[str, Any]) -> None:
        job, objective = self.job, self.job.stage.objective
        asked, (resize, crop) = needs(objective.name, objective.options), job.stage.test_view
        config = weights.Config(
            job.network,
            *normalisation(job.network),
            resize=resize,
            crop=crop,
            job=job.name,
            key=job.key,
            epoch=candidate.epoch,
            top1_error=candidate.top1_error,
            kind=candidate.kind,
            **{name: getattr(asked, name) for name in weights.NEEDS},
        )
        classes = weights.Classes(tuple(self.catalogue.classes.tolist()), self.catalogue.names)
        fill = partial(weights.save, tensors=candidate.tensors, config=config, classes=classes)
        commit.write(job.folder / name, fill, record)


class _Pace:
    """How far a job is, and how fast its steps are: rank 0 tells now and then, as an epoch may take hours.

    It tells in a thread of its own: no step waits for storage that does not answer.
    """

    def __init__(self, job: TrainingJob, step: int) -> None:
        self.job, self.step = job, step
        self.steps, self.seconds, self.told = 0, 0.0, -math.inf
        self.before: float | None = None
        self.teller = Thread()

    def add(self, step: Step) -> None:
        """Count a step. It took the time since the one before, of the same epoch."""
        now = time.monotonic()
        self.step += 1
        if self.before is not None:
            self.steps, self.seconds = self.steps + 1, self.seconds + now - self.before
        self.before = None if step.last else now
        if not self.steps or now - self.told < _PACE_SECONDS or self.teller.is_alive():
            return
        pace = {
            "step": self.step,
            "images_per_second": self.steps * self.job.stage.batch_size / self.seconds,
            "ranks": dist.get_world_size() if dist.is_initialized() else 1,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "time_ms": time.time_ns() // 1_000_000,
        }
        self.teller = Thread(target=self._write, args=(json.dumps(pace),), name="pace", daemon=True)
        self.teller.start()
        self.steps, self.seconds, self.told = 0, 0.0, now

    def _write(self, text: str) -> None:
        with suppress(StorageFull):  # nothing is lost with it; a checkpoint will say so
            commit.write_file(self.job.folder / RESUME / PACE, text)


def _append(path: Path, record: dict[str, Any]) -> None:
    with commit.storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        torn = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
        with path.open("a", encoding="utf-8") as file:
            file.write(("\n" if torn else "") + json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        commit.send(path)

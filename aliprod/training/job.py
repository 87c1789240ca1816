"""A job and its folder: train, keep what must be kept, commit the weights last.

Checkpoints are written by a thread, one at a time: the step that is due waits for a copy in memory, and for the write
before where that has not ended. What a write raises is raised after the next step.

The folder ``jobs/BACKBONE/STAGE/KEY`` holds ``metrics.jsonl`` (a line an epoch), ``resume/`` (checkpoints of
a job on its way), ``last/`` (weights of the last epoch, where that is not the best) and ``weights/`` (the best),
whose commit record says that the job is finished.
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from aliprod.catalogue.catalogue import Catalogue, Integers
from aliprod.data.training_set import training_set
from aliprod.models import weights
from aliprod.models.classifier import normalisation
from aliprod.objectives import needs_of
from aliprod.recipe import Stage
from aliprod.store import commit, epochs
from aliprod.training import checkpoint, soup
from aliprod.training.background import Background
from aliprod.training.candidates import Candidate
from aliprod.training.deduplicate import kept_rows
from aliprod.training.learner import place
from aliprod.training.loop import EpochEnd, Progress, train
from aliprod.training.watchdog import Watchdog

log = logging.getLogger(__name__)
METRICS, RESUME, LAST, WEIGHTS, KEPT = epochs.FILE, "resume", "last", "weights", "kept"


@dataclass(frozen=True)
class Work:
    """All that a process needs to train a job, on whatever machine.

    Attributes:
        name, key: of the job.
        network: timm's name.
        folder: the job's, in the storage path.
        start, pretrained: weights folder of the parent; safetensors file of the backbone.
        soup: weights folders of the stages that it is a mean of.
        teachers: soft labels of its images, a folder a teacher.
        pseudo_labels, hashes: labels of test images; hashes of all training images, where duplicates are filtered.
        save_seconds: an epoch's end sooner than this after the last checkpoint goes without one.
        watchdog_seconds: a step that takes longer ends the process; None: it may take for ever.
    """

    name: str
    key: str
    network: str
    stage: Stage
    folder: Path
    start: Path | None = None
    pretrained: Path | None = None
    soup: tuple[Path, ...] = ()
    teachers: tuple[Path, ...] = ()
    pseudo_labels: Path | None = None
    hashes: Path | None = None
    save_every_steps: int | None = None
    save_seconds: float = 0.0
    threads: int = 1
    loader_processes: int = 0
    compiles: bool = False
    exact: bool = True
    watchdog_seconds: float | None = None


def run(work: Work, catalogue: Catalogue) -> Iterator[Progress]:
    """Train a job from its newest checkpoint on, and keep what it yields in its folder (on rank 0).

    Raises:
        StorageFull: what is finished stays; the same job goes on from its newest checkpoint later.
        NonFiniteLoss, Refused: as `aliprod.training.loop.train`.
    """
    began = time.time()
    finished, resume = _agreed(work.folder)
    if finished:
        return
    if resume is not None:
        log.info("%s goes on from %s.", work.name, resume)
    with Background() as writer, Watchdog(work.watchdog_seconds) as watchdog:
        kept = _Kept(work, catalogue, writer, began)
        for progress in _trained(work, catalogue, resume, writer, watchdog):
            if progress.place.rank == 0:
                kept.keep(progress)
            yield progress


def _trained(
    work: Work, catalogue: Catalogue, resume: Path | None, writer: Background, watchdog: Watchdog
) -> Iterator[Progress]:
    """What the job's stage asks for: a training, or a mean of weights."""
    data = training_set(
        catalogue,
        work.stage,
        kept=_without_duplicates(work, catalogue),
        pseudo_labels=work.pseudo_labels,
        teachers=work.teachers,
    )
    if work.soup:
        return soup.blended(work.stage, work.network, catalogue, data, work.soup, work.threads, work.loader_processes)
    return train(
        work.stage,
        work.network,
        catalogue,
        data=data,
        start=work.start,
        pretrained=work.pretrained,
        resume=resume,
        save_every_steps=work.save_every_steps,
        threads=work.threads,
        loader_processes=work.loader_processes,
        compiles=work.compiles,
        exact=work.exact,
        watchdog=watchdog,
        after_step=writer.check,
    )


def _without_duplicates(work: Work, catalogue: Catalogue) -> Integers | None:
    """The training rows that the stage's filter of duplicates leaves, found by rank 0; None without a filter."""
    if work.hashes is None or work.stage.duplicates == "keep":
        return None
    where = place(work.threads)
    rule, processes = work.stage.duplicates, work.loader_processes
    kept = partial(kept_rows, work.folder / KEPT, rule, catalogue, work.hashes, work.start, processes)
    if where.rank == 0:
        kept()
    if dist.is_initialized():
        dist.barrier()
    return kept()


def _agreed(folder: Path) -> tuple[bool, Path | None]:
    """Whether the job is finished, and the checkpoint that all ranks go on from. Rank 0 looks, and cleans up."""
    found = [_found(folder) if not dist.is_initialized() or dist.get_rank() == 0 else (False, None)]
    if dist.is_initialized():
        dist.broadcast_object_list(found, src=0)
    return found[0]


def _found(folder: Path) -> tuple[bool, Path | None]:
    commit.sweep(folder)
    if commit.read(folder / WEIGHTS) is not None:
        shutil.rmtree(folder / RESUME, ignore_errors=True)  # a killed process may have left it
        return True, None
    commit.sweep(folder / RESUME)
    return False, checkpoint.newest(folder / RESUME)


class _Kept:
    """What rank 0 keeps of a job: lines, checkpoints (written beside the training) and, at the end, weights."""

    def __init__(self, work: Work, catalogue: Catalogue, writer: Background, began: float) -> None:
        self.work, self.catalogue, self.writer, self.began = work, catalogue, writer, began
        self.told = _epochs_told(work.folder / METRICS)
        self.saved = checkpoint.last_time(work.folder / RESUME, began)

    def keep(self, progress: Progress) -> None:
        """Keep what a Progress tells."""
        end = progress.end
        if end is not None and end.last.epoch not in self.told:
            self.told.add(end.last.epoch)
            _append(self.work.folder / METRICS, _line(progress, end.last.epoch))
        if end is not None and progress.state.epoch == self.work.stage.epochs:
            self.writer.wait()
            _finish(self.work, self.catalogue, progress, end, self.began)
        elif end is None or time.time() - self.saved >= self.work.save_seconds:
            self.writer.start(partial(self._copied, progress))
            self.saved = time.time()

    def _copied(self, progress: Progress) -> Callable[[], None]:
        """Copy the resume state now; who calls the result writes it."""
        place, key = checkpoint.place_of(self.work.folder / RESUME, progress.state), self.work.key
        return partial(checkpoint.write, place, progress.snapshot(), {"key": key})


def _finish(work: Work, catalogue: Catalogue, progress: Progress, end: EpochEnd, began: float) -> None:
    if end.best.epoch != end.last.epoch:
        _commit_weights(work, catalogue, end.last, work.folder / LAST, {})
    record = {
        "job": work.name,
        "key": work.key,
        "network": work.network,
        "epochs": work.stage.epochs,
        "steps": progress.state.step,
        "best_epoch": end.best.epoch,
        "top1_error": end.best.top1_error,
        "kind": end.best.kind,
        "stage": work.stage.model_dump(mode="json"),
        "environment": progress.place.environment(),
        "seconds": round(time.time() - began, 1),
    }
    _commit_weights(work, catalogue, end.best, work.folder / WEIGHTS, record)
    shutil.rmtree(work.folder / RESUME, ignore_errors=True)


def _commit_weights(
    work: Work, catalogue: Catalogue, candidate: Candidate, folder: Path, record: dict[str, Any]
) -> None:
    mean, std, interpolation = normalisation(work.network)
    needs = needs_of(work.stage.objective.name)
    config = weights.Config(
        network=work.network,
        mean=mean,
        std=std,
        interpolation=interpolation,
        resize=work.stage.resize,
        crop=work.stage.crop,
        job=work.name,
        key=work.key,
        epoch=candidate.epoch,
        top1_error=candidate.top1_error,
        kind=candidate.kind,
        branches=needs.branches,
        unit_weights=needs.unit_weights,
    )
    classes = weights.Classes(tuple(catalogue.classes.tolist()), catalogue.names)
    fill = partial(weights.save, tensors=candidate.tensors, config=config, classes=classes)
    commit.write(folder, fill, record)


def _line(progress: Progress, epoch: int) -> dict[str, Any]:
    """One line of metrics.jsonl. Its time is set once and kept, so that MLflow never draws a point twice."""
    place = progress.place
    return {
        "epoch": epoch,
        "time_ms": time.time_ns() // 1_000_000,
        "device": place.environment()["device"],
        "speed/ranks": place.world_size,
        **progress.metrics,
    }


def _epochs_told(path: Path) -> set[int]:
    """The epochs that are in the file already: a resumed job does not tell them twice."""
    return {record["epoch"] for record in epochs.read(path)}


def _append(path: Path, record: dict[str, Any]) -> None:
    with commit.storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        torn = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
        with path.open("a", encoding="utf-8") as file:
            file.write(("\n" if torn else "") + json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())

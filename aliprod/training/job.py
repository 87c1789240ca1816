"""A job and its folder: train, keep what must be kept, commit the weights last.

The folder ``jobs/BACKBONE/STAGE/KEY`` holds ``metrics.jsonl`` (a line an epoch), ``resume/`` (checkpoints of
a job on its way), ``last/`` (weights of the last epoch, where that is not the best) and ``weights/`` (the best),
whose commit record says that the job is finished.
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from aliprod import commit, epochs
from aliprod.data.catalogue import Catalogue, Integers
from aliprod.data.loader import Feed
from aliprod.data.training_set import training_set
from aliprod.models import weights
from aliprod.models.recogniser import normalisation
from aliprod.objectives import needs_of
from aliprod.recipe import Stage
from aliprod.training import checkpoint, soup
from aliprod.training.candidates import Candidate
from aliprod.training.deduplicate import kept_rows
from aliprod.training.learner import place
from aliprod.training.loop import EpochEnd, Progress, train

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


def run(work: Work, catalogue: Catalogue) -> Iterator[Progress]:
    """Train a job from its newest checkpoint on, and keep what it yields in its folder (on rank 0).

    Raises:
        StorageFull: what is finished stays; the same job goes on from its newest checkpoint later.
        NonFiniteLoss, Refused: as `aliprod.training.loop.train`.
    """
    if commit.read(work.folder / WEIGHTS) is not None:
        return
    began = time.time()
    resume = _agreed(work.folder / RESUME)
    if resume is not None:
        log.info("%s goes on from %s.", work.name, resume)
    told = _epochs_told(work.folder / METRICS)
    for progress in _trained(work, catalogue, resume):
        if progress.place.rank == 0:
            _keep(work, catalogue, progress, told, began)
        if dist.is_initialized():
            dist.barrier()
        yield progress


def _trained(work: Work, catalogue: Catalogue, resume: Path | None) -> Iterator[Progress]:
    """What the job's stage asks for: a training, or a mean of weights."""
    if work.soup:
        return soup.blended(work.stage, work.network, catalogue, work.soup, work.threads, work.loader_processes)
    data = training_set(
        catalogue,
        work.stage,
        kept=_without_duplicates(work, catalogue),
        pseudo_labels=work.pseudo_labels,
        teachers=work.teachers,
    )
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
    )


def _without_duplicates(work: Work, catalogue: Catalogue) -> Integers | None:
    """The training rows that the stage's filter of duplicates leaves, found by rank 0; None without a filter."""
    if work.hashes is None or work.stage.duplicates == "keep":
        return None
    where = place(work.threads)
    feed = Feed(where.device, *normalisation(work.network), processes=work.loader_processes)
    kept = partial(kept_rows, work.folder / KEPT, work.stage.duplicates, catalogue, work.hashes, work.start, feed)
    if where.rank == 0:
        kept()
    if dist.is_initialized():
        dist.barrier()
    return kept()


def _agreed(folder: Path) -> Path | None:
    """The checkpoint that all ranks go on from: rank 0 looks, since it sets damaged ones aside."""
    if not dist.is_initialized():
        return checkpoint.newest(folder)
    found = [checkpoint.newest(folder) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def _keep(work: Work, catalogue: Catalogue, progress: Progress, told: set[int], began: float) -> None:
    state, end = progress.state, progress.end
    if end is not None and end.last.epoch not in told:
        told.add(end.last.epoch)
        _append(work.folder / METRICS, _line(progress, end.last.epoch))
    if end is not None and state.epoch == work.stage.epochs:
        _finish(work, catalogue, progress, end, began)
        return
    if end is not None and time.time() - checkpoint.last_time(work.folder / RESUME, began) < work.save_seconds:
        return
    commit.write(checkpoint.place_of(work.folder / RESUME, state), progress.capture, {"key": work.key})
    checkpoint.prune(work.folder / RESUME)


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
    return {"epoch": epoch, "time_ms": time.time_ns() // 1_000_000, **progress.metrics}


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

"""What is made for a job before it trains, from jobs that are finished: soft labels, pseudo labels, hashes.

Each is a Ray task of its own, named after the job that it is for, and a committed folder: made once.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aliprod.catalogue import sources
from aliprod.catalogue.catalogue import Integers
from aliprod.data import hashes, soft_labels
from aliprod.data.training_set import base_rows, write_pseudo_labels
from aliprod.ensemble.pseudo_labelling import confident
from aliprod.inference import probabilities
from aliprod.inference.predict import predicted, ready
from aliprod.orchestration import members, remote
from aliprod.orchestration.prepare import Prepared
from aliprod.orchestration.scheduler import Share
from aliprod.orchestration.steps import Step
from aliprod.recipe import PseudoLabels
from aliprod.training.job import WEIGHTS


@dataclass(frozen=True)
class Inputs:
    """Folders that a job reads, beside its parents' weights; fields as of `aliprod.training.job.Work`."""

    teachers: tuple[Path, ...]
    pseudo_labels: Path | None
    hashes: Path | None


def inputs(prepared: Prepared, name: str) -> Inputs:
    """Where a job finds its inputs. Its parents are finished: their best weights name the folders."""
    job = prepared.jobs[name]
    return Inputs(
        teachers=tuple(_soft_labels(prepared, name, teacher) for teacher in job.stage.teachers),
        pseudo_labels=prepared.job_folder(name) / "pseudo_labels" if job.stage.pseudo_labels else None,
        hashes=prepared.hashes if job.stage.duplicates != "keep" else None,
    )


def start(prepared: Prepared, step: Step) -> Any:
    """Start making an input of a job. Resolves to why it failed, or ''."""
    match step.kind:
        case "soft_labels":
            return _teach(prepared, step)
        case "pseudo_labels":
            return _label(prepared, step.job)
        case "hashes":
            return _start_hashes(prepared, step.share)
    raise ValueError(f"{step.name} makes no input of a job")


def _soft_labels(prepared: Prepared, name: str, teacher: str) -> Path:
    """A teacher's soft labels of the images of a job; shared by jobs of the same images."""
    stage = prepared.jobs[name].stage
    images = "all" if stage.duplicates != "keep" else f"{stage.images!r} {stage.seed}"  # the filter may choose any
    view = hashlib.sha256(images.encode()).hexdigest()[:8]
    sha256 = members.best_of(prepared, teacher).sha256
    return prepared.job_folder(teacher) / "soft_labels" / f"{sha256[:16]}-{view}"


def _teach(prepared: Prepared, step: Step) -> Any:
    teacher, share = step.of, step.share
    job, parent = prepared.jobs[step.job], prepared.jobs[teacher]
    rows = None if job.stage.duplicates != "keep" else base_rows(prepared.catalogue, job.stage)
    record = {"job": teacher, "key": parent.key, "weights": members.best_of(prepared, teacher).sha256}
    out = _soft_labels(prepared, step.job, teacher)
    return remote.start(
        f"{teacher} soft labels",
        share,
        out,
        _write_soft_labels,
        prepared.job_folder(teacher) / WEIGHTS,
        prepared.catalogue.root,
        rows,
        out,
        record,
        share.cpus,
        prepared.plan.cluster.loader_processes,
    )


def _label(prepared: Prepared, name: str) -> Any:
    recipe = prepared.jobs[name].stage.pseudo_labels
    if recipe is None:
        raise ValueError(f"{name} takes no pseudo labels")
    stores = [
        members.prediction(prepared, labeller, members.best_of(prepared, labeller), "test").folder
        for labeller in recipe.by
    ]
    record = {"labellers": {labeller: prepared.jobs[labeller].key for labeller in recipe.by}}
    out = prepared.job_folder(name) / "pseudo_labels"
    return remote.start(f"{name} pseudo labels", Share(1, 0), out, _write_pseudo_labels, stores, recipe, out, record)


def _start_hashes(prepared: Prepared, share: Share) -> Any:
    out = prepared.hashes
    return remote.start("hashes", share, out, _write_hashes, prepared.catalogue.root, out, share.cpus)


def _write_soft_labels(
    folder: Path,
    catalogue_path: Path,
    rows: Integers | None,
    out: Path,
    record: dict[str, Any],
    threads: int,
    processes: int,
) -> None:
    torch.set_num_threads(threads)
    train = sources.read(catalogue_path).train
    images, teacher = train if rows is None else train.take(rows), ready(folder, processes)

    def blocks(missing: Integers) -> Iterator[Tensor]:
        yield from predicted(teacher, images.take(missing), "center")

    soft_labels.write(out, images.ids, np.asarray(teacher.classes.ids), blocks, record)


def _write_pseudo_labels(stores: list[Path], recipe: PseudoLabels, out: Path, record: dict[str, Any]) -> None:
    opened = [probabilities.open_store(store) for store in stores]
    labels = confident(opened, recipe.threshold, recipe.per_class)
    write_pseudo_labels(out, labels.ids, labels.class_ids, labels.probabilities, record)


def _write_hashes(catalogue_path: Path, out: Path, processes: int) -> None:
    hashes.write(out, sources.read(catalogue_path).train, processes if processes > 1 else 0)

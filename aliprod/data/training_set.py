"""What a stage trains on: a view of the catalogue, never a copy, with what is known of each image beside its label.

Soft labels are the largest probabilities that a teacher gives each image, the rest spread evenly (Hinton 2015): a whole
row of 50,030 float16 is 100 kB, its 64 largest and their classes are 384 bytes. A committed folder of them holds

    classes.npy       (n, k) int32, columns of the class list, the surest first
    probabilities.npy (n, k) float16
    rows.parquet      image_id (string), in row order
    class_ids.npy     (K,) int64

Features are what a frozen backbone makes of one view of each image, pooled, once for all stages of it:

    features-00000.npy ...   (n, F) float16, in the catalogue's order of a split
    rows.parquet             image_id (string), in row order

float16 is off by 2**-11 of a value at most, less than bfloat16's forward pass; 2.5 million x 2048 of them are 10 GB.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from aliprod.catalogue.catalogue import Catalogue, Images, Integers
from aliprod.data import selection
from aliprod.errors import Failed, Refused
from aliprod.recipe import NO_INPUTS, Inputs, PerClass, Stage
from aliprod.store import commit
from aliprod.store.resumable import ALL, SHARD_ROWS, Part, ResumableRows, Rows, shard_file

LARGEST = 64
_ARRAYS = ("classes", "probabilities")
_ROWS, _PSEUDO_LABELS = "rows.parquet", "pseudo_labels.parquet"
_STEM = "features"
_AGAIN, _DELETE = "Run the plan again: they are made anew.", "Delete the folder and run the plan again."


@dataclass(frozen=True, eq=False)
class SoftLabels:
    """What one or more teachers think of the same images, memory-mapped."""

    num_classes: int
    stores: tuple[tuple[NDArray[np.int32], NDArray[np.float16]], ...]  # of each, classes and probabilities (n, k)
    places: tuple[Integers, ...]  # (N,) the row of each image in each

    @classmethod
    def open(cls, folders: Sequence[Path], ids: pa.StringArray, class_ids: Integers) -> "SoftLabels":
        """Open the soft labels of these images, a folder a teacher. Refused: there are none, of another class list, or
        not of all the images."""
        stores, places = [], []
        for folder in folders:
            found = pc.index_in(ids, value_set=_ids(folder, "soft labels"))
            if found.null_count or not np.array_equal(np.load(folder / "class_ids.npy"), class_ids):
                raise Refused("are soft labels of other images or classes.", folder, _DELETE)
            places.append(found.to_numpy().astype(np.int64))
            stores.append(tuple(np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS))
        return cls(len(class_ids), tuple(stores), tuple(places))

    def rows(self, rows: Integers) -> tuple[Tensor, Tensor]:
        """Classes (n, teachers, k) int64 and probabilities (n, teachers, k) float32 of some images."""
        picked = [(c[p[rows]], q[p[rows]]) for (c, q), p in zip(self.stores, self.places, strict=True)]
        classes = np.stack([classes for classes, _ in picked], axis=1).astype(np.int64)
        return torch.from_numpy(classes), torch.from_numpy(np.stack([q for _, q in picked], axis=1).astype(np.float32))


@dataclass(frozen=True, eq=False)
class Features:
    """Features of images, memory-mapped: ``rows`` (N,) of those on disk, each shard ``SHARD_ROWS`` of them."""

    shards: tuple[NDArray[np.float16], ...]
    rows: Integers

    def __len__(self) -> int:
        return len(self.rows)

    def of(self, rows: Integers) -> "Features":
        """Those of some of the images."""
        return replace(self, rows=self.rows[rows])

    def take(self, rows: Integers) -> Tensor:
        """(len(rows), F) float16, in this order."""
        shards, places = np.divmod(self.rows[rows], SHARD_ROWS)
        taken = np.empty((len(rows), self.shards[0].shape[1]), np.float16)
        for shard in np.unique(shards):
            its = shards == shard
            taken[its] = self.shards[shard][places[its]]
        return torch.from_numpy(taken)


@dataclass(frozen=True, eq=False)
class TrainingSet:
    """The images of a stage, in the catalogue's order."""

    images: Images
    weights: NDArray[np.float32] | None = None  # (N,) of each image's loss; None: 1
    teacher: SoftLabels | None = None  # what the teachers make of the same images
    features: Features | None = None  # of the same images; None: computed
    val_features: Features | None = None  # of all of val


@dataclass(frozen=True, eq=False)
class _Joined(Images):
    """Images of train, and some of test after them."""

    parts: tuple[Images, ...] = ()

    @classmethod
    def of(cls, train: Images, test: Images) -> "_Joined":
        ids = pa.concat_arrays([train.ids, pa.array([f"test/{name}" for name in test.ids.to_pylist()], pa.string())])
        paths = pa.concat_arrays([train.paths, test.paths])
        labels = np.concatenate([train.labels, test.labels])
        return cls("train", ids, labels, paths, train.root, parts=(train, test))

    def source(self, row: int) -> Path | bytes:
        first, second = self.parts
        return first.source(row) if row < len(first) else second.source(row - len(first))

    def ask(self, rows: Iterable[int]) -> None:
        (first, second), both = self.parts, list(rows)
        first.ask(row for row in both if row < len(first))
        second.ask(row - len(first) for row in both if row >= len(first))


def training_set(catalogue: Catalogue, stage: Stage, inputs: Inputs = NO_INPUTS) -> TrainingSet:
    """The images that a stage trains on. Refused: the soft labels are of other images."""
    kept = None
    if inputs.kept is not None:  # what a filter of duplicates has left
        commit.fetch(inputs.kept)
        kept = np.load(inputs.kept / "kept.npy")
    rows = base_rows(catalogue, stage, kept)
    images = catalogue.train.take(rows)
    weights = None
    if inputs.pseudo_labels is not None and stage.pseudo_labels is not None:
        sure, labels = read_pseudo_labels(inputs.pseudo_labels, catalogue)
        images = _Joined.of(images, replace(catalogue.test.take(sure), labels=labels))
        weights = np.ones(len(images), np.float32)
        weights[len(rows) :] = stage.pseudo_labels.weight
    teacher = SoftLabels.open(inputs.teachers, images.ids, catalogue.classes) if inputs.teachers else None
    features = open_features(inputs.features[0], catalogue.train).of(rows) if inputs.features else None
    val = open_features(inputs.features[1], catalogue.val) if len(inputs.features) > 1 else None
    return TrainingSet(images, weights, teacher, features, val)


def open_features(folder: Path, images: Images) -> Features:
    """Open the features of a split. Refused: there are none, or they are of other images."""
    if not _ids(folder, "features").equals(images.ids):
        raise Refused("are features of other images.", folder, _DELETE)
    count = -(-len(images) // SHARD_ROWS)
    shards = tuple(np.load(shard_file(folder / _STEM, shard), mmap_mode="r") for shard in range(count))
    return Features(shards, np.arange(len(images)))


def _ids(folder: Path, what: str) -> pa.StringArray:
    """The images of committed rows. Refused: there are none."""
    if commit.fetch(folder) is None:
        raise Refused(f"holds no finished {what}.", folder, _AGAIN)
    return pq.read_table(folder / _ROWS)["image_id"].combine_chunks()


def base_rows(catalogue: Catalogue, stage: Stage, kept: Integers | None = None) -> Integers:
    """Rows of ``catalogue.train`` that ``stage.images`` chooses, ascending; of those that are kept, where given."""
    among = np.arange(len(catalogue.train)) if kept is None else kept
    if not isinstance(stage.images, PerClass):
        return among
    images = catalogue.train if kept is None else catalogue.train.take(kept)
    return among[selection.balanced(images.labels, images.ids, catalogue.classes, stage.images.per_class, stage.seed)]


def write_pseudo_labels(
    folder: Path, ids: pa.StringArray, class_ids: Integers, probabilities: NDArray[np.float32], record: dict[str, Any]
) -> None:
    """Commit ``pseudo_labels.parquet``: each test image that a stage also trains on, with what it is taken for and how
    surely. ``record``: the labellers' jobs and keys."""
    table = pa.table({"image_id": ids, "class_id": class_ids, "probability": probabilities.astype(np.float32)})
    commit.write(folder, lambda staging: pq.write_table(table, staging / _PSEUDO_LABELS), record)


def read_pseudo_labels(folder: Path, catalogue: Catalogue) -> tuple[Integers, Integers]:
    """Rows of ``catalogue.test`` and their labels (rows of ``catalogue.classes``), both (n,). Refused: there are none,
    or they are of another catalogue."""
    if commit.fetch(folder) is None:
        raise Refused("holds no pseudo labels.", folder, _AGAIN)
    table = pq.read_table(folder / _PSEUDO_LABELS)
    rows = pc.index_in(table["image_id"], value_set=catalogue.test.ids)
    labels = pc.index_in(table["class_id"], value_set=pa.array(catalogue.classes))
    if rows.null_count or labels.null_count:
        raise Refused("are pseudo labels of another catalogue.", folder, _DELETE)
    return rows.to_numpy().astype(np.int64), labels.to_numpy().astype(np.int64)


def spread(classes: Tensor, probabilities: Tensor, num_classes: int) -> Tensor:
    """The teachers' mean distribution: each one's kept probabilities, and what is left over all its other classes.
    (n, teachers, k) of `SoftLabels.rows` -> (n, K) float32, rows sum to 1."""
    kept = classes.shape[2]
    rest = (1 - probabilities.sum(dim=2, keepdim=True)).clamp_min(0) / max(1, num_classes - kept)
    total = rest.sum(dim=1).expand(-1, num_classes).clone()
    for columns, own in zip(classes.unbind(1), (probabilities - rest).unbind(1), strict=True):
        total.scatter_add_(1, columns, own)  # a teacher at a time: no column twice, so the order of adding is one
    total = total.clamp_min(0)
    return total / total.sum(dim=1, keepdim=True)


def write_soft_labels(rows: ResumableRows, blocks: Callable[[Rows], Iterable[Tensor]], part: Part = ALL) -> None:
    """Commit a teacher's soft labels; ``blocks`` gives (m, K) probabilities, as `ResumableRows.finish` says. A shard of
    ``rows`` has a multiple of `aliprod.store.resumable.SHARD_STEP`, for the same bytes as without a stop."""
    kept = min(LARGEST, len(rows.classes))

    def largest(missing: Rows) -> Iterator[dict[str, NDArray[Any]]]:
        for block in blocks(missing):
            top = torch.topk(block, kept, dim=1)
            yield {"classes": top.indices.int().cpu().numpy(), "probabilities": top.values.half().cpu().numpy()}

    def fill(staging: Path) -> None:
        for name in _ARRAYS:
            shards = [np.load(file, mmap_mode="r") for file in rows.files(name)]
            np.save(staging / f"{name}.npy", np.concatenate(shards))
        np.save(staging / "class_ids.npy", rows.classes)
        pq.write_table(pa.table({"image_id": rows.ids}), staging / _ROWS)

    rows.finish(largest, fill, part)


def write_features(
    folder: Path, images: Images, blocks: Callable[[Rows], Iterable[Tensor]], record: dict[str, Any], part: Part = ALL
) -> None:
    """Commit features; ``blocks`` gives (m, F) of them, as `ResumableRows.finish` says. Failed: a value is not finite,
    or beyond float16; nothing is left behind."""
    rows = ResumableRows(folder, images.ids, np.empty(0, np.int64), record, SHARD_ROWS)

    def halves(missing: Rows) -> Iterator[dict[str, NDArray[np.float16]]]:
        done = 0
        for block in blocks(missing):
            half = block.half().cpu()
            if not bool((finite := half.isfinite().all(dim=1)).all()):
                bad = images.ids[int(missing[done + int((~finite).nonzero()[0])])].as_py()
                advice = 'Weights that were trained in bfloat16 may make such: say features = "computed".'
                raise Failed(f"the features of {images.split} image {bad} do not fit float16.", folder, advice)
            done += len(half)
            yield {_STEM: half.numpy()}

    def fill(staging: Path) -> dict[str, str]:
        pq.write_table(pa.table({"image_id": images.ids}), staging / _ROWS)
        return rows.link(_STEM, staging)

    rows.finish(halves, fill, part)

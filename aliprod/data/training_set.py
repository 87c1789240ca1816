"""What a stage trains on: a view of the catalogue, never a copy, with what is known of each image beside its label."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from aliprod.catalogue.catalogue import Catalogue, Images, Integers
from aliprod.data import selection
from aliprod.data.soft_labels import SoftLabels
from aliprod.errors import Refused
from aliprod.recipe import NO_INPUTS, Inputs, PerClass, PseudoLabels, Stage
from aliprod.store import commit

_PSEUDO_LABELS = "pseudo_labels.parquet"


@dataclass(frozen=True, eq=False)
class TrainingSet:
    """The images of a stage, in the catalogue's order."""

    images: Images
    weights: NDArray[np.float32] | None = None  # (N,) of each image's loss; None: 1
    teacher: SoftLabels | None = None  # what the teachers make of the same images


@dataclass(frozen=True, eq=False)
class _Joined(Images):
    """Images of two splits, one after the other."""

    parts: tuple[Images, ...] = ()

    def source(self, row: int) -> Path | bytes:
        first, second = self.parts
        return first.source(row) if row < len(first) else second.source(row - len(first))


def training_set(catalogue: Catalogue, stage: Stage, inputs: Inputs = NO_INPUTS) -> TrainingSet:
    """The images that a stage trains on. Refused: the soft labels are of other images."""
    rows = base_rows(catalogue, stage, None if inputs.kept is None else np.load(inputs.kept / "kept.npy"))
    images = catalogue.train.take(rows)
    weights = None
    if inputs.pseudo_labels is not None and stage.pseudo_labels is not None:
        images, weights = _with_pseudo_labels(images, catalogue, stage.pseudo_labels, inputs.pseudo_labels)
    teacher = SoftLabels.open(inputs.teachers, images.ids, catalogue.classes) if inputs.teachers else None
    return TrainingSet(images, weights, teacher)


def base_rows(catalogue: Catalogue, stage: Stage, kept: Integers | None = None) -> Integers:
    """Rows of ``catalogue.train`` that ``stage.images`` chooses, ascending; of those that are kept, where given."""
    among = np.arange(len(catalogue.train)) if kept is None else kept
    if not isinstance(stage.images, PerClass):
        return among
    images = catalogue.train if kept is None else catalogue.train.take(kept)
    return among[selection.balanced(images.labels, images.ids, catalogue.classes, stage.images.per_class, stage.seed)]


def _with_pseudo_labels(
    images: Images, catalogue: Catalogue, recipe: PseudoLabels, folder: Path
) -> tuple[Images, NDArray[np.float32]]:
    rows, labels = read_pseudo_labels(folder, catalogue)
    added = catalogue.test.take(rows)
    ids = pa.concat_arrays([images.ids, pa.array([f"test/{name}" for name in added.ids.to_pylist()], pa.string())])
    paths = pa.concat_arrays([images.paths, added.paths])
    both = np.concatenate([images.labels, labels])
    joined = _Joined("train", ids, both, paths, images.root, parts=(images, added))
    weights = np.ones(len(joined), np.float32)
    weights[len(images) :] = recipe.weight
    return joined, weights


def write_pseudo_labels(
    folder: Path, ids: pa.StringArray, class_ids: Integers, probabilities: NDArray[np.float32], record: dict[str, Any]
) -> None:
    """Commit ``pseudo_labels.parquet``: each test image that a stage also trains on, with what it is taken for and how
    surely. ``record``: the labellers' jobs and keys."""
    table = pa.table(
        {"image_id": ids, "class_id": class_ids, "probability": np.asarray(probabilities, dtype=np.float32)}
    )
    commit.write(folder, lambda staging: pq.write_table(table, staging / _PSEUDO_LABELS), record)


def read_pseudo_labels(folder: Path, catalogue: Catalogue) -> tuple[Integers, Integers]:
    """Rows of ``catalogue.test`` and their labels (rows of ``catalogue.classes``), both (n,). Refused: there are none,
    or they are of another catalogue."""
    if commit.read(folder) is None:
        raise Refused("holds no pseudo labels.", folder, "Run the plan again: they are made anew.")
    table = pq.read_table(folder / _PSEUDO_LABELS)
    ids = table["image_id"].combine_chunks()
    rows = pc.index_in(ids, value_set=catalogue.test.ids)
    class_ids = table["class_id"].to_numpy()
    labels = np.searchsorted(catalogue.classes, class_ids).clip(max=max(0, catalogue.num_classes - 1))
    if rows.null_count or not np.array_equal(catalogue.classes[labels], class_ids):
        raise Refused("are pseudo labels of another catalogue.", folder, "Delete the folder and run the plan again.")
    return rows.to_numpy().astype(np.int64), labels.astype(np.int64)

"""What a stage trains on: a view of the catalogue, never a copy, with what is known of each image beside its label."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from aliprod.catalogue.catalogue import Catalogue, Images, Integers
from aliprod.data import pseudo, selection
from aliprod.data.soft_labels import SoftLabels
from aliprod.recipe import PerClass, PseudoLabels, Stage


@dataclass(frozen=True, eq=False)
class TrainingSet:
    """The images of a stage, in the catalogue's order.

    Attributes:
        weights: (N,) float32, of each image's loss; None: 1.
        teacher: what the teachers make of the same images; None without teachers.
    """

    images: Images
    weights: NDArray[np.float32] | None = None
    teacher: SoftLabels | None = None


@dataclass(frozen=True, eq=False)
class _Joined(Images):
    """Images of two splits, one after the other."""

    parts: tuple[Images, ...] = ()

    def source(self, row: int) -> Path | bytes:
        first, second = self.parts
        return first.source(row) if row < len(first) else second.source(row - len(first))


def training_set(
    catalogue: Catalogue,
    stage: Stage,
    *,
    kept: Integers | None = None,
    pseudo_labels: Path | None = None,
    teachers: tuple[Path, ...] = (),
) -> TrainingSet:
    """The images that a stage trains on.

    Args:
        kept: rows of ``catalogue.train`` that the stage's filter of duplicates leaves; None: all.
        pseudo_labels: committed folder of the labels that a stage with ``pseudo_labels`` adds to its images.
        teachers: committed soft labels of the stage's base images, one folder a teacher.
    Raises:
        Refused: the soft labels are of other images.
    """
    rows = base_rows(catalogue, stage, kept)
    images = catalogue.train.take(rows)
    weights = None
    if pseudo_labels is not None and stage.pseudo_labels is not None:
        images, weights = _with_pseudo_labels(images, catalogue, stage.pseudo_labels, pseudo_labels)
    teacher = SoftLabels.open(teachers, images.ids, catalogue.classes) if teachers else None
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
    rows, labels = pseudo.read(folder, catalogue)
    added = catalogue.test.take(rows)
    ids = pa.concat_arrays([images.ids, pa.array([f"test/{name}" for name in added.ids.to_pylist()], pa.string())])
    joined = _Joined(
        "train",
        ids,
        np.concatenate([images.labels, labels]),
        pa.concat_arrays([images.paths, added.paths]),
        images.root,
        parts=(images, added),
    )
    weights = np.ones(len(joined), np.float32)
    weights[len(images) :] = recipe.weight
    return joined, weights

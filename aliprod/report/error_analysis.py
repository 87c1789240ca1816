"""Error analysis of an ensemble: which classes are confused, and how the error depends on a class's size."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow.compute as pc
import torch

from aliprod.catalogue.catalogue import Catalogue, Images, Integers
from aliprod.ensemble.add import read_predictions
from aliprod.inference.metrics import class_errors

_SIZES = 6  # groups of classes by their number of training images


@dataclass(frozen=True, eq=False)
class Scored:
    """The images of a split whose label is known; all (n,) int64.

    ``rows``: in the split. ``truth``, ``predicted``: rows of the class list.
    """

    images: Images
    rows: Integers
    truth: Integers
    predicted: Integers


@dataclass(frozen=True)
class Confusion:
    """A class that is predicted for images of another.

    Attributes:
        truth, predicted: rows of the class list.
        count, of: images so predicted, of those of the class.
        row: of one of them, in the split.
    """

    truth: int
    predicted: int
    count: int
    of: int
    row: int


@dataclass(frozen=True)
class Size:
    """The classes with ``low`` to ``high`` training images, and the mean over them of the top-1 error."""

    low: int
    high: int
    classes: int
    error: float


def scored(folder: Path, catalogue: Catalogue, split: Literal["val", "test"]) -> Scored:
    """Read the predictions of a committed ensemble, with the labels of its split.

    Raises:
        Failed: there is no ensemble in the folder.
    """
    found = read_predictions(folder)
    images: Images = getattr(catalogue, split)
    labels = catalogue.test_labels if split == "test" else images.labels
    if labels is None:
        labels = np.full(len(images), -1)
    rows = pc.index_in(images.ids, value_set=found.ids).fill_null(-1).to_numpy()
    guesses = np.append(found.predicted.numpy(), -1)[rows]
    places = np.minimum(np.searchsorted(catalogue.classes, guesses), catalogue.num_classes - 1)
    known = np.flatnonzero((labels >= 0) & (catalogue.classes[places] == guesses))
    return Scored(images, known, labels[known], places[known])


def confusions(found: Scored, most: int) -> list[Confusion]:
    """The most frequent confusions, ties by the share of their class."""
    wrong = np.flatnonzero(found.truth != found.predicted)
    pairs, first, counts = np.unique(
        np.stack([found.truth[wrong], found.predicted[wrong]], axis=1), axis=0, return_index=True, return_counts=True
    )
    of = np.bincount(found.truth)[pairs[:, 0]] if len(pairs) else counts
    ordered = np.lexsort((pairs[:, 1], pairs[:, 0], -counts / of, -counts))[:most]
    return [
        Confusion(int(pairs[n, 0]), int(pairs[n, 1]), int(counts[n]), int(of[n]), int(found.rows[wrong[first[n]]]))
        for n in ordered
    ]


def by_size(found: Scored, class_counts: Integers) -> list[Size]:
    """Classes in groups of about as many, from few training images to many; those of one size stay together."""
    if not len(found.truth):
        return []
    by_class = class_errors(torch.from_numpy(found.truth), torch.from_numpy(found.predicted), len(class_counts)).numpy()
    known = ~np.isnan(by_class)  # classes with a scored image
    errors, sizes = by_class[known], class_counts[known]
    edges = np.unique(np.quantile(sizes, np.linspace(0, 1, _SIZES + 1)[1:], method="lower"))
    groups = np.searchsorted(edges, sizes)
    return [
        Size(int(sizes[one].min()), int(sizes[one].max()), int(one.sum()), float(errors[one].mean()))
        for one in (groups == number for number in np.unique(groups))
    ]

"""What labelled images are taken for, by rows of the class list; without torch, for whoever only tells of it."""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from aliprod.catalogue.catalogue import Catalogue, Integers


class Guesses(NamedTuple):
    """The images of a split whose label is known and that are predicted, (n,) each.

    ``rows``: in the split. ``asked``: among the predictions. ``truth``, ``predicted``: rows of the class list.
    """

    rows: Integers
    asked: Integers
    truth: Integers
    predicted: Integers


def guesses(ids: pa.StringArray, predicted: Integers, catalogue: Catalogue, split: str) -> Guesses:
    """Match the predicted class ids (N,) of images with the labels of a split."""
    images, labels = getattr(catalogue, split), catalogue.labels(split)
    if labels is None:
        labels = np.full(len(images), -1)
    asked = pc.index_in(images.ids, value_set=ids).fill_null(-1).to_numpy()
    named = np.append(predicted, -1)[asked]
    places = np.minimum(np.searchsorted(catalogue.classes, named), catalogue.num_classes - 1)
    rows = np.flatnonzero((labels >= 0) & (catalogue.classes[places] == named))
    return Guesses(rows, asked[rows], labels[rows], places[rows])

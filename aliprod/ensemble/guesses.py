"""What an ensemble predicts, and takes labelled images for; without torch, for whoever only tells of it."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from aliprod.catalogue.catalogue import Catalogue, Integers
from aliprod.errors import Failed
from aliprod.store import commit
from aliprod.store.layout import PREDICTIONS

_ANEW = "Submit jobs/ensemble.py: it is added up anew."


class Predictions(NamedTuple):
    """Ids (N,) in the order of the submission, predicted class ids (N,) int64."""

    ids: pa.StringArray
    predicted: Integers


def read_predictions(folder: Path) -> Predictions:
    """Read what a committed ensemble predicts. Failed: as `read_columns`."""
    table = read_columns(folder, "image_id", "class_id")
    return Predictions(table["image_id"].combine_chunks(), table["class_id"].to_numpy())


def read_columns(folder: Path, *columns: str) -> pa.Table:
    """Columns of what a committed ensemble predicts. Failed: there is none, or it is damaged."""
    if commit.fetch(folder) is None:
        raise Failed("holds no finished ensemble.", folder, _ANEW)
    try:
        return pq.read_table(folder / PREDICTIONS, columns=list(columns))
    except (OSError, pa.ArrowException) as error:
        raise Failed(f"is damaged: {error}", folder / PREDICTIONS, f"Remove {folder}. {_ANEW}") from error


def guesses(
    ids: pa.StringArray, predicted: Integers, catalogue: Catalogue, split: str
) -> tuple[Integers, Integers, Integers, Integers]:
    """Match the predicted class ids (N,) of images with the labels of a split. Of the images whose label is known and
    that are predicted, (n,) each: their rows in the split and places among the predictions; their true and predicted
    rows of the class list."""
    images, labels = getattr(catalogue, split), catalogue.labels(split)
    if labels is None:
        labels = np.full(len(images), -1)
    asked = pc.index_in(images.ids, value_set=ids).fill_null(-1).to_numpy()
    named = np.append(predicted, -1)[asked]
    places = np.minimum(np.searchsorted(catalogue.classes, named), catalogue.num_classes - 1)
    rows = np.flatnonzero((labels >= 0) & (catalogue.classes[places] == named))
    return rows, asked[rows], labels[rows], places[rows]

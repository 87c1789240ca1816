"""Pseudo labels (Lee 2013): what members together are sure of, as labels of images that have none."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from aliprod.data.selection import surest
from aliprod.ensemble.match import match_columns, match_rows
from aliprod.inference.probabilities import Probabilities

_ROWS = 64  # at a time: 26 MB of float64 at 50,030 classes


@dataclass(frozen=True, eq=False)
class Labels:
    """Images (n,) with the class that they are taken for, and its probability."""

    ids: pa.StringArray
    class_ids: NDArray[np.int64]
    probabilities: NDArray[np.float32]


def confident(stores: Sequence[Probabilities], threshold: float, per_class: int) -> Labels:
    """The images whose mean probability reaches ``threshold``, at most ``per_class`` a class, the surest first.

    Memory does not grow with the images but for their ids.

    Args:
        stores: each member's probabilities of the same images, in any order of rows and columns.
    Raises:
        Failed: the members have other images or classes, or are damaged.
    """
    names = [store.name for store in stores]
    ids, rows = match_rows(names, [store.ids for store in stores])
    classes, columns = match_columns(names, [store.classes for store in stores])
    top, best = np.empty(len(ids)), np.empty(len(ids), dtype=np.int64)
    for low in range(0, len(ids), _ROWS):
        some = slice(low, low + _ROWS)
        blocks = (
            store.take(own[some])[:, order].astype(np.float64)
            for store, own, order in zip(stores, rows, columns, strict=True)
        )
        mean = sum(blocks, np.zeros(())) / len(stores)
        best[some] = mean.argmax(axis=1)
        top[some] = mean.max(axis=1)
    chosen = surest(top, best, threshold, per_class)
    return Labels(ids.take(pa.array(chosen)), classes[best[chosen]], top[chosen].astype(np.float32))

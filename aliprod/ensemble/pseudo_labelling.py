"""Pseudo-labelling (Lee 2013): what members together are sure of, as labels of images that have none."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from aliprod.data.selection import surest
from aliprod.ensemble.add import each_block, match
from aliprod.inference.probabilities import Probabilities

_ROWS = 64  # at a time: 13 MB of sums at 50,030 classes


@dataclass(frozen=True, eq=False)
class Labels:
    """Images (n,) with the class predicted for them, and its mean probability."""

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
    ensemble = match(stores)
    top, best = np.empty(len(ensemble.ids)), np.empty(len(ensemble.ids), dtype=np.int64)
    for block in each_block(ensemble, _ROWS):
        top[block.low : block.high] = block.values[:, 0] / len(stores)
        best[block.low : block.high] = block.columns[:, 0]
    chosen = surest(top, best, threshold, per_class)
    return Labels(ensemble.ids.take(pa.array(chosen)), ensemble.classes[best[chosen]], top[chosen].astype(np.float32))

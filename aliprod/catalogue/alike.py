"""Which pictures look alike: 64 bits that survive another size and another JPEG, and groups of near ones."""

import math
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from aliprod.catalogue.catalogue import Integers
from aliprod.store import commit

Words = NDArray[np.uint64]

_SIDE, _KEPT = 32, 8
_BITS = _KEPT * _KEPT
_BATCH = 4096  # images in float64 at a time: 32 MiB
_SORTED = 3  # bands by which a table is sorted
_FEW = 2048  # hashes


def read_hashes(folder: Path) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Of committed hashes: the bits (N, 8) of all images, and which of them could be read."""
    commit.fetch(folder)
    return np.load(folder / "bits.npy"), np.load(folder / "readable.npy")


def gray32(image: Image.Image) -> NDArray[np.uint8]:
    """What is hashed of an RGB image: (32, 32) uint8, grey, squeezed into a square, without aliasing."""
    return np.array(image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BILINEAR))


def dct_bits(gray32: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Which low frequencies, the top left 8 x 8 of the DCT-II, lie above their median: (n, 32, 32) uint8 -> (n, 64)
    uint8 of 0 and 1, row by row of the 8 x 8."""
    basis = 2 * np.cos(math.pi / _SIDE * np.outer(np.arange(_KEPT), np.arange(_SIDE) + 0.5))  # (8, 32)
    parts = (gray32[start : start + _BATCH] for start in range(0, max(len(gray32), 1), _BATCH))
    # Rounded: what is zero or equal by symmetry (a blank picture) is so in any order of summation.
    flat = np.concatenate([basis @ part.astype(np.float64) @ basis.T for part in parts]).reshape(-1, _BITS).round(6)
    middle = np.sort(flat, axis=1)[:, _BITS // 2 - 1 : _BITS // 2 + 1]
    bits: NDArray[np.uint8] = (flat > middle.mean(axis=1, keepdims=True)).astype(np.uint8)
    return bits


def groups(bits: NDArray[np.uint8], threshold: int) -> Integers:
    """Connected components of hashes (n, 64) of 0 and 1 that differ in at most ``threshold`` bits, exact: (n,) int64,
    the lowest row of each one's group.

    The bits are split into ``threshold`` + 3 bands, so that two hashes within the threshold agree on three of them at
    least, and meet in one of the tables that are sorted by three. Equal hashes count once; few are all compared with
    all. What is known to be connected is not compared again, which settles a dense crowd. Threshold 6, one core: 1 s
    for 10^5 hashes, 12 s for 10^6; 10^5 in a dense crowd, 5 flipped bits each, 5 s.
    """
    words, first, inverse = np.unique(
        np.packbits(bits, axis=1).view(">u8")[:, 0].astype(np.uint64), return_index=True, return_inverse=True
    )
    components, count = _Components(len(words)), threshold + _SORTED
    uneven = np.abs(2 * bits[first].sum(axis=0, dtype=np.int64) - len(words))
    order = _BITS - 1 - np.argsort(uneven)  # so that no band gets all the bits that are nearly constant
    bands = [sum(1 << bit for bit in order[band::count].tolist()) for band in range(count)]
    for agreeing in combinations(bands, _SORTED) if len(words) > _FEW else [()]:
        keys, known = words & np.uint64(sum(agreeing)), components.of(np.arange(len(words)))
        rows = np.lexsort((known, keys))
        at, other, stop = np.arange(len(rows)), _ends(keys[rows], known[rows]), _ends(keys[rows])
        while (alive := other < stop).any():  # each row with all behind it that are of its key, and not connected
            at, other, stop = at[alive], other[alive], stop[alive]
            one, two = rows[at], rows[other]
            close = np.bitwise_count(words[one] ^ words[two]) <= threshold
            components.connect(one[close], two[close])
            other = other + 1
    root = components.of(np.arange(len(words)))
    np.minimum.at(first, root, first.copy())
    found: Integers = first[root][inverse]
    return found


class _Components:
    """What is known to be connected: a forest over distinct hashes whose roots are their trees' lowest rows."""

    def __init__(self, count: int) -> None:
        self.parent: Integers = np.arange(count)

    def of(self, rows: Integers) -> Integers:
        """The root of each row."""
        while not np.array_equal(above := self.parent[rows], rows):
            rows = above
        return rows

    def connect(self, a: Integers, b: Integers) -> None:
        """Connect each pair (a, b), and let the rows point to their roots, so that the next way there is short."""
        while len(a):
            known = np.concatenate([a, b])
            a, b = self.of(a), self.of(b)
            apart = a != b
            a, b = a[apart], b[apart]
            np.minimum.at(self.parent, np.maximum(a, b), np.minimum(a, b))
            self.parent[known] = self.of(known)


def _ends(*columns: NDArray[np.integer]) -> Integers:
    """Of each row, where those end that follow it and are equal to it in all columns."""
    changes = np.flatnonzero(np.any([column[1:] != column[:-1] for column in columns], axis=0)) + 1
    bounds = np.append(changes, len(columns[0]))
    return np.repeat(bounds, np.diff(bounds, prepend=0))

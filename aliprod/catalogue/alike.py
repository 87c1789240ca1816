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
_CROWD = 512  # rows of a bucket from which it is split again, not compared pair by pair
_ROW_COST, _TABLE_COST = 40, 20_000  # of sorting, in comparisons of a pair (measured)


def read_hashes(folder: Path) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Of committed hashes: the bits (N, 8) of all images, and which of them could be read."""
    commit.fetch(folder)
    return np.load(folder / "bits.npy"), np.load(folder / "readable.npy")


def gray32(image: Image.Image) -> NDArray[np.uint8]:
    """What is hashed of an RGB image: (32, 32) uint8, grey, squeezed into a square, without aliasing."""
    return np.array(image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BILINEAR))


def dct_bits(gray32: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Which low frequencies, the top left 8 x 8 of the DCT-II, lie above their median.

    (n, 32, 32) uint8 -> (n, 64) uint8 of 0 and 1, row by row of the 8 x 8.
    """
    basis = 2 * np.cos(math.pi / _SIDE * np.outer(np.arange(_KEPT), np.arange(_SIDE) + 0.5))  # (8, 32)
    parts = (gray32[start : start + _BATCH] for start in range(0, max(len(gray32), 1), _BATCH))
    # Rounded: what is zero or equal by symmetry (a blank picture) is so in any order of summation.
    flat = np.concatenate([basis @ part.astype(np.float64) @ basis.T for part in parts]).reshape(-1, _BITS).round(6)
    middle = np.sort(flat, axis=1)[:, _BITS // 2 - 1 : _BITS // 2 + 1]
    bits: NDArray[np.uint8] = (flat > middle.mean(axis=1, keepdims=True)).astype(np.uint8)
    return bits


def groups(bits: NDArray[np.uint8], threshold: int) -> Integers:
    """Connected components of hashes (n, 64) of 0 and 1 that differ in at most ``threshold`` bits, exact.

    The bits are split into B bands. Two hashes within the threshold agree on all but ``threshold`` of them, so that
    they meet in at least one of the C(B, threshold) tables that are sorted by B - ``threshold`` bands. More bands
    make longer keys and more tables: the cheapest B for this many hashes is taken. Equal hashes count once. In a
    bucket that is still crowded what is known to be connected is not compared again, and the rest is split by its
    other bits. Threshold 6, one core: 1 s for 10^5 hashes, 11 s for 10^6; a dense crowd, 5 flipped bits each, 4 s.

    Returns:
        (n,) int64: the lowest row of each one's group.
    """
    words, first, inverse = np.unique(
        np.packbits(bits, axis=1).view(">u8")[:, 0].astype(np.uint64), return_index=True, return_inverse=True
    )
    components, rows = _Components(words, threshold), np.arange(len(words))
    _connect_crowd(components, rows, (1 << _BITS) - 1)
    root = components.of(rows)
    np.minimum.at(first, root, first.copy())
    found: Integers = first[root][inverse]
    return found


class _Components:
    """What is known to be connected: a forest over distinct hashes whose roots are their trees' lowest rows."""

    def __init__(self, words: Words, threshold: int) -> None:
        self.words, self.threshold = words, threshold
        self.parent: Integers = np.arange(len(words))

    def of(self, rows: Integers) -> Integers:
        """The root of each row."""
        while not np.array_equal(above := self.parent[rows], rows):
            rows = above
        return rows

    def flatten(self, rows: Integers) -> None:
        """Let each row point to its root, so that the next way there is short."""
        self.parent[rows] = self.of(rows)

    def compare(self, a: Integers, b: Integers) -> None:
        """Connect each pair (a, b) within the threshold."""
        close = np.bitwise_count(self.words[a] ^ self.words[b]) <= self.threshold
        a, b = a[close], b[close]
        while len(a):
            known = np.concatenate([a, b])
            a, b = self.of(a), self.of(b)
            apart = a != b
            a, b = a[apart], b[apart]
            np.minimum.at(self.parent, np.maximum(a, b), np.minimum(a, b))
            self.flatten(known)

    def sweep(self, rows: Integers, start: Integers, stop: Integers, at: Integers) -> None:
        """Compare ``rows[i]`` with ``rows[start]`` to ``rows[stop - 1]`` for each i of ``at``; memory as ``at``."""
        while (alive := start < stop).any():
            at, start, stop = at[alive], start[alive], stop[alive]
            self.compare(rows[at], rows[start])
            start = start + 1


def _connect_crowd(components: _Components, rows: Integers, free: int) -> None:
    """Connect rows that agree but for the bits ``free``: first a few guesses each, which settle a dense crowd."""
    step = 1
    while step < len(rows):
        components.compare(rows[:-step], rows[step:])
        step *= 2
    sizes = np.unique(components.of(rows), return_counts=True)[1]
    pairs = (len(rows) ** 2 - int((sizes**2).sum())) // 2  # not known to be connected
    if not pairs:
        return
    bits = np.uint64(1) << np.array([place for place in range(_BITS) if free >> place & 1], np.uint64)
    sample = components.words[rows[:: len(rows) // 8192 + 1]]
    ones = np.array([np.mean(sample & bit != 0) for bit in bits])
    entropy = -np.log2(ones**2 + (1 - ones) ** 2)  # of each bit, by the chance that two of the words agree on it
    num_bands = _cheapest_bands(len(rows), pairs, entropy, components.threshold)
    if num_bands == components.threshold:  # compare all pairs that are not known to be connected
        known = components.of(rows)
        order = np.argsort(known)
        others = np.searchsorted(known[order], known[order], side="right")
        components.sweep(rows[order], others, np.full(len(rows), len(rows)), np.arange(len(rows)))
    else:
        bits = bits[np.argsort(-entropy)]  # so that no band gets all the bits that are nearly constant
        _connect_tables(components, rows, [sum(bits[band::num_bands].tolist()) for band in range(num_bands)])


def _connect_tables(components: _Components, rows: Integers, bands: list[int]) -> None:
    """Compare the rows that agree on all but ``threshold`` of the bands; a table for each choice of those."""
    for agreeing in combinations(bands, len(bands) - components.threshold):
        mask = sum(agreeing)
        keys = components.words[rows] & np.uint64(mask)
        order = np.argsort(keys)
        keys, rows = keys[order], rows[order]
        starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        sizes = np.diff(starts, append=len(rows))
        few = np.flatnonzero(np.repeat((sizes > 1) & (sizes <= _CROWD), sizes))
        components.sweep(rows, few + 1, np.repeat(starts + sizes, sizes)[few], few)
        for start, size in zip(starts[sizes > _CROWD], sizes[sizes > _CROWD], strict=True):
            _connect_crowd(components, rows[start : start + size], sum(bands) - mask)
        components.flatten(rows)


def _cheapest_bands(count: int, pairs: int, entropy: NDArray[np.float64], threshold: int) -> int:
    """Into how many bands to split; ``threshold`` of them leave none to sort by: all pairs in one table."""
    bits = float(entropy.sum())

    def cost(num_bands: int) -> float:
        met = pairs / 2 ** (bits * (num_bands - threshold) / max(num_bands, 1))
        return math.comb(num_bands, threshold) * (met + _ROW_COST * count + _TABLE_COST)

    return min(range(threshold, max(len(entropy), threshold) + 1), key=cost)

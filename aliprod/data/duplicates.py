"""Which images are the same photograph, and which of them stay (methods.md, 5.6).

An image becomes 64 bits that survive another size and another JPEG; images that a chain of near hashes connects are
one group; of a group one image stays, or none where its images bear several labels. The report filtered "duplicated
labels" without saying how; the DCT hash is the field's usual one.

Reading every picture is all of the cost, so it is done once for a catalogue: a committed folder holds ``bits.npy``
(N, 8) uint8, the 64 bits of each training image, and ``readable.npy`` (N,) bool.
"""

import math
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from aliprod.catalogue.catalogue import Images, Integers
from aliprod.catalogue.decode import Unreadable, decode
from aliprod.data.loader import data_loader
from aliprod.errors import Refused
from aliprod.store import commit

Words = NDArray[np.uint64]
Rule = Literal["drop", "majority", "teacher"]

LEAST_IMAGES = 5  # of a class, whatever is wrong with them

_SIDE, _KEPT = 32, 8
_BITS = _KEPT * _KEPT
_BATCH = 4096  # images in float64 at a time: 32 MiB
_READ = 256  # pictures that a process is handed at once
_CROWD = 512  # rows of a bucket from which it is split again, not compared pair by pair
_ROW_COST, _TABLE_COST = 40, 20_000  # of sorting, in comparisons of a pair (measured)


def write_hashes(folder: Path, images: Images, processes: int) -> None:
    """Hash all images of a split with this many processes beside this one (0: this one alone)."""
    rows = [range(low, min(low + _READ, len(images))) for low in range(0, len(images), _READ)]
    loader = data_loader(partial(_grey, images), rows, processes)

    def fill(staging: Path) -> None:
        bits, readable = zip(*((dct_hash(grey), known) for grey, known in loader), strict=True)
        np.save(staging / "bits.npy", np.packbits(torch.cat(bits).numpy(), axis=1))
        np.save(staging / "readable.npy", torch.cat(readable).numpy())

    commit.write(folder, fill, {"images": len(images)})


def hashed_groups(folder: Path, count: int, threshold: int) -> Integers:
    """(N,) the lowest row of each image's group, by `groups`; an image that cannot be read is alone. Refused: there are
    no hashes, or not of ``count`` images."""
    if commit.read(folder) is None:
        raise Refused("holds no hashes of the training images.", folder, "Run the plan again: they are made anew.")
    bits, readable = np.load(folder / "bits.npy"), np.load(folder / "readable.npy")
    if len(bits) != count:
        raise Refused(f"holds hashes of {len(bits):,} images, not of {count:,}.", folder, "Delete the folder.")
    found: Integers = np.arange(count)
    rows = np.flatnonzero(readable)
    found[rows] = rows[groups(torch.from_numpy(np.unpackbits(bits[rows], axis=1)), threshold).numpy()]
    return found


def _grey(images: Images, row: int) -> tuple[Tensor, bool]:
    try:
        return gray32(decode(images.source(row))), True
    except Unreadable:
        return torch.zeros(_SIDE, _SIDE, dtype=torch.uint8), False


def gray32(image: Image.Image) -> Tensor:
    """What is hashed of an RGB image: (32, 32) uint8, grey, squeezed into a square, without aliasing."""
    small = image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(small))


def dct_hash(gray32: Tensor) -> Tensor:
    """Which low frequencies, the top left 8 x 8 of the DCT-II, lie above their median.

    (n, 32, 32) uint8 -> (n, 64) uint8 of 0 and 1, row by row of the 8 x 8.
    """
    frequency, place = torch.arange(_KEPT, dtype=torch.float64), torch.arange(_SIDE, dtype=torch.float64)
    basis = 2 * torch.cos(math.pi / _SIDE * torch.outer(frequency, place + 0.5))  # (8, 32)
    parts = [basis @ part.double() @ basis.T for part in gray32.split(_BATCH)]
    # Rounded: what is zero or equal by symmetry (a blank picture) is so in any order of summation.
    flat = torch.cat(parts).flatten(1).round(decimals=6)
    middle = flat.sort(dim=1).values[:, _BITS // 2 - 1 : _BITS // 2 + 1]
    return (flat > middle.mean(dim=1, keepdim=True)).to(torch.uint8)


def groups(hashes: Tensor, threshold: int) -> Tensor:
    """Connected components of the hashes (n, 64) of 0 and 1 that differ in at most ``threshold`` bits, exact.

    The bits are split into B bands. Two hashes within the threshold agree on all but ``threshold`` of them, so that
    they meet in at least one of the C(B, threshold) tables that are sorted by B - ``threshold`` bands. More bands
    make longer keys and more tables: the cheapest B for this many hashes is taken. Equal hashes count once. In a
    bucket that is still crowded what is known to be connected is not compared again, and the rest is split by its
    other bits. Threshold 6, one core: 1 s for 10^5 hashes, 11 s for 10^6; a dense crowd, 5 flipped bits each, 4 s.

    Returns:
        (n,) int64: the lowest row of each one's group.
    """
    packed = np.packbits(torch.as_tensor(hashes).cpu().numpy(), axis=1).view(">u8")[:, 0]
    words, first, inverse = np.unique(packed.astype(np.uint64), return_index=True, return_inverse=True)
    components, rows = _Components(words, threshold), np.arange(len(words))
    _connect_crowd(components, rows, (1 << _BITS) - 1)
    root = components.of(rows)
    np.minimum.at(first, root, first.copy())
    return torch.from_numpy(first[root][inverse])


def confirmed(groups: Integers, rows: Integers, embeddings: Tensor, cosine: float) -> Integers:
    """Groups split into those that their embeddings connect too: (n,) the lowest of ``rows`` in each one's group.

    Args:
        groups: (n,) a number for each group. rows: (n,) distinct, ascending: what a group is named after.
        embeddings: (n, C) of unit length. cosine: least of a pair.
    """
    found, order, none = rows.copy(), np.argsort(groups, kind="stable"), torch.iinfo(torch.int64).max
    if not len(rows):
        return found
    for members in np.split(order, np.flatnonzero(np.diff(groups[order])) + 1):
        near, lowest, before = embeddings[members], torch.from_numpy(rows[members]), None
        while before is None or not torch.equal(lowest, before):  # the lowest name spreads from neighbour to neighbour
            before = lowest
            far = (part @ near.T < cosine for part in near.split(_BATCH))
            names = [before.expand(len(one), -1).masked_fill(one, none).min(dim=1).values for one in far]
            lowest = torch.minimum(before, torch.cat(names))  # an image without any feature is not near itself
        found[members] = lowest.numpy()
    return found


def kept(
    groups: Integers,
    labels: Integers,
    rule: Rule,
    *,
    least_images: int = LEAST_IMAGES,
    rank: Integers | None = None,
    belief: NDArray[np.float64] | None = None,
) -> Integers:
    """The rows that stay when every group of duplicates is reduced.

    A group of one label keeps one image. Of several labels ``drop`` believes none and keeps no image; ``majority``
    keeps one image of the label that most of the group bear, ``teacher`` of the label whose images are believed most
    on average; both none where labels share the lead. No class is left with fewer than ``least_images``, or than it
    had: the first of its dropped images return, those of undisputed label before the others.

    Args:
        groups: (N,) a number for each group. labels: (N,) from 0.
        rank: (N,) distinct: which of equals stays, the lowest first; without it the row.
        belief: (N,) probability that a model gives each image's label, for ``teacher``.
    """
    place = np.arange(len(labels)) if rank is None else rank
    num_classes = labels.max(initial=0) + 1
    group = np.unique(groups, return_inverse=True)[1]
    # One entry for each label of each group:
    entries, entry, images = np.unique(group * num_classes + labels, return_inverse=True, return_counts=True)
    of_group = entries // num_classes
    alone = np.bincount(of_group)[of_group] == 1
    votes = images.astype(np.float64) if belief is None or rule == "majority" else np.bincount(entry, belief) / images
    most = np.zeros(len(entries))  # of each group
    np.maximum.at(most, of_group, votes)
    leads = votes == most[of_group]
    believed = alone if rule == "drop" else alone | (leads & (np.bincount(of_group[leads])[of_group] == 1))
    order = np.lexsort((place, entry))
    first = order[np.searchsorted(entry[order], np.arange(len(entries)))]  # of each entry
    stays = np.zeros(len(labels), bool)
    stays[first[believed]] = True
    had, has = (np.bincount(some, minlength=num_classes) for some in (labels, labels[stays]))
    missing = np.minimum(had, least_images) - has
    dropped = np.flatnonzero(~stays)
    dropped = dropped[np.lexsort((place[dropped], ~alone[entry[dropped]], labels[dropped]))]
    return_order = np.arange(len(dropped)) - np.searchsorted(labels[dropped], labels[dropped])  # within the class
    stays[dropped[return_order < missing[labels[dropped]]]] = True
    return np.flatnonzero(stays)


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

"""Validation images for a catalogue that has none: a share of every class, held out of train.

What looks alike stays on one side, whichever class it bears, so every picture is read once; which ones were held out
is kept. An image's place in the order is a function of the seed and its id alone: new images move few of the old.
"""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from aliprod.catalogue import alike
from aliprod.catalogue.catalogue import Catalogue, Images, Integers
from aliprod.catalogue.decode import Unreadable, decode
from aliprod.randomness import seed_of
from aliprod.store import commit
from aliprod.store.layout import key_of

_ALIKE = 6  # bits of 64 that may differ between two copies of a picture
_LEAST = 64  # pixels a side of what is hashed


def hold_out(catalogue: Catalogue, share: float, seed: int, kept: Path) -> Catalogue:
    """The catalogue with val: about this share of the images of each class, at least one where it has two. The same
    seed gives the same split. ``kept``: the folder with the splits that were made."""
    train = catalogue.train
    key = key_of({"version": 1, "images": _listing(train), "share": share, "seed": seed})
    folder = kept / key
    if commit.read(folder) is None:
        readable, groups = _groups(train)  # what is not stays in train, where it is named, and counts for no share
        order = [seed_of(seed, name) for name in train.ids.take(readable).to_pylist()]
        rows = readable[chosen(groups, train.labels[readable], order, share)]
        commit.write(folder, lambda staging: np.save(staging / "val.npy", rows))
    held = np.load(folder / "val.npy")
    left = np.setdiff1d(np.arange(len(train)), held)
    note = f"there is no val: {len(held):,} of {len(train):,} images are held out as val, {share:.0%} of each class."
    if not len(held):
        note = "there is no val, and nothing to hold out: no class has two pictures that can be read and differ."
    val = replace(train.take(held), split="val")
    prepared = catalogue.prepared and key_of([catalogue.prepared, key])
    return replace(catalogue, train=train.take(left), val=val, notes=(*catalogue.notes, note), prepared=prepared)


def chosen(groups: Integers, labels: Integers, order: list[int], share: float) -> Integers:
    """The rows to hold out, ascending: whole groups of copies that bear one class, up to the share of each class.
    ``groups``: (N,) a number for each. ``labels``, ``order``: (N,); the lowest comes first."""
    _, group, size = np.unique(groups, return_inverse=True, return_counts=True)
    most = np.iinfo(np.int64).max
    first, last, place = (np.full(len(size), start) for start in (most, -1, most))
    np.minimum.at(first, group, labels)
    np.maximum.at(last, group, labels)
    np.minimum.at(place, group, np.array(order, np.int64))
    images = np.bincount(labels)
    wanted = np.minimum(np.maximum(1, np.rint(share * images).astype(np.int64)), images - 1)
    left, held = wanted.copy(), np.zeros(len(size), bool)
    large = size > wanted[last]  # these come last, the smallest first: one is taken where nothing else is
    for one in np.lexsort((place, np.where(large, size, 0), large)):
        label = last[one]
        untouched = left[label] == wanted[label] > 0 and size[one] < images[label]
        if first[one] == label and (size[one] <= left[label] or (large[one] and untouched)):
            held[one] = True
            left[label] = max(0, left[label] - size[one])
    return np.flatnonzero(held[group])


def _groups(images: Images) -> tuple[Integers, Integers]:
    """The rows of what can be read, and for each a number that its copies share."""

    def grey(row: int) -> np.ndarray | None:
        try:
            return alike.gray32(decode(images.source(row), _LEAST))
        except Unreadable:
            return None

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as readers:
        greys = {row: seen for row, seen in enumerate(readers.map(grey, range(len(images)))) if seen is not None}
    rows = np.array(list(greys), np.int64)
    return rows, alike.groups(alike.dct_bits(np.stack(list(greys.values()))), _ALIKE) if greys else rows


def _listing(images: Images) -> str:
    """sha256 over ids, labels and, of files, sizes and times: what the split depends on, without reading a picture."""
    digest = hashlib.sha256("\n".join(images.ids.to_pylist()).encode() + images.labels.astype("<i8").tobytes())
    if images.store is not None:
        digest.update(images.store.fingerprint.encode())
    elif images.remote is None:
        for path in images.paths.to_pylist():
            try:
                status = (images.root / path).stat()
                digest.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
            except OSError:
                digest.update(b"none\n")
    return digest.hexdigest()

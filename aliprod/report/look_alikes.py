"""Pictures of two splits that look alike: a leak makes an error look better than it is."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from aliprod.catalogue.alike import dct_bits, gray32, read_hashes
from aliprod.catalogue.catalogue import Catalogue, Images, Integers
from aliprod.catalogue.decode import Unreadable, decode
from aliprod.errors import AliprodError
from aliprod.store import commit
from aliprod.store.layout import HASHES

_MOST_BITS = 6  # as the filter of duplicates takes it
_LOOKED = 500  # pictures of the scored split, evenly; 7 s beside 2.5 M hashes
_HASHED = 2000  # training pictures that are hashed here where no run has done so


class Pair(NamedTuple):
    """A picture and the training picture nearest to it, by their rows; ``bits``: of 64, by which they differ."""

    bits: int
    row: int
    twin: int


def look_alikes(catalogue: Catalogue, images: Images, storage: Path) -> tuple[list[Pair], int]:
    """Pairs that differ in at most 6 bits, the nearest first, and how many pictures were looked at; 0 where training
    pictures are too many to be hashed here, and no stage with `duplicates` has had them hashed."""
    folder = storage / HASHES / catalogue.fingerprint
    if commit.read(folder) is not None:
        bits, readable = read_hashes(folder)
        rows = np.flatnonzero(readable)
        words = bits[rows].view(np.uint64)[:, 0]
    elif len(catalogue.train) <= _HASHED:
        rows, words = _hashed(catalogue.train, np.arange(len(catalogue.train)))
    else:
        return [], 0
    asked = np.unique(np.linspace(0, len(images) - 1, min(len(images), _LOOKED)).round().astype(np.int64))
    looked, own = _hashed(images, asked)
    apart = (np.bitwise_count(words ^ word) for word in own) if len(words) else ()
    pairs = (Pair(int(b.min()), row, int(rows[b.argmin()])) for row, b in zip(looked.tolist(), apart, strict=False))
    return sorted(pair for pair in pairs if pair.bits <= _MOST_BITS), len(looked)


def _hashed(images: Images, rows: Integers) -> tuple[Integers, NDArray[np.uint64]]:
    """Those of the rows that can be read, and their hashes."""
    known, greys = [], []
    for row in rows.tolist():
        try:
            greys.append(gray32(decode(images.source(row))))
            known.append(row)
        except (Unreadable, AliprodError):
            continue
    bits = dct_bits(np.stack(greys)) if greys else np.empty((0, 64), np.uint8)
    return np.array(known, np.int64), np.packbits(bits, axis=1).view(np.uint64)[:, 0]

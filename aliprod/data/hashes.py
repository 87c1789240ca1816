"""The hashes of a catalogue's training images on disk: what finding duplicates starts from.

A committed folder with ``bits.npy`` (N, 8) uint8, the 64 bits of `aliprod.data.duplicates.dct_hash`, and
``readable.npy`` (N,) bool. Reading every picture is all of the cost, so it is done once for a catalogue.
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from aliprod.catalogue.catalogue import Images, Integers
from aliprod.catalogue.decode import Unreadable, decode
from aliprod.data import duplicates
from aliprod.data.loader import data_loader
from aliprod.errors import Refused
from aliprod.store import commit

_BATCH = 256


def write(folder: Path, images: Images, processes: int) -> None:
    """Hash all images of a split with this many processes beside this one (0: this one alone)."""
    rows = [range(low, min(low + _BATCH, len(images))) for low in range(0, len(images), _BATCH)]
    loader = data_loader(partial(_grey, images), rows, processes)

    def fill(staging: Path) -> None:
        bits, readable = zip(*((duplicates.dct_hash(grey), known) for grey, known in loader), strict=True)
        np.save(staging / "bits.npy", np.packbits(torch.cat(bits).numpy(), axis=1))
        np.save(staging / "readable.npy", torch.cat(readable).numpy())

    commit.write(folder, fill, {"images": len(images)})


def groups(folder: Path, count: int, threshold: int) -> Integers:
    """(N,) the lowest row of each image's group: those that hashes within ``threshold`` bits connect. An image that
    cannot be read is alone.

    Raises:
        Refused: there are no hashes, or not of ``count`` images.
    """
    if commit.read(folder) is None:
        raise Refused("holds no hashes of the training images.", folder, "Run the plan again: they are made anew.")
    bits, readable = np.load(folder / "bits.npy"), np.load(folder / "readable.npy")
    if len(bits) != count:
        raise Refused(f"holds hashes of {len(bits):,} images, not of {count:,}.", folder, "Delete the folder.")
    found: Integers = np.arange(count)
    rows = np.flatnonzero(readable)
    found[rows] = rows[duplicates.groups(torch.from_numpy(np.unpackbits(bits[rows], axis=1)), threshold).numpy()]
    return found


def _grey(images: Images, row: int) -> tuple[Tensor, bool]:
    try:
        return duplicates.gray32(decode(images.source(row))), True
    except Unreadable:
        return torch.zeros(32, 32, dtype=torch.uint8), False

"""Which images are the same photograph, and which of them stay.

Images that a chain of near hashes (`alike`) connects are one group; of a group one image stays, or none where its
images bear several labels. The report filtered "duplicated labels" without saying how; the DCT hash is the field's
usual one. Reading every picture is all of the cost, so it is done once for a catalogue: a committed folder holds
``bits.npy`` (N, 8) uint8, the 64 bits of each training image, and ``readable.npy`` (N,) bool.
"""

from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aliprod.catalogue import alike
from aliprod.catalogue.catalogue import Images, Integers
from aliprod.catalogue.decode import Unreadable, decode
from aliprod.data.loader import data_loader
from aliprod.data.selection import place_in_run
from aliprod.errors import Refused
from aliprod.store import commit

Rule = Literal["drop", "majority", "teacher"]

_BATCH = 4096  # images that are compared with all at a time
_READ = 256  # pictures that a process is handed at once


def write_hashes(folder: Path, images: Images, processes: int) -> None:
    """Hash all images of a split with this many processes beside this one (0: this one alone)."""
    rows = [range(low, min(low + _READ, len(images))) for low in range(0, len(images), _READ)]
    loader = data_loader(images, partial(_grey, images), rows, processes)

    def fill(staging: Path) -> None:
        bits, readable = zip(*((dct_hash(grey), known) for grey, known in loader), strict=True)
        np.save(staging / "bits.npy", np.packbits(torch.cat(bits).numpy(), axis=1))
        np.save(staging / "readable.npy", torch.cat(readable).numpy())

    commit.write(folder, fill, {"images": len(images)})


def hashed_groups(folder: Path, count: int, threshold: int) -> Integers:
    """(N,) the lowest row of each image's group; an unreadable one is alone. Refused: no hashes of ``count`` images."""
    if commit.read(folder) is None:
        raise Refused("holds no hashes of the training images.", folder, "Run the plan again: they are made anew.")
    bits, readable = alike.read_hashes(folder)
    if len(bits) != count:
        raise Refused(f"holds hashes of {len(bits):,} images, not of {count:,}.", folder, "Delete the folder.")
    found, rows = np.arange(count), np.flatnonzero(readable)
    found[rows] = rows[alike.groups(np.unpackbits(bits[rows], axis=1), threshold)]
    return found


def _grey(images: Images, row: int) -> tuple[Tensor, bool]:
    try:
        return torch.from_numpy(alike.gray32(decode(images.source(row)))), True
    except Unreadable:
        return torch.zeros(32, 32, dtype=torch.uint8), False


def dct_hash(gray32: Tensor) -> Tensor:
    """`alike.dct_bits`: (n, 32, 32) uint8 -> (n, 64) uint8 of 0 and 1."""
    return torch.from_numpy(alike.dct_bits(torch.as_tensor(gray32).cpu().numpy()))


def groups(hashes: Tensor, threshold: int) -> Tensor:
    """`alike.groups`: (n, 64) of 0 and 1 -> (n,) int64, the lowest row of each one's group."""
    return torch.from_numpy(alike.groups(torch.as_tensor(hashes).cpu().numpy(), threshold))


def confirmed(groups: Integers, rows: Integers, embeddings: Tensor, cosine: float) -> Integers:
    """Groups (n,) split into those that their embeddings (n, C), of unit length, connect too by ``cosine`` or more:
    (n,) the lowest of ``rows``, (n,) ascending, in each one's group."""
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
    least_images: int = 5,
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
    stays[dropped[place_in_run(labels[dropped]) < missing[labels[dropped]]]] = True
    return np.flatnonzero(stays)

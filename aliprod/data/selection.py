"""Which rows an epoch sees, and in which order: functions of seed and epoch, never of the file's order or a state.

Orders come from splitmix64 (Steele, Lea, Flood, 2014) in integers of our own, the images of a class from hashes, so
that another version of a library changes no batch. Torch is imported where it is asked for: a plan counts epochs too.
"""

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from aliprod.catalogue.catalogue import Integers
from aliprod.errors import Refused

if TYPE_CHECKING:
    from torch import Tensor


class EpochSize(NamedTuple):
    """An epoch in batches of groups, each group so many images of one class.

    Whole batches only, since a partial one disturbs the norm layers; where the images make none, all of them are one.
    """

    groups_per_batch: int  # over all shares
    steps: int


def epoch_size(class_counts: Integers, batch_size: int, group: int = 1, shares: int = 1) -> EpochSize:
    """The size of every epoch of images with these counts, (K,); a class fills its last group up with images that it
    has. ``batch_size``: images, over all shares of a step. Refused: a batch cannot be dealt to the shares in equal
    parts of whole groups, or there are too few images."""
    groups, whole = int((-(-np.asarray(class_counts) // group)).sum()), batch_size // group
    if whole < 1 or whole % shares:
        what = f"batch_size = {batch_size} cannot be dealt to {shares} shares in groups of {group} of one class."
        raise Refused(what, advice=f"Make it a multiple of {group * shares}.")
    if groups < shares:
        raise Refused(f"{groups * group} training images are too few for {shares} shares.", advice="Ask for fewer.")
    groups_per_batch = min(whole, groups - groups % shares)
    return EpochSize(groups_per_batch, groups // groups_per_batch)


def balanced(labels: Integers, ids: pa.StringArray, class_ids: Integers, per_class: int, seed: int) -> Integers:
    """At most ``per_class`` images of each class, all where there are fewer (section 1.2 of the report).

    Those with the smallest hash of (seed, class id, image id): independent of the file's order, and what a class
    keeps does not change with the other classes. Of labels (N,), rows of ``class_ids`` (K,): rows, ascending.
    """
    crowded = np.bincount(labels, minlength=len(class_ids)) > per_class
    among = np.flatnonzero(crowded[labels])
    # A row id that says its class too is taken without it: an equal image id in another class changes nothing.
    texts = (
        f"{seed}\0{class_id}\0{image_id.removeprefix(f'{class_id}/')}"
        for class_id, image_id in zip(class_ids[labels[among]], ids.take(pa.array(among)).to_pylist(), strict=True)
    )
    digests = (hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    hashes = np.frombuffer(b"".join(digests), "<u8")
    order = among[np.lexsort((hashes, labels[among]))]  # class after class, its smallest hashes first
    chosen = order[place_in_run(labels[order]) < per_class]
    return np.sort(np.concatenate([np.flatnonzero(~crowded[labels]), chosen]))


def order(count: int, seed: int, epoch: int) -> Integers:
    """The order in which an epoch sees ``count`` rows: a permutation of 0 to count - 1."""
    return np.argsort(_draws(count, "order", seed, epoch), kind="stable")


def grouped(labels: Integers, group: int, seed: int, epoch: int) -> Integers:
    """An epoch in groups of images of one class, (G, group) rows, the groups in shuffled order (LIO: 1 + positives).

    Every image is seen, and once, but for those that complete the last group of their class: where it has as
    many images as a group, other images of the class; where it has fewer, its own again and again.
    """
    shuffled = order(len(labels), seed, epoch)
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    counts = np.unique(labels, return_counts=True)[1]
    groups = -(-counts // group)
    number = place_in_run(np.repeat(np.arange(len(counts)), groups))  # of a group in its class
    places = number[:, None] * group + np.arange(group)  # (G, group)
    start, size = np.repeat(np.cumsum(counts) - counts, groups)[:, None], np.repeat(counts, groups)[:, None]
    rows: Integers = by_class[start + places % size]
    return np.take(rows, np.argsort(_draws(len(rows), "groups", seed, epoch), kind="stable"), axis=0)


def class_balanced_order(labels: Integers, seed: int, epoch: int) -> Integers:
    """(N,) rows, drawn with replacement: every class equally often (cRT; Kang et al., ICLR 2020, section 4.1)."""
    return _drawn_by_class(labels, lambda counts: np.ones(len(counts)), seed, epoch)


def reversed_order(labels: Integers, seed: int, epoch: int) -> Integers:
    """(N,) rows, drawn with replacement: P(class i) is proportional to n_max / n_i (BBN's reversed sampler; Zhou et
    al., CVPR 2020, section 4.2)."""
    return _drawn_by_class(labels, lambda counts: 1 / counts, seed, epoch)


def _drawn_by_class(
    labels: Integers, odds: Callable[[Integers], NDArray[np.float64]], seed: int, epoch: int
) -> Integers:
    """(N,) rows: first a class by its odds, then one of its images."""
    by_class = np.argsort(labels, kind="stable")
    counts = np.unique(labels, return_counts=True)[1]
    upto = np.cumsum(odds(counts))
    draws = (_draws(len(labels), name, seed, epoch) for name in ("class", "image"))
    of_class, of_image = ((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53 for bits in draws)  # in [0, 1)
    drawn = np.searchsorted(upto / upto[-1], of_class, side="right") if len(counts) else np.empty(0, np.int64)
    return np.take(by_class, (np.cumsum(counts) - counts)[drawn] + (of_image * counts[drawn]).astype(np.int64))


def pseudo_labels(probabilities: "Tensor", threshold: float, per_class: int) -> "tuple[Tensor, Tensor]":
    """The rows of (N, K) that are predicted with confidence, ascending, at most ``per_class`` of each predicted class,
    and these classes, both int64; of equals the first row and the first class."""
    import torch

    table = torch.as_tensor(probabilities).detach().cpu().numpy()
    labels = table.argmax(axis=1)
    rows = surest(table[np.arange(len(table)), labels].astype(np.float64), labels, threshold, per_class)
    return torch.from_numpy(rows), torch.from_numpy(labels[rows])


def surest(top: NDArray[np.float64], labels: Integers, threshold: float, per_class: int) -> Integers:
    """Rows, ascending, of at least ``threshold``, at most ``per_class`` of each label, of the highest ``top`` (N,)."""
    sure = np.flatnonzero(top >= threshold)
    ranked = sure[np.lexsort((-top[sure], labels[sure]))]
    return np.sort(ranked[place_in_run(labels[ranked]) < per_class])


def place_in_run(sorted_labels: Integers) -> Integers:
    """0, 1, 2, ... within each run of equal labels."""
    places = np.arange(len(sorted_labels))
    starts = np.flatnonzero(np.diff(sorted_labels, prepend=np.nan) != 0)
    return places - np.repeat(starts, np.diff(starts, append=len(sorted_labels)))


def _draws(count: int, *what: int | str) -> NDArray[np.uint64]:
    """The first numbers of splitmix64, seeded with what they are drawn for."""
    digest = hashlib.blake2b("\0".join(map(str, what)).encode(), digest_size=8).digest()
    start = np.frombuffer(digest, "<u8")[0]
    bits: NDArray[np.uint64] = start + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))

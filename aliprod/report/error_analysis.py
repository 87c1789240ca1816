"""Error analysis of an ensemble: what it confuses, which labels may be wrong, how sure it is, and of which classes; and
which pictures of two splits look alike, as a leak makes an error look better than it is.

Errors come from the five highest shares of each image, as the ensemble keeps them: no probabilities are read.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from aliprod.catalogue.alike import dct_bits, gray32, read_hashes
from aliprod.catalogue.catalogue import Catalogue, Flaw, Images, Integers
from aliprod.catalogue.decode import Unreadable, decode
from aliprod.ensemble.guesses import guesses, read_columns
from aliprod.errors import AliprodError
from aliprod.store import commit
from aliprod.store.layout import HASHES

_SIZES = 6  # groups of classes by their number of training images
_BINS = 10
_MOST_BITS = 6  # as the filter of duplicates takes it
_LOOKED = 500  # pictures of the scored split, evenly; 7 s beside 2.5 M hashes
_HASHED = 2000  # training pictures that are hashed here where no run has done so


@dataclass(frozen=True, eq=False)
class Scored:
    """The images of a split whose label is known; all (n,). ``rows``: in the split. ``truth``, ``predicted``: rows of
    the class list. ``sure``, ``own``: the share (mean probability, 0 to 1) of the predicted class and of the label,
    which is 0 where that is not among the five highest."""

    images: Images
    rows: Integers
    truth: Integers
    predicted: Integers
    sure: NDArray[np.float64]
    own: NDArray[np.float64]

    def suspects(self) -> NDArray[np.bool_]:
        """Images (n,) whose label confident learning doubts: another class has the highest share, one that is at least
        the mean share of that class over the images that bear it (Northcutt, Jiang and Chuang 2021, section 3.1)."""
        count = int(max(self.truth.max(initial=-1), self.predicted.max(initial=-1))) + 1
        images = np.bincount(self.truth, minlength=count)
        least = np.where(images > 0, np.bincount(self.truth, self.own, count) / images.clip(1), np.inf)
        doubted: NDArray[np.bool_] = (self.truth != self.predicted) & (self.sure >= least[self.predicted])
        return doubted

    def mistakes(self) -> Integers:
        """Those that are predicted wrongly (places in 0 to n - 1), the surest first."""
        wrong = np.flatnonzero(self.truth != self.predicted)
        return wrong[np.lexsort((wrong, self.own[wrong], -self.sure[wrong]))]


@dataclass(frozen=True)
class Confusion:
    """A class that is predicted for images of another, both as rows of the class list: ``count`` images of the ``of``
    that it has; ``place``: of the surest of them, among those that are scored."""

    truth: int
    predicted: int
    count: int
    of: int
    place: int


class Size(NamedTuple):
    """The classes with ``low`` to ``high`` training images, and the mean over them of the top-1 error."""

    low: int
    high: int
    classes: int
    error: float


def scored(folder: Path, catalogue: Catalogue, split: Literal["val", "test"]) -> Scored:
    """Read the predictions of a committed ensemble, with the labels of its split. Failed: there is no ensemble in the
    folder."""
    table = read_columns(folder, "image_id", "class_id", "top_classes", "shares")
    ids, guessed, *top = (column.combine_chunks() for column in table.itercolumns())
    classes, shares = (flat.flatten().to_numpy().reshape(len(ids), -1) for flat in top)
    rows, asked, truth, predicted = guesses(ids, guessed.to_numpy(), catalogue, split)
    own = (shares[asked] * (classes[asked] == catalogue.classes[truth, None])).sum(axis=1)
    return Scored(getattr(catalogue, split), rows, truth, predicted, shares[asked, 0], own)


def of_plan(folder: Path, catalogue: Catalogue, split: Literal["val", "test"]) -> Scored | None:
    """What a plan's ensemble, in the plan's folder, says of a split; None where it has not predicted it, or no label is
    known."""
    main = folder / "ensemble"
    own = main if (commit.read(main) or {}).get("split") == split else main.with_name(f"ensemble-{split}")
    try:
        found = scored(own, catalogue, split)
    except AliprodError:  # not yet made, or removed by hand
        return None
    return found if len(found.rows) else None


def doubted(folder: Path, catalogue: Catalogue) -> Iterator[Flaw]:
    """The images of val and test whose label a plan's ensemble doubts."""
    splits: tuple[Literal["val", "test"], ...] = ("val", "test")
    for split in splits:
        if (found := of_plan(folder, catalogue, split)) is None:
            continue
        for place in np.flatnonzero(found.suspects()):
            own, other = (catalogue.name(labels[place]) for labels in (found.truth, found.predicted))
            path = found.images.paths[int(found.rows[place])].as_py()
            yield Flaw(path, f"its label {own} may be wrong: the ensemble is {found.sure[place]:.0%} sure of {other}")


def confusions(found: Scored, most: int) -> list[Confusion]:
    """The most frequent confusions, ties by the share of their class."""
    wrong = found.mistakes()
    pairs, first, counts = np.unique(
        np.stack([found.truth[wrong], found.predicted[wrong]], axis=1), axis=0, return_index=True, return_counts=True
    )
    of = np.bincount(found.truth)[pairs[:, 0]] if len(pairs) else counts
    ordered = np.lexsort((pairs[:, 1], pairs[:, 0], -counts / of, -counts))[:most]
    return [
        Confusion(int(pairs[n, 0]), int(pairs[n, 1]), int(counts[n]), int(of[n]), int(wrong[first[n]])) for n in ordered
    ]


class Bin(NamedTuple):
    """Images whose share of the predicted class lies in one tenth: how many, the mean share, and how many are right."""

    images: int
    sure: float
    right: float


def reliability(found: Scored) -> tuple[list[Bin], float]:
    """Bins of equal width that have images, and the expected calibration error over them (Guo et al. 2017)."""
    places = (np.ceil(found.sure * _BINS) - 1).clip(0, _BINS - 1).astype(int)
    right = found.truth == found.predicted
    bins = [
        Bin(int(one.sum()), float(found.sure[one].mean()), float(right[one].mean()))
        for one in (places == number for number in np.unique(places))
    ]
    return bins, sum(one.images * abs(one.right - one.sure) for one in bins) / max(1, len(places))


def by_size(found: Scored, class_counts: Integers) -> list[Size]:
    """Classes in groups of about as many, from few training images to many; those of one size stay together."""
    if not len(found.truth):
        return []
    images, wrong = np.bincount(found.truth), np.bincount(found.truth, found.truth != found.predicted)
    known = np.flatnonzero(images)  # classes with a scored image
    errors, sizes = wrong[known] / images[known], class_counts[known]
    edges = np.unique(np.quantile(sizes, np.linspace(0, 1, _SIZES + 1)[1:], method="lower"))
    groups = np.searchsorted(edges, sizes)
    return [
        Size(int(sizes[one].min()), int(sizes[one].max()), int(one.sum()), float(errors[one].mean()))
        for one in (groups == number for number in np.unique(groups))
    ]


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

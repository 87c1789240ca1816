"""An annotated collection of images: its splits, its classes, and the hash that stands for them."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from aliprod.catalogue.decode import Unreadable
from aliprod.catalogue.remote_folder import RemoteFolder
from aliprod.catalogue.shards import Store
from aliprod.catalogue.tars import Tars
from aliprod.shown import escaped
from aliprod.store.mirror import size_of

_SIZES = 2_000  # of pictures of a split: seconds, where each takes a millisecond to ask for

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Flaw:
    """One thing that is wrong: with a file or, where no file is meant, with an annotation file."""

    path: str
    problem: str
    skipped: bool = False  # an image is not used because of it


@dataclass(frozen=True, eq=False)
class Images:
    """One split, a row an image."""

    split: str
    ids: pa.StringArray  # unique in the split: the image id, or ``CLASS/IMAGE_ID`` where it occurs under two classes
    labels: Integers  # (N,) rows of the catalogue's class list, -1 unknown
    paths: pa.StringArray  # below ``root``, with ``/``; of a prepared catalogue its ids
    root: Path
    store: Store | Tars | None = None  # of a prepared catalogue, or tars; None: files
    places: Integers | None = None  # the rows in the store; None: all, in order
    remote: RemoteFolder | None = None  # where the files are, if not on this machine
    links: Path | None = None  # a folder that links may lead below, beside root

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, row: int) -> Path:
        """The file of a row, links followed; it need not be there. Unreadable: a link on the way leads out."""
        base = os.path.realpath(self.root)
        target = os.path.realpath(os.path.join(base, self.paths[row].as_py()))  # noqa: PTH118 - half the time, a row
        if os.path.commonpath((base, target)) == base or (self.links and Path(target).is_relative_to(self.links)):
            return Path(target)
        raise Unreadable("is a link that leads out of the catalogue's folder (`links` names one that it may lead to)")

    def size(self, row: int) -> int:
        """Bytes of a file; -1 where it is not there, or may not be read."""
        try:
            return size_of(self.path(row))
        except Unreadable:
            return -1

    @property
    def location(self) -> str:
        """The folder of the files, for people."""
        return self.remote.uri if self.remote else str(self.root)

    def source(self, row: int) -> Path | bytes:
        """The picture of a row, as `decode` takes it: its file, or its content. It raises as `path`,
        `RemoteFolder.content`, `Store.jpeg` and `Tars.jpeg` do."""
        if self.remote:
            return self.remote.content(self.paths[row].as_py())
        if self.store is None:
            return self.path(row)
        return self.store.jpeg(row if self.places is None else int(self.places[row]))

    def ask(self, rows: Iterable[int]) -> None:
        """Say which rows are read next: what lies far away is brought side by side."""
        if self.remote:
            self.remote.ask(self.paths[row].as_py() for row in rows)
        elif isinstance(self.store, Store):
            self.store.ask(rows if self.places is None else map(int, self.places[list(rows)]))

    def chunks(self, rows: int) -> "Iterator[Images]":
        """All images in order, so many at a time."""
        for start in range(0, len(self), rows):
            yield self.take(np.arange(start, min(start + rows, len(self))))

    def take(self, rows: NDArray[np.integer]) -> "Images":
        """The images of these rows, in this order."""
        chosen: Integers = np.asarray(rows, np.int64)
        ids = self.ids.take(chosen)
        paths = ids if self.paths is self.ids else self.paths.take(chosen)
        places = None if self.store is None else chosen if self.places is None else self.places[chosen]
        return replace(self, ids=ids, labels=self.labels[chosen], paths=paths, places=places)


@dataclass(frozen=True, eq=False)
class Catalogue:
    """The images of a folder, matched with one list of classes."""

    root: Path
    classes: Integers  # (K,) class ids, ascending: those with a training image
    names: tuple[str, ...]  # one a class, "" unknown
    train: Images
    val: Images
    test: Images
    test_labels: Integers | None  # (N_test,) rows of ``classes``, -1 unknown; None without test_labels.json
    ancestor: Integers | None  # (L, K) node of every class on every level, the last the classes themselves
    problems: tuple[Flaw, ...]  # rows that were left out; whether files can be read is another question (check.py)
    notes: tuple[str, ...] = ()  # what was taken for granted in reading it, for people
    prepared: str = ""  # the fingerprint of a prepared catalogue, which covers the checksums of its shards

    @property
    def splits(self) -> tuple[Images, Images, Images]:
        """Train, val and test."""
        return self.train, self.val, self.test

    def name(self, label: int) -> str:
        """A class for people: its name, else its number."""
        return self.names[label] or str(self.classes[label])

    def labels(self, split: str) -> Integers | None:
        """(N,) rows of ``classes`` of the images of a split, -1 unknown; None: those of test, which nobody knows."""
        return self.test_labels if split == "test" else getattr(self, split).labels

    @property
    def remarks(self) -> Iterator[str]:
        """What a person should know before it is used: what was taken for granted, and what is not used."""
        yield from self.notes
        if skipped := [flaw for flaw in self.problems if flaw.skipped]:
            first = escaped(f"{skipped[0].path}: {skipped[0].problem}")
            yield f"{first} ({len(skipped):,} such in all are not used: `aliprod data check` names them)"

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def class_counts(self) -> Integers:
        """(K,) int64: training images of each class."""
        return np.bincount(self.train.labels, minlength=self.num_classes).astype(np.int64)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over `annotation` and the checksums of a prepared catalogue's shards, or the sizes of pictures: of
        `_SIZES` of each split, evenly spread, since a catalogue may have millions, far away. No paths."""
        if self.prepared:
            return self.prepared
        digest = hashlib.sha256(self.annotation.encode())
        for images in self.splits:
            order = pc.sort_indices(images.ids).to_numpy()
            some = order[:: max(1, -(-len(order) // _SIZES))]
            sizes = np.array([] if images.store else [images.size(int(row)) for row in some], np.int64)
            digest.update(images.store.fingerprint.encode() if images.store else _little(sizes))
        return digest.hexdigest()

    @cached_property
    def annotation(self) -> str:
        """sha256 over the class list and, in any order, the ids and class ids of every split; nothing of pictures."""
        digest = hashlib.sha256(_little(self.classes))
        for images in self.splits:
            order = pc.sort_indices(images.ids)
            ids = images.ids.take(order)
            known = np.append(self.classes, -1)[images.labels]  # label -1 is class -1
            digest.update(f"{images.split} {len(images)}".encode())
            digest.update(_little(pc.binary_length(ids).to_numpy()))
            digest.update("".join(ids.to_pylist()).encode())
            digest.update(_little(known[order.to_numpy()]))
        return digest.hexdigest()

    @cached_property
    def tree_fingerprint(self) -> str:
        """sha256 over the ancestors of the classes, for what depends on them (the hierarchy objective); '' without."""
        if self.ancestor is None:
            return ""
        return hashlib.sha256(_little(self.classes) + _little(self.ancestor)).hexdigest()


def _little(numbers: NDArray[np.integer]) -> bytes:
    return numbers.astype("<i8").tobytes()

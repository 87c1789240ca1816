"""What is wrong with a catalogue: every image is read once, and every fault is named."""

import hashlib
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from aliprod.catalogue.catalogue import Catalogue, Flaw, Images, Integers
from aliprod.catalogue.decode import Unreadable, animated, content_of, decode
from aliprod.catalogue.identity import printable
from aliprod.catalogue.sources import ENDINGS, read
from aliprod.errors import Failed, listing
from aliprod.ingest.processes import pool

_CHUNK = 64  # images that a process is handed at once


@dataclass(frozen=True)
class Report:
    """``images`` of the catalogue (all splits), how many of them can be read, and what is wrong with it."""

    images: int
    readable: int
    problems: tuple[Flaw, ...]
    classes: int

    def as_json(self) -> dict[str, Any]:
        """For ``aliprod data check --json``."""
        problems = [{"path": problem.path, "problem": problem.problem} for problem in self.problems]
        return asdict(self) | {"problems": problems}


@dataclass(frozen=True)
class _Look:
    """What reading one file has shown."""

    fault: str
    digest: bytes = b""
    animated: bool = False


@dataclass(frozen=True)
class _Row:
    path: str
    split: str
    label: int


def check(path: Path, processes: int) -> Report:
    """Read every image of a catalogue.

    Args:
        processes: that read side by side; each holds one picture.
    Raises:
        Refused: as `sources.read`.
        Failed: a process died of a picture; the sentence names those it was reading.
    """
    catalogue = read(path)
    rows = list(_rows(catalogue))
    looks = list(_look_at_all(catalogue, processes))
    return Report(
        images=len(rows),
        readable=sum(not look.fault for look in looks),
        classes=catalogue.num_classes,
        problems=(
            *catalogue.problems,
            *_faults(rows, looks),
            *_twins(rows, looks),
            *_empty_classes(catalogue, looks),
            *not_listed(catalogue),
        ),
    )


def _rows(catalogue: Catalogue) -> Iterator[_Row]:
    for images in (catalogue.train, catalogue.val, catalogue.test):
        for path, label in zip(images.paths.to_pylist(), images.labels.tolist(), strict=True):
            yield _Row(path, images.split, label)


def _look_at_all(catalogue: Catalogue, processes: int) -> Iterator[_Look]:
    """In order; never more chunks in flight than the processes need."""
    splits = (catalogue.train, catalogue.val, catalogue.test)
    chunks = (
        images.take(np.arange(start, min(start + _CHUNK, len(images))))
        for images in splits
        for start in range(0, len(images), _CHUNK)
    )
    if processes <= 1 or sum(map(len, splits)) <= _CHUNK:
        for chunk in chunks:
            yield from _look_at(chunk)
        return
    ahead: deque[tuple[Images, Future[list[_Look]]]] = deque()  # a chunk, and what will come of it
    try:
        with pool(processes) as readers:
            while True:
                for chunk in islice(chunks, 2 * processes - len(ahead)):
                    ahead.append((chunk, readers.submit(_look_at, chunk)))
                if not ahead:
                    return
                yield from readers.result(ahead[0][1])
                ahead.popleft()
    except BrokenProcessPool as error:
        raise Failed(
            "A process died while it read pictures.",
            f"{ahead[0][0].root / ahead[0][0].paths[0].as_py()} and the pictures after it" if ahead else catalogue.root,
            "Was it out of memory? Try fewer processes, or take out the picture that kills it.",
        ) from error


def _look_at(images: Images) -> list[_Look]:
    return [_look(images, row) for row in range(len(images))]


def _look(images: Images, row: int) -> _Look:
    try:
        content = content_of(images.source(row))
        decode(content)
    except Unreadable as unreadable:
        return _Look(str(unreadable))
    return _Look("", hashlib.blake2b(content, digest_size=16).digest(), animated(content))


def _faults(rows: list[_Row], looks: list[_Look]) -> Iterator[Flaw]:
    for row, look in zip(rows, looks, strict=True):
        if look.fault:
            instead = "predicted from what can be seen of it, else from grey" if row.split == "test" else "skipped"
            yield Flaw(row.path, printable(f"{look.fault}: {instead}"))
        elif look.animated:
            yield Flaw(row.path, "is animated: its first frame is the picture")


def _twins(rows: list[_Row], looks: list[_Look]) -> Iterator[Flaw]:
    """Byte-equal pictures: each is named with one other, the most harmful kind of twin first."""
    read = np.flatnonzero([not look.fault for look in looks])
    halves = np.frombuffer(b"".join(looks[row].digest for row in read), "<u8").reshape(-1, 2)
    order = np.lexsort((halves[:, 0], halves[:, 1]))
    changes = np.flatnonzero((halves[order][1:] != halves[order][:-1]).any(axis=1)) + 1
    for group in np.split(read[order], changes):
        if len(group) > 1:
            yield from _twins_among([rows[row] for row in sorted(group)])


def _twins_among(group: list[_Row]) -> Iterator[Flaw]:
    of_split = {row.split: row for row in reversed(group)}  # the first of each
    of_label = {row.label: row for row in reversed(group)}
    for row in group:
        elsewhere = next((other for split, other in of_split.items() if split != row.split), None)
        relabelled = next((other for label, other in of_label.items() if label != row.label), None)
        if elsewhere:
            twin, harm = elsewhere, f"a leak between {row.split} and {elsewhere.split}"
        elif relabelled:
            twin, harm = relabelled, "one picture, two labels"
        else:
            twin, harm = (group[1] if row is group[0] else group[0]), "the same picture twice"
        more = f" and {len(group) - 2:,} more" if len(group) > 2 else ""
        yield Flaw(row.path, f"has the bytes of {twin.path}{more}: {harm}")


def _empty_classes(catalogue: Catalogue, looks: list[_Look]) -> Iterator[Flaw]:
    readable = np.array([not look.fault for look in looks[: len(catalogue.train)]], bool)
    counts = np.bincount(catalogue.train.labels[readable], minlength=catalogue.num_classes)
    empty: Integers = catalogue.classes[counts == 0]
    if len(empty):
        yield Flaw("train", f"no image of {len(empty):,} classes can be read: {listing(map(str, empty.tolist()))}")


def not_listed(catalogue: Catalogue) -> Iterator[Flaw]:
    """Pictures beside the listed ones, counted for each folder of the top; a refused row counts as listed."""
    if catalogue.prepared:
        return
    paths = {path for images in (catalogue.train, catalogue.val, catalogue.test) for path in images.paths.to_pylist()}
    refused = {problem.path.rpartition("/")[2] for problem in catalogue.problems}
    for top in sorted({path.partition("/")[0] for path in paths if "/" in path}):
        found = [path for path in _pictures(catalogue.root, top) if path not in paths]
        extra = [path for path in found if path.rpartition("/")[2] not in refused]
        if extra:
            files = "1 picture is" if len(extra) == 1 else f"{len(extra):,} pictures are"
            yield Flaw(top, printable(f"{files} not listed and not used: {listing(extra, 5)}"))


def _pictures(root: Path, top: str) -> Iterable[str]:
    if not (root / top).resolve().is_relative_to(root):
        return
    for folder, _, names in os.walk(root / top):  # follows no links
        relative = Path(folder).relative_to(root).as_posix()
        yield from sorted(f"{relative}/{name}" for name in names if name.lower().endswith(ENDINGS))

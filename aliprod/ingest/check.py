"""What is wrong with a catalogue: every image is read once, and every fault is named."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from PIL.Image import Image

from aliprod.catalogue.annotations import PICTURE_SUFFIXES, printable
from aliprod.catalogue.catalogue import Catalogue, Flaw, Images
from aliprod.catalogue.decode import Unreadable, animated, content_of, decode
from aliprod.catalogue.sources import read
from aliprod.errors import listing
from aliprod.processes import pool

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
        return vars(self) | {"problems": [{"path": flaw.path, "problem": flaw.problem} for flaw in self.problems]}


class _Look(NamedTuple):
    """A row, and what reading its file has shown. ``digest``: of the bytes of a readable file, else empty."""

    path: str
    split: str
    label: int
    flaw: Flaw | None
    digest: bytes


def check(path: Path, processes: int) -> Report:
    """Read every image of a catalogue with so many processes, each of which holds one picture.

    Raises:
        Refused: as `sources.read`. Failed: a process died of a picture; it names those that it was reading.
    """
    catalogue = read(path)
    chunks = (chunk for images in catalogue.splits for chunk in images.chunks(_CHUNK))
    with pool(processes if sum(map(len, catalogue.splits)) > _CHUNK else 1) as readers:
        advice = "Try fewer processes, or take out the picture that kills it."
        looks = list(chain.from_iterable(readers.ordered_map(_looks, chunks, first_picture, advice)))
    readable = np.array([bool(look.digest) for look in looks], bool)
    labels = catalogue.train.labels[readable[: len(catalogue.train)]]
    empty = np.setdiff1d(np.arange(catalogue.num_classes), labels)
    names = listing(map(str, catalogue.classes[empty].tolist()))
    return Report(
        images=len(looks),
        readable=int(readable.sum()),
        classes=catalogue.num_classes,
        problems=(
            *catalogue.problems,
            *filter(None, (look.flaw for look in looks)),
            *_twins([look for look in looks if look.digest]),
            *([Flaw("train", f"no image of {len(empty):,} classes can be read: {names}")] if len(empty) else ()),
            *not_listed(catalogue),
        ),
    )


def first_picture(images: Images) -> str:
    """What is named when a process died of one of the images."""
    return f"{images.location}/{images.paths[0].as_py()} and the pictures after it"


def _looks(images: Images) -> list[_Look]:
    looks = []
    for row in range(len(images)):
        content, image, flaw = judged(images, row)
        digest = hashlib.blake2b(content, digest_size=16).digest() if image else b""
        looks.append(_Look(images.paths[row].as_py(), images.split, int(images.labels[row]), flaw, digest))
    return looks


def judged(images: Images, row: int) -> tuple[bytes, Image | None, Flaw | None]:
    """The file of a row, the picture in it unless it is unreadable, and what is wrong with it."""
    content, path = b"", images.paths[row].as_py()
    try:
        content = content_of(images.source(row))
        image = decode(content)
    except Unreadable as unreadable:
        skipped = images.split != "test"  # a test row is in the submission whatever its picture
        instead = "skipped" if skipped else "predicted from what can be seen of it, else from grey"
        return content, None, Flaw(path, printable(f"{unreadable}: {instead}"), skipped)
    flaw = Flaw(path, "is animated: its first frame is the picture") if animated(content) else None
    return content, image, flaw


def _twins(looks: list[_Look]) -> Iterator[Flaw]:
    """Byte-equal pictures: each is named with one other, the most harmful kind of twin first."""
    codes = np.asarray(pa.array((look.digest for look in looks), pa.binary()).dictionary_encode().indices)
    groups: dict[int, list[_Look]] = defaultdict(list)
    for row in np.flatnonzero(np.bincount(codes)[codes] > 1):
        groups[codes[row]].append(looks[row])
    for group in groups.values():
        yield from _twins_among(group)


def _twins_among(group: list[_Look]) -> Iterator[Flaw]:
    of_split = {look.split: look for look in reversed(group)}  # the first of each
    of_label = {look.label: look for look in reversed(group)}
    for look in group:
        elsewhere = next((other for split, other in of_split.items() if split != look.split), None)
        relabelled = next((other for label, other in of_label.items() if label != look.label), None)
        if elsewhere:
            twin, harm = elsewhere, f"a leak between {look.split} and {elsewhere.split}"
        elif relabelled:
            twin, harm = relabelled, "one picture, two labels"
        else:
            twin, harm = (group[1] if look is group[0] else group[0]), "the same picture twice"
        more = f" and {len(group) - 2:,} more" if len(group) > 2 else ""
        yield Flaw(look.path, f"has the bytes of {twin.path}{more}: {harm}")


def not_listed(catalogue: Catalogue) -> Iterator[Flaw]:
    """Pictures beside the listed ones, counted for each folder of the top; a refused row counts as listed."""
    if catalogue.prepared:
        return
    paths = {path for images in catalogue.splits for path in images.paths.to_pylist()}
    refused = {flaw.path.rpartition("/")[2] for flaw in catalogue.problems}
    for top in sorted({path.partition("/")[0] for path in paths if "/" in path}):
        found = (path for path in _pictures(catalogue.root, top) if path not in paths)
        extra = [path for path in found if path.rpartition("/")[2] not in refused]
        if extra:
            files = "1 picture is" if len(extra) == 1 else f"{len(extra):,} pictures are"
            yield Flaw(top, printable(f"{files} not listed and not used: {listing(extra, 5)}"))


def _pictures(root: Path, top: str) -> Iterator[str]:
    if (root / top).resolve().is_relative_to(root):
        for folder, _, names in os.walk(root / top):  # follows no links
            relative = Path(folder).relative_to(root).as_posix()
            yield from sorted(f"{relative}/{name}" for name in names if name.lower().endswith(PICTURE_SUFFIXES))

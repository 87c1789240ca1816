"""What is wrong with a catalogue: every image is read once, and every fault is named."""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL.Image import Image

from aliprod.catalogue.catalogue import Catalogue, Flaw, Images, Integers
from aliprod.catalogue.decode import Unreadable, animated, content_of, decode
from aliprod.catalogue.folders import pictures_below
from aliprod.catalogue.sources import PLAIN, Reading, read
from aliprod.errors import listing
from aliprod.processes import ordered_map
from aliprod.shown import escaped

_CHUNK = 64  # images that a process is handed at once
_GROUPS = MappingProxyType({"LIO": 4})  # images of one class that stand side by side in a batch: one and its positives


@dataclass(frozen=True)
class Report:
    """Images of the catalogue and of each split, how many of them can be read, and what is wrong with it."""

    images: int
    readable: int
    problems: tuple[Flaw, ...]
    classes: int
    train: int
    val: int
    test: int
    notes: tuple[str, ...]  # what was taken for granted, which is nothing wrong

    def as_json(self) -> dict[str, Any]:
        """For ``aliprod data check --json``."""
        return vars(self) | {"problems": [{"path": flaw.path, "problem": flaw.problem} for flaw in self.problems]}


class _Look(NamedTuple):
    """A row, and what reading its file has shown."""

    path: str
    split: str
    label: int
    flaw: Flaw | None
    digest: bytes  # of a readable file, else empty


def check(path: Path, processes: int, reading: Reading = PLAIN, groups: Mapping[str, int] = _GROUPS) -> Report:
    """Read every image of a catalogue with so many processes, each of which holds one picture. ``groups``: what shows
    several images of a class side by side, and how many. Refused: as `sources.read`. Failed: a process died of a
    picture; it names those that it was reading."""
    catalogue = read(path, reading)
    chunks = (chunk for images in catalogue.splits for chunk in images.chunks(_CHUNK))
    processes = processes if sum(map(len, catalogue.splits)) > _CHUNK else 1
    advice = "Try fewer processes, or take out the picture that kills it."
    looks = list(chain.from_iterable(ordered_map(_looks, chunks, processes, first_picture, advice)))
    readable = np.array([bool(look.digest) for look in looks], bool)
    return Report(
        images=len(looks),
        readable=int(readable.sum()),
        classes=catalogue.num_classes,
        train=len(catalogue.train),
        val=len(catalogue.val),
        test=len(catalogue.test),
        notes=(*catalogue.notes, *_small(catalogue, groups)),
        problems=(
            *catalogue.problems,
            *filter(None, (look.flaw for look in looks)),
            *_twins([look for look in looks if look.digest]),
            *_without(catalogue, readable),
            *not_listed(catalogue),
        ),
    )


def _without(catalogue: Catalogue, readable: NDArray[np.bool_]) -> Iterator[Flaw]:
    """Classes without an image that can be read, in train or in val."""
    start = 0
    for images in (catalogue.train, catalogue.val):
        seen = images.labels[readable[start : start + len(images)]]
        start += len(images)
        lacking = np.setdiff1d(np.arange(catalogue.num_classes), seen)
        if len(images) and len(lacking):
            counted = "1 class" if len(lacking) == 1 else f"{len(lacking):,} classes"
            yield Flaw(images.split, f"no image of {counted} can be read: {_listed(catalogue, lacking)}")


def _small(catalogue: Catalogue, groups: Mapping[str, int]) -> Iterator[str]:
    """Fewer classes, or images of one, than some training needs."""
    if catalogue.num_classes == 1:
        yield f"there is one class, {_listed(catalogue, np.arange(1))}: nothing to tell apart."
    for what, size in groups.items():
        if len(few := np.flatnonzero(catalogue.class_counts < size)):
            yield f"{what} shows {size} images of a class side by side: too few of {_listed(catalogue, few)}."


def _listed(catalogue: Catalogue, labels: Integers) -> str:
    return listing(escaped(catalogue.name(label)) for label in labels.tolist())


def first_picture(images: Images) -> str:
    """What is named when a process died of one of the images."""
    return f"{images.location}/{images.paths[0].as_py()} and the pictures after it"


def _looks(images: Images) -> list[_Look]:
    looks = []
    for row, path in enumerate(images.paths.to_pylist()):
        content, image, flaw = judged(images, row)
        digest = hashlib.blake2b(content, digest_size=16).digest() if image else b""
        looks.append(_Look(path, images.split, int(images.labels[row]), flaw, digest))
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
        return content, None, Flaw(path, escaped(f"{unreadable}: {instead}"), skipped)
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
    """A leak is told once, of an image that is not trained on; else each picture with its twin."""
    of_split = {look.split: look for look in reversed(group)}  # the first of each
    of_label = {look.label: look for look in reversed(group)}
    more = f" and {len(group) - 2:,} more" if len(group) > 2 else ""
    if len(of_split) > 1:
        twin, look, *_ = (of_split[split] for split in ("train", "val", "test") if split in of_split)
        yield Flaw(look.path, f"has the bytes of {twin.path}{more}: a leak between {look.split} and {twin.split}")
        return
    for look in group:
        relabelled = next((other for label, other in of_label.items() if label != look.label), None)
        twin = relabelled or (group[1] if look is group[0] else group[0])
        harm = "one picture, two labels" if relabelled else "the same picture twice"
        yield Flaw(look.path, f"has the bytes of {twin.path}{more}: {harm}")


def not_listed(catalogue: Catalogue) -> Iterator[Flaw]:
    """Pictures beside the listed ones, counted for each folder of the top; a refused row counts as listed."""
    if catalogue.prepared:
        return
    paths = {path for images in catalogue.splits for path in images.paths.to_pylist()}
    refused = {flaw.path.rpartition("/")[2] for flaw in catalogue.problems}
    for top in sorted({path.partition("/")[0] for path in paths if "/" in path} - {""}):  # "": of absolute ones
        found = (path for path in pictures_below(catalogue.root, top) if path not in paths)
        if extra := [path for path in found if path.rpartition("/")[2] not in refused]:
            files = "1 picture is" if len(extra) == 1 else f"{len(extra):,} pictures are"
            yield Flaw(top, escaped(f"{files} not listed and not used: {listing(extra, 5)}"))

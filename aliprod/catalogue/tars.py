"""Pictures in tars, as WebDataset writes them: the members of one key together, ``KEY.jpg`` beside ``KEY.cls``.

A tar is scanned once, header by header; a picture is then read where it lies. Compressed ones have no such places.
"""

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from aliprod.catalogue.annotations import PICTURE_SUFFIXES, tidy
from aliprod.catalogue.decode import MOST_BYTES, Unreadable
from aliprod.errors import Refused

_LABELS = ("cls", "json", "txt")  # of a picture in a tar: the first that is there
_KEYS = ("label", "class", "cls", "class_id", "category")  # of a label in JSON
_MOST_LABEL = 2**20  # bytes of one


@dataclass(frozen=True, eq=False)
class Tars:
    """Where the pictures of tars lie: of each the tar, the first byte, and how many there are."""

    root: Path
    names: tuple[str, ...]
    tar: NDArray[np.int64]
    start: NDArray[np.int64]
    size: NDArray[np.int64]

    def jpeg(self, place: int) -> bytes:
        """The file of a picture, whatever its format. Unreadable: it is cut short, or far too large."""
        size = int(self.size[place])
        if size > MOST_BYTES:
            raise Unreadable(f"has {size:,} bytes; more than {MOST_BYTES:,} are refused")
        try:
            with (self.root / self.names[self.tar[place]]).open("rb") as file:
                content = os.pread(file.fileno(), size, int(self.start[place]))
        except OSError as error:
            raise Unreadable(f"cannot be read from its tar: {error.strerror}") from error
        if len(content) != size:
            raise Unreadable("is cut short: its tar ends before it")
        return content

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the places."""
        return hashlib.sha256(np.stack([self.tar, self.start, self.size]).astype("<i8").tobytes()).hexdigest()


class Member(NamedTuple):
    """A picture in a tar, and its class as it is written; "" unknown."""

    name: str
    start: int
    size: int
    written: str


def members(path: Path) -> Iterator[Member]:
    """The pictures of a tar, in order. Refused: it is none, is compressed, or breaks off."""
    key, picture, labels = "", list[tarfile.TarInfo](), dict[str, str]()
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                stem, _, kind = name.partition(".")
                if (here := f"{folder}/{stem}") != key:
                    yield from _pictures(picture, labels)
                    key, picture, labels = here, [], {}
                if not member.isreg() or member.issparse():
                    continue
                if kind.lower() in _LABELS and member.size <= _MOST_LABEL and (file := tar.extractfile(member)):
                    labels[kind.lower()] = _label(kind.lower(), file.read())
                elif name.lower().endswith(PICTURE_SUFFIXES):
                    picture.append(member)
            yield from _pictures(picture, labels)
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        advice = "Unpack it, or write it again without compression: pictures are read from the middle of it."
        raise Refused(f"is no tar that can be read: {str(error) or 'it breaks off'}.", path, advice) from error


def _pictures(found: list[tarfile.TarInfo], labels: dict[str, str]) -> list[Member]:
    written = next((labels[kind] for kind in _LABELS if labels.get(kind)), "")
    return [Member(tidy(member.name), member.offset_data, member.size, written) for member in found]


def _label(kind: str, content: bytes) -> str:
    """A class as text: "" where it is none."""
    text = content.decode("utf-8", "replace").strip()
    if kind != "json":
        return text
    try:
        says = json.loads(text)
    except (ValueError, RecursionError):
        return ""
    label = next((says[key] for key in _KEYS if key in says), "") if isinstance(says, dict) else ""
    return str(label) if isinstance(label, (str, int)) else ""

"""What is to be classified: pictures, folders and tables of them, on this machine or elsewhere.

Processes that read them import this and no network.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from aliprod.catalogue import tables
from aliprod.catalogue.annotations import PICTURE_SUFFIXES, UNREAD_SUFFIXES
from aliprod.catalogue.decode import Unreadable, decode
from aliprod.catalogue.remote_folder import RemoteFolder, folder_at
from aliprod.data.augment import square
from aliprod.errors import Refused, listing
from aliprod.processes import Ahead

Size = tuple[int, str]  # the side to which a picture is squared, in pixels, and the interpolation
Squares = Mapping[Size, np.ndarray]  # a picture at each size that is asked for: (3, side, side) uint8


class Picture(NamedTuple):
    """A picture by its name in a folder; in "" it is a path of its own."""

    folder: str | RemoteFolder
    name: str

    @property
    def shown(self) -> str:
        """Its path in answers: as it was given, or as its table writes it."""
        return f"{self.folder.uri}/{self.name}" if isinstance(self.folder, RemoteFolder) else self.name

    def source(self) -> Path | bytes:
        """As `decode` takes it. It raises as `RemoteFolder.content` does."""
        if isinstance(self.folder, RemoteFolder):
            return self.folder.content(self.name)
        return Path(self.folder, os.path.expanduser(self.name))  # noqa: PTH111 - Path's raises where there is no home


def listed(inputs: Sequence[str]) -> list[Picture]:
    """The pictures that are given: a folder's by path, a table's in its order. Refused: there is none; a table cannot
    be read, or a place is not there."""
    found = [picture for given in inputs for picture in _below(given)]
    if not found:
        raise Refused("holds no picture.", listing(inputs), f"Pictures are {listing(PICTURE_SUFFIXES)}.")
    return found


def read(sizes: set[Size], pictures: Sequence[Picture]) -> list[Squares | str]:
    """Each picture at these sizes, or why it cannot be read. Those of buckets are read side by side."""
    found, ahead = list[Squares | str](), Ahead(Picture.source)
    ahead.ask(picture for picture in pictures if isinstance(picture.folder, RemoteFolder))
    for picture in pictures:
        try:
            found.append(squares(sizes, ahead.take(picture)))
        except Unreadable as reason:
            found.append(str(reason))
    return found


def squares(sizes: set[Size], source: Path | bytes) -> Squares:
    """A picture at each of these sizes. Unreadable: as `decode`."""
    image = decode(source)
    return {size: square(image, *size).numpy() for size in sizes}


def _below(given: str) -> Iterator[Picture]:
    if "://" in given and given.lower().endswith(PICTURE_SUFFIXES):
        yield _elsewhere(given)
        return
    place = folder_at(given)
    if isinstance(place, RemoteFolder):
        yield from (Picture(place, name) for name in place.files() if _is_picture(name))
    elif (path := place.expanduser()).is_dir():
        files = (os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names)  # noqa: PTH118
        yield from (Picture("", file) for file in sorted(files) if _is_picture(file))
    elif path.suffix.lower() in tables.TABLES and path.is_file():
        base = str(path.parent)
        yield from (_elsewhere(name) if "://" in name else Picture(base, name) for name in tables.paths(path))
    else:
        yield Picture("", str(path))


def _is_picture(path: str) -> bool:
    """Whether a file is to be asked about: of HEIC it is said why it is not read; .NAME is a system's."""
    return path.lower().endswith((*PICTURE_SUFFIXES, *UNREAD_SUFFIXES)) and path.rpartition("/")[2][0] != "."


def _elsewhere(uri: str) -> Picture:
    """A picture at a URI. Refused: as `folder_at`."""
    folder, _, name = uri.rpartition("/")
    place = folder_at(folder)
    return Picture(place if isinstance(place, RemoteFolder) else str(place), name)

"""A place that pyarrow reaches by URI: S3 or what speaks it, with ``endpoint_override=HOST:PORT`` in the query.

Pictures are read from it one by one, and a prepared catalogue is written to it with the manifest last: whoever finds
no manifest there finds no catalogue, however far an upload came.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs

from aliprod.catalogue.decode import MOST_BYTES, Unreadable
from aliprod.errors import Refused, Unreachable
from aliprod.store import commit

_URI = re.compile(r"[a-z][a-z0-9+.-]+://")
_ANNOTATIONS = (".json", ".csv")
_REFUSED = re.compile(r"ACCESS_DENIED|INVALID_ACCESS_KEY|INVALID_CLIENT|SIGNATURE|UNRECOGNIZED_CLIENT|HTTP status 403")
_NOT_THERE = re.compile(r"NO_SUCH_BUCKET|does not exist|HTTP status 404")


@dataclass(frozen=True)
class Remote:
    """A folder at a URI; travels to other processes as the text alone."""

    uri: str

    @property
    def shown(self) -> str:
        """Without keys and options."""
        parts = urlsplit(self.uri)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}".rstrip("/")

    def content(self, path: str) -> bytes:
        """The bytes of a file below.

        Raises:
            Unreadable: it is not there, or far too large.
            Unreachable, Refused: the place is not there, or not for us.
        """
        system, root = _opened(self.uri)
        with _asking(self.shown):
            try:
                with system.open_input_file(f"{root}/{path}") as file:
                    if file.size() > MOST_BYTES:
                        raise Unreadable(f"has {file.size():,} bytes; more than {MOST_BYTES:,} are refused")
                    return bytes(file.read())
            except FileNotFoundError as error:
                raise Unreadable("is not there") from error

    def outline(self, folder: Path) -> None:
        """Write into ``folder`` what `sources.read` looks at: annotations, and the names of folders and pictures.

        Raises:
            Refused: nothing is there, or a prepared catalogue.
            Unreachable: it cannot be asked.
        """
        system, root = _opened(self.uri)
        with _asking(self.shown):
            found = system.get_file_info(fs.FileSelector(root, recursive=True))
        if not found:
            raise Refused("holds nothing.", self.shown, "Is the path right?")
        names = {info.path.removeprefix(root).lstrip("/"): info for info in found}
        if commit.MANIFEST in names:
            raise Refused("is a prepared catalogue.", self.shown, "Copy it to this machine and train from there.")
        listed = {"train.json", "train.csv"} & names.keys()
        for name, info in names.items():
            if not (folder / name).resolve().is_relative_to(folder.resolve()):
                continue
            if info.type == fs.FileType.Directory:
                (folder / name).mkdir(parents=True, exist_ok=True)
            elif "/" not in name and name.endswith(_ANNOTATIONS):
                (folder / name).write_bytes(self.content(name))
            else:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                if not listed:
                    (folder / name).touch()

    def manifest(self) -> dict[str, Any] | None:
        """What the manifest there says; None where there is none.

        Raises:
            Refused: something else lies there.
            Unreachable: it cannot be asked.
        """
        system, root = _opened(self.uri)
        with _asking(self.shown):
            found = system.get_file_info(f"{root}/{commit.MANIFEST}")
        if found.type == fs.FileType.NotFound:
            return None
        try:
            says: dict[str, Any] = json.loads(self.content(commit.MANIFEST))
            return says
        except (ValueError, Unreadable) as error:
            raise Refused(f"holds a {commit.MANIFEST} that is none.", self.shown, "Name another folder.") from error

    def upload(self, folder: Path) -> None:
        """Copy a committed folder there, its manifest last.

        Raises:
            Unreachable: it broke off; the same call goes on.
            Refused: we may not write there.
        """
        system, root = _opened(self.uri)
        names = sorted(file.name for file in folder.iterdir() if file.name != commit.MANIFEST)
        with _asking(self.shown):
            if not isinstance(system, fs.S3FileSystem):  # S3 has no folders, and a bucket is not ours to make
                system.create_dir(root, recursive=True)
            for name in [*names, commit.MANIFEST]:
                with (folder / name).open("rb") as file, system.open_output_stream(f"{root}/{name}") as there:
                    while block := file.read(2**23):
                        there.write(block)


def place(path: str | Path) -> Path | Remote:
    """A path of this machine, also where it is written as ``file://``, or a place elsewhere.

    Raises:
        Refused: not a URI that pyarrow knows.
    """
    if not _URI.match(str(path)):
        return Path(path)
    system, root = _opened(str(path))
    return Path(root) if isinstance(system, fs.LocalFileSystem) else Remote(str(path))


@lru_cache
def _opened(uri: str) -> tuple[fs.FileSystem, str]:
    shown = Remote(uri).shown
    try:
        system, root = fs.FileSystem.from_uri(uri)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        reason = str(error).splitlines()[0].replace(uri, shown)
        raise Refused(f"is no place that can be read: {reason}.", shown, "s3://BUCKET/FOLDER, for instance.") from error
    return system, root.rstrip("/")


@contextmanager
def _asking(shown: str) -> Iterator[None]:
    """What pyarrow says of a place becomes one sentence."""
    try:
        yield
    except OSError as error:
        says = str(error).splitlines()[0]
        if _REFUSED.search(says):
            raise Refused("does not accept our keys.", shown, "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY?") from error
        if isinstance(error, FileNotFoundError) or _NOT_THERE.search(says):
            raise Refused("is not there.", shown, "Are bucket and folder spelt right?") from error
        advice = "Finished work is intact; start the same command again when it answers."
        raise Unreachable(f"cannot be reached: {says}", shown, advice) from error

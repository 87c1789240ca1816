"""A folder that pyarrow reaches by URI: S3 or what speaks it, with ``endpoint_override=HOST:PORT`` in the query.

Pictures are read from it one by one, and a prepared catalogue is written to it with the manifest last: whoever finds
no manifest there finds no catalogue, however far an upload came.
"""

import json
import re
import shutil
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
_REFUSED = re.compile(r"ACCESS_DENIED|INVALID_ACCESS_KEY|INVALID_CLIENT|SIGNATURE|UNRECOGNIZED_CLIENT|HTTP status 403")
_NOT_THERE = re.compile(r"NO_SUCH_BUCKET|does not exist|HTTP status 404")


@dataclass(frozen=True)
class RemoteFolder:
    """A folder at a URI; travels to other processes as the text alone.

    All that it is asked raises Unreachable where it does not answer, Refused where it is not there or not for us.
    """

    uri: str

    @property
    def shown(self) -> str:
        """Without keys and options."""
        parts = urlsplit(self.uri)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}".rstrip("/")

    def content(self, path: str) -> bytes:
        """The bytes of a file below. Unreadable: it is not there, or far too large."""
        with self._opened() as folder:
            try:
                with folder.open_input_file(path) as file:
                    if file.size() > MOST_BYTES:
                        raise Unreadable(f"has {file.size():,} bytes; more than {MOST_BYTES:,} are refused")
                    return bytes(file.read())
            except FileNotFoundError as error:
                raise Unreadable("is not there") from error

    def files(self) -> list[str]:
        """The names of all files below, sorted."""
        with self._opened() as folder:
            found = folder.get_file_info(fs.FileSelector("", recursive=True))
        return sorted(info.path for info in found if info.type == fs.FileType.File)

    def outline(self, local: Path) -> None:
        """Write into ``local`` what `sources.read` looks at: annotations, and the names of folders and pictures.

        Refused: nothing is there, or a prepared catalogue.
        """
        with self._opened() as folder:
            found = {info.path: info for info in folder.get_file_info(fs.FileSelector("", recursive=True))}
        if not found:
            raise Refused("holds nothing.", self.shown, "Is the path right?")
        if commit.MANIFEST in found:
            raise Refused("is a prepared catalogue.", self.shown, "Copy it to this machine and train from there.")
        names_matter = not {"train.json", "train.csv"} & found.keys()
        for name, info in found.items():
            target = local / name
            if not target.resolve().is_relative_to(local.resolve()):
                continue
            is_folder = info.type == fs.FileType.Directory
            (target if is_folder else target.parent).mkdir(parents=True, exist_ok=True)
            if name.endswith(".tar"):
                continue
            table = name.endswith((".json", ".csv", ".tsv", ".parquet"))
            if not is_folder and table and ("/" not in name or target.stem == "metadata"):
                target.write_bytes(self.content(name))
            elif not is_folder and names_matter:
                target.touch()

    def manifest(self) -> dict[str, Any] | None:
        """What the manifest there says; None where there is none. Refused: something else lies there."""
        with self._opened() as folder:
            if folder.get_file_info(commit.MANIFEST).type == fs.FileType.NotFound:
                return None
        try:
            says: dict[str, Any] = json.loads(self.content(commit.MANIFEST))
            return says
        except (ValueError, Unreadable) as error:
            raise Refused(f"holds a {commit.MANIFEST} that is none.", self.shown, "Name another folder.") from error

    def upload(self, local: Path) -> None:
        """Copy a committed folder there, its manifest last; after a break the same call goes on."""
        names = sorted((file.name for file in local.iterdir()), key=lambda name: (name == commit.MANIFEST, name))
        with self._opened() as folder:
            if not isinstance(folder.base_fs, fs.S3FileSystem):  # S3 has no folders, and a bucket is not ours to make
                folder.base_fs.create_dir(folder.base_path, recursive=True)
            for name in names:
                with (local / name).open("rb") as file, folder.open_output_stream(name) as there:
                    shutil.copyfileobj(file, there, 2**23)

    @contextmanager
    def _opened(self) -> Iterator[fs.SubTreeFileSystem]:
        """The folder as a file system; what pyarrow says of it becomes one sentence."""
        with _one_sentence(self.shown):
            system, root = _resolved(self.uri)
            yield fs.SubTreeFileSystem(root, system)


@contextmanager
def _one_sentence(shown: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        says = str(error).splitlines()[0]
        if _REFUSED.search(says):
            advice = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY?"
            raise Refused("does not accept our keys.", shown, advice) from error
        if isinstance(error, FileNotFoundError) or _NOT_THERE.search(says):
            raise Refused("is not there.", shown, "Are bucket and folder spelt right?") from error
        advice = "Finished work is intact; start the same command again when it answers."
        raise Unreachable(f"cannot be reached: {says}", shown, advice) from error


def folder_at(path: str | Path) -> Path | RemoteFolder:
    """A path of this machine, also where it is written as ``file://``, or a folder elsewhere. Refused: not a URI that
    pyarrow knows. Unreachable: S3 does not say where the bucket is."""
    if not _URI.match(str(path)):
        return Path(path)
    with _one_sentence(RemoteFolder(str(path)).shown):
        system, root = _resolved(str(path))
    return Path(root) if isinstance(system, fs.LocalFileSystem) else RemoteFolder(str(path))


@lru_cache
def _resolved(uri: str) -> tuple[fs.FileSystem, str]:
    try:
        system, root = fs.FileSystem.from_uri(uri)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        shown = RemoteFolder(uri).shown
        reason = str(error).splitlines()[0].replace(uri, shown)
        raise Refused(f"is no place that can be read: {reason}.", shown, "s3://BUCKET/FOLDER, for instance.") from error
    return system, root.rstrip("/")

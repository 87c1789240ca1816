"""A folder of pictures in a bucket: s3://, gs:// or az://, with credentials and endpoint from the environment.

Pictures are read from it side by side, where it is told which come next, and a prepared catalogue is written to it with
the manifest last: whoever finds no manifest there finds no catalogue, however far an upload came.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from aliprod.catalogue.decode import MOST_BYTES, Unreadable
from aliprod.errors import Refused
from aliprod.processes import Ahead
from aliprod.store import commit
from aliprod.store.bucket import Bucket, check_uri, opened

_URI = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)


@dataclass(frozen=True)
class RemoteFolder:
    """A folder at a URI. All that it is asked raises Unreachable where the bucket does not answer, or does not accept
    us."""

    uri: str

    @property
    def _bucket(self) -> Bucket:
        return opened("/".join(self.uri.split("/")[:3]))

    @property
    def _prefix(self) -> str:
        return "".join(f"{name}/" for name in self.uri.split("/")[3:])

    @cached_property
    def _ahead(self) -> Ahead[str, bytes]:
        return Ahead(self._read)

    def __getstate__(self) -> dict[str, Any]:
        return {"uri": self.uri}  # no threads

    def ask(self, paths: Iterable[str]) -> None:
        """Begin to read these files, side by side."""
        self._ahead.ask(paths)

    def content(self, path: str) -> bytes:
        """The bytes of a file below. Unreadable: it is not there, or far too large."""
        return self._ahead.take(path)

    def _read(self, path: str) -> bytes:
        try:
            return self._bucket.get(self._prefix + path, most=MOST_BYTES)[0]
        except FileNotFoundError as error:
            raise Unreadable("is not there") from error
        except OverflowError as error:
            raise Unreadable(str(error)) from error

    def files(self) -> list[str]:
        """The names of all files below, sorted. Refused: there is none."""
        prefix = self._prefix
        if found := sorted(key.removeprefix(prefix) for key in self._bucket.list(prefix.rstrip("/"))):
            return found
        raise Refused("holds nothing.", self.uri, "Are bucket and folder spelt right?")

    def outline(self, local: Path) -> None:
        """Write into ``local`` what `sources.read` looks at: annotations, and the names of folders and pictures.

        Refused: nothing is there, or a prepared catalogue.
        """
        found = self.files()
        if commit.MANIFEST in found:
            raise Refused("is a prepared catalogue.", self.uri, "A plan's `catalogue.path` names it as it is.")
        names_matter = not {"train.json", "train.csv"} & {*found}
        for name in found:
            target = local / name
            if not target.resolve().is_relative_to(local.resolve()):
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            table = name.endswith((".json", ".csv", ".tsv", ".parquet"))
            if table and ("/" not in name or target.stem == "metadata"):
                target.write_bytes(self.content(name))
            elif names_matter and not name.endswith(".tar"):
                target.touch()

    def manifest(self) -> dict[str, Any] | None:
        """What the manifest there says; None where there is none. Refused: something else lies there."""
        if (found := self._bucket.find(self._prefix + commit.MANIFEST)) is None:
            return None
        try:
            says: dict[str, Any] = json.loads(found[0])
            return says
        except ValueError as error:
            raise Refused(f"holds a {commit.MANIFEST} that is none.", self.uri, "Name another folder.") from error

    def upload(self, local: Path) -> None:
        """Copy a committed folder there, its manifest last. StorageFull: the bucket does not take it."""
        for file in sorted(local.iterdir(), key=lambda file: (file.name == commit.MANIFEST, file)):
            self._bucket.put(self._prefix + file.name, file.read_bytes())


def folder_at(path: str | Path) -> Path | RemoteFolder:
    """A path of this machine, also as ``file://``, or a folder in a bucket. Refused: as `check_uri`."""
    text = str(path)
    if not _URI.match(text):
        return Path(path)
    if text.startswith("file://"):
        return Path(unquote(urlsplit(text).path))
    check_uri(text)
    return RemoteFolder(text.rstrip("/"))

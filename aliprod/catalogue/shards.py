"""Pictures that lie in no files of their own: in the shards of a prepared catalogue, and in tars.

A prepared catalogue holds Parquet shards that other tools open (``train-00000.parquet``: image_id, class_id, jpeg;
pages with checksums), the rows of each split in order (``train.arrow``) and the manifest of `store.commit`. A random
row of a Parquet file costs its row group, up to 9 ms (measured, pyarrow 25), so nothing is ever read from the shards
one by one: the pictures of a split are laid out once, end to end, on the disk of each machine that reads them.

A tar, as WebDataset writes it, has the members of one key together, ``KEY.jpg`` beside ``KEY.cls``. It is scanned once,
header by header; a picture is then read where it lies. Compressed ones have no such places.
"""

import hashlib
import io
import json
import logging
import os
import shutil
import struct
import tarfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from aliprod.catalogue.annotations import PICTURE_SUFFIXES
from aliprod.catalogue.decode import MOST_BYTES, Unreadable
from aliprod.errors import Failed, Refused
from aliprod.processes import locked
from aliprod.store import commit
from aliprod.store.layout import check_cache

SPLITS = ("train", "val", "test")
FORMAT = 1
_ROWS = {split: f"{split}.arrow" for split in SPLITS}  # the file of ids and labels of a split
_AGAIN = "Copy it here once more, or prepare the catalogue again."
_LABELS = ("cls", "json", "txt")  # of a picture in a tar: the first that is there
_KEYS = ("label", "class", "cls", "class_id", "category")  # of a label in JSON
_MOST_LABEL = 2**20  # bytes of one

log = logging.getLogger(__name__)


class Record(BaseModel):
    """What the manifest says of a prepared catalogue, besides the checksums of its files."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prepared: Literal[1]  # FORMAT
    short_side: int
    quality: int
    source: str  # fingerprint of the catalogue that was prepared
    content: str  # fingerprint of the rows that are left, without their pictures
    classes: list[int]
    names: list[str]
    ancestor: list[list[int]] | None
    counts: dict[str, list[int]]  # of train and val: images of each class
    test_labels: bool  # whether test.arrow has any
    shards: dict[str, list[tuple[int, int]]]  # of each split: rows and bytes of JPEG in each shard
    skipped: list[tuple[str, str]]  # path, reason
    problems: list[tuple[str, str]]  # what is odd about images that are used

    @model_validator(mode="after")
    def _agree(self) -> "Record":
        levels = self.ancestor or []
        rising = all(one < next_ for one, next_ in pairwise(self.classes))
        sizes = {len(self.names), *map(len, levels), *map(len, self.counts.values())}
        if not rising or sizes != {len(self.classes)} or set(self.shards) != set(SPLITS):
            raise ValueError("its lists do not match its classes")
        return self

    def file_names(self) -> list[str]:
        """All shards, in order."""
        return [shard_name(split, number) for split in SPLITS for number in range(len(self.shards[split]))]


@dataclass(frozen=True)
class Manifest:
    """What is there: the record, and the sha256 of every file."""

    record: Record
    digests: dict[str, str]

    @property
    def fingerprint(self) -> str:
        """sha256 over the rows' fingerprint and the checksums of all shards: of equal rows with equal pictures."""
        lines = (f"{name} {self.digests[name]}\n" for name in sorted(self.record.file_names()))
        return hashlib.sha256("".join((f"{self.record.content}\n", *lines)).encode()).hexdigest()


def shard_name(split: str, number: int) -> str:
    """The file of a shard."""
    return f"{split}-{number:05}.parquet"


def manifest(root: Path) -> Manifest:
    """The manifest of a prepared catalogue. Refused: there is none, or a file of another size than it says."""
    if (says := commit.read(root)) is None:
        what = "is damaged, or a file that it lists is not there or of another size."
        raise Refused(what, root / commit.MANIFEST, _AGAIN)
    return parsed(says, commit.digests(root), root / commit.MANIFEST)


def parsed(record: object, digests: dict[str, str], where: str | Path) -> Manifest:
    """A manifest from what it says of the catalogue and of its files. Refused: it is of something else, or of another
    version."""
    try:
        says = Record.model_validate(record)
        return Manifest(says, {name: digests[name] for name in (*says.file_names(), *_ROWS.values())})
    except (ValidationError, KeyError) as error:
        raise Refused("is not the manifest of a prepared catalogue of this version.", where, _AGAIN) from error


def write_rows(folder: Path, split: str, ids: pa.StringArray, labels: NDArray[np.int64]) -> None:
    """Write the ids and labels of a split: uncompressed, so that 2.5 M rows are read as they lie."""
    rows = pa.record_batch({"label": pa.array(labels.astype(np.int32)), "image_id": ids})
    with pa.OSFile(str(folder / _ROWS[split]), "wb") as file, pa.ipc.new_file(file, rows.schema) as writer:
        writer.write_batch(rows)


def read_rows(root: Path, split: str, found: Manifest) -> tuple[pa.StringArray, NDArray[np.int64]]:
    """The ids and labels of a split. Failed: the file is not the one that was written."""
    path = root / _ROWS[split]
    with _reading(path):
        if commit.sha256(path) != found.digests[path.name]:
            raise _damaged(path)
        labels = np.from_dlpack(_column(path, 0)).astype(np.int64)  # `to_numpy` imports pandas: 34 MB a process
        ids = _column(path, 1)
        ids.validate(full=True)
    count = sum(shard[0] for shard in found.record.shards[split])
    least, most = (-1 if split == "test" else 0), len(found.record.classes) - 1
    if not len(labels) == len(ids) == count or (count and not least <= labels.min() <= labels.max() <= most):
        raise _damaged(path)
    return ids, labels


@dataclass(frozen=True, eq=False)
class Store:
    """The pictures of one split, read row by row from this machine's own disk.

    Travels to other processes as texts alone; each opens the files for itself. They are read with ``pread``, not
    mapped: a disk error is an exception then, where a map ends the process without a word.
    """

    root: Path
    split: str
    fingerprint: str
    cache: Path

    def jpeg(self, place: int) -> bytes:
        """The picture in a row of the shards. Failed: one is not what the manifest says. StorageFull: no room here."""
        ends, pictures = self._files
        start, end = struct.unpack("<qq", os.pread(ends, 16, 8 * place))
        return os.pread(pictures, end - start, start)

    def laid_out(self) -> Path:
        """The folder with the pictures end to end; filled where it is not there, by one process of this machine.
        Refused: somebody else owns the cache, and would choose what we train on."""
        folder = self.cache / self.fingerprint / self.split
        with commit.storage(folder):
            check_cache(self.cache)
            folder.parent.mkdir(exist_ok=True)
        if commit.read(folder) is None:
            with alone(folder.with_suffix(".lock"), wait=True):
                remove_partials(folder)
                if commit.read(folder) is None:
                    commit.write(folder, self._fill)
        return folder

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("root", "split", "fingerprint", "cache")}  # no open files

    @cached_property
    def _files(self) -> tuple[int, int]:
        folder = self.laid_out()
        ends, pictures = (os.open(folder / name, os.O_RDONLY | os.O_CLOEXEC) for name in ("ends", "jpegs"))
        for file in (ends, pictures):
            weakref.finalize(self, os.close, file)
        return ends, pictures

    def _fill(self, folder: Path) -> None:
        found = manifest(self.root)
        if found.fingerprint != self.fingerprint:
            raise Failed("has changed since it was opened.", self.root, "Start the same command again.")
        shards = found.record.shards[self.split]
        total = sum(shard[1] for shard in shards)
        log.info("laying out %s bytes of %s of %s in %s, once", f"{total:,}", self.split, self.root, folder.parent)
        with (folder / "jpegs").open("wb") as pictures, (folder / "ends").open("wb") as ends:
            os.posix_fallocate(pictures.fileno(), 0, total)  # no room is said at once
            ends.write(bytes(8))
            names = [shard_name(self.split, number) for number in range(len(shards))]
            for path, (rows, _) in zip(commit.borrowed(self.root, names), shards, strict=True):
                jpegs = _jpegs(path, found.digests[path.name], rows)
                base = pictures.tell()
                pictures.writelines(jpegs)
                ends.write((base + np.cumsum([len(jpeg) for jpeg in jpegs], dtype="<i8")).tobytes())


@contextmanager
def alone(lock: Path, wait: bool) -> Iterator[None]:
    """Hold a lock that the system takes back when this process ends, however it ends. Refused: another process holds
    it, and we do not wait."""
    with commit.storage(lock):
        file = lock.open("a")
    with locked(file, wait):
        yield


def remove_partials(folder: Path) -> None:
    """Remove what killed commits of this folder left beside it; for who is alone here."""
    for path in folder.parent.iterdir():
        if path.name.startswith(f".{folder.name}.") and path.name.endswith(".partial"):
            shutil.rmtree(path, ignore_errors=True)


def _jpegs(path: Path, digest: str, rows: int) -> list[bytes]:
    """The pictures of a shard, read once and held against its checksum: page checksums alone leave out the footer."""
    with _reading(path):
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != digest:
            raise _damaged(path)
        jpegs: list[bytes] = pq.read_table(io.BytesIO(content), columns=["jpeg"]).column("jpeg").to_pylist()
    if len(jpegs) != rows or not all(isinstance(jpeg, bytes) for jpeg in jpegs):
        raise _damaged(path)
    return jpegs


def _column(path: Path, number: int) -> pa.Array:
    """Alone: the other would stay in memory."""
    with pa.OSFile(str(path)) as file:
        return pa.ipc.open_file(file, options=pa.ipc.IpcReadOptions(included_fields=[number])).get_batch(0).column(0)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Failed(f"cannot be read: {error.strerror or error}.", path, _AGAIN) from error
    except (pa.ArrowException, KeyError, IndexError, ValueError) as error:
        raise _damaged(path) from error


def _damaged(path: Path) -> Failed:
    return Failed("is damaged: its bytes are not those of the manifest.", path, _AGAIN)


# Tars


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
        places = np.stack([self.tar, self.start, self.size]).astype("<i8")
        return hashlib.sha256(places.tobytes()).hexdigest()


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


def _pictures(found: list[tarfile.TarInfo], labels: dict[str, str]) -> Iterator[Member]:
    written = next((labels[kind] for kind in _LABELS if labels.get(kind)), "")
    for member in found:
        yield Member(member.name, member.offset_data, member.size, written)


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

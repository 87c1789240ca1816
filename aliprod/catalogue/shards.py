"""The shards of a prepared catalogue: Parquet that other tools open (``train-00000.parquet``: image_id, class_id, jpeg;
pages with checksums), the rows of each split in order (``train.arrow``) and the manifest of `store.commit`.

A random row of a Parquet file costs its row group, up to 9 ms (measured, pyarrow 25), so no row is ever read by way of
Parquet: each machine goes through the shards once, lays their pictures out end to end on its own disk, as far as it has
room, and notes where in its shard each of the others lies.
"""

import hashlib
import io
import logging
import os
import shutil
import struct
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from glob import escape
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from aliprod.errors import Failed, Refused
from aliprod.processes import Ahead, locked
from aliprod.store import commit
from aliprod.store.layout import cache_room, check_cache

SPLITS = ("train", "val", "test")
FORMAT = 1
_ROWS = {split: f"{split}.arrow" for split in SPLITS}  # the file of ids and labels of a split
_ROW = struct.Struct("<iiq8s")  # of a picture: its shard, bytes, the first of them, the beginning of their sha256
_AGAIN = "Copy it here once more, or prepare the catalogue again."

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
    """A manifest from what it says of the catalogue and of its files. Refused: it is none, or of another version."""
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
    """The pictures of one split, read row by row: those that this machine's own disk has room for from there, the
    others from their shards, wherever these are. An epoch shows each once, so a cache that keeps the same ones for good
    serves as many of them as any other of its size. Files are read with ``pread``, not mapped: a disk error is an
    exception then, where a map ends the process without a word.
    """

    root: Path
    split: str
    fingerprint: str
    cache: Path

    def jpeg(self, place: int) -> bytes:
        """The picture in a row of the shards. Failed: one is not what the manifest says. StorageFull: no room here.
        Unreachable: the bucket does not answer."""
        return self._ahead.take(place)

    def ask(self, places: Iterable[int]) -> None:
        """Begin to read those of these pictures that are not on this machine, side by side."""
        *_, here = self._open
        self._ahead.ask(place for place in places if place >= here)

    def laid_out(self) -> Path:
        """The folder with the pictures end to end; filled where it is not there, by one process of this machine.
        Refused: somebody else owns the cache, and would choose what we train on."""
        folder = self.cache / "pictures" / self.fingerprint / self.split
        with commit.storage(folder):
            check_cache(self.cache)
            folder.parent.mkdir(parents=True, exist_ok=True)
        if commit.read(folder) is None:
            with alone(folder.with_suffix(".lock"), wait=True):
                remove_partials(folder)
                if commit.read(folder) is None:
                    self._lay_out(folder)
        return folder

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("root", "split", "fingerprint", "cache")}  # no open files

    @cached_property
    def _open(self) -> tuple[int, int, int]:
        """Two open files, and how many rows, from the first on, have their pictures on this machine."""
        folder = self.laid_out()
        rows, pictures = (os.open(folder / name, os.O_RDONLY | os.O_CLOEXEC) for name in ("rows", "jpegs"))
        for file in (rows, pictures):
            weakref.finalize(self, os.close, file)
        return rows, pictures, (commit.read(folder) or {})["here"]

    @cached_property
    def _ahead(self) -> Ahead[int, bytes]:
        return Ahead(self._read)

    @cached_property
    def _part(self) -> Callable[[str, int, int], bytes]:
        return commit.part_reader(self.root)

    def _read(self, place: int) -> bytes:
        rows, pictures, here = self._open
        shard, size, start, digest = _ROW.unpack(os.pread(rows, _ROW.size, _ROW.size * place))
        if place < here:
            return os.pread(pictures, size, start)
        path = self.root / shard_name(self.split, shard)
        with _reading(path):
            content = self._part(path.name, start, size)
        if hashlib.sha256(content).digest()[: len(digest)] != digest:
            raise _damaged(path)
        return content

    def _lay_out(self, folder: Path) -> None:
        found = manifest(self.root)
        if found.fingerprint != self.fingerprint:
            raise Failed("has changed since it was opened.", self.root, "Start the same command again.")
        shards = found.record.shards[self.split]
        room = cache_room(self.cache, (file.stat().st_size for file in self.cache.glob("pictures/*/*/jpegs")))
        ends = np.cumsum([size for _, size in shards], dtype=np.int64)
        whole = int(np.searchsorted(ends, room, side="right"))  # shards whose pictures come here
        total, here = (int(ends[number - 1]) if number else 0 for number in (len(shards), whole))
        log.info("laying out %s of %s bytes of %s in %s", f"{here:,}", f"{total:,}", self.root / self.split, folder)

        def fill(staging: Path) -> None:
            with (staging / "jpegs").open("wb") as pictures, (staging / "rows").open("wb") as rows:
                if here:
                    os.posix_fallocate(pictures.fileno(), 0, here)  # no room is said at once
                names = [shard_name(self.split, number) for number in range(len(shards))]
                for number, path in enumerate(commit.borrowed(self.root, names)):
                    content, jpegs = _jpegs(path, found.digests[path.name], shards[number][0])
                    if number < whole:
                        sizes = np.array([len(jpeg) for jpeg in jpegs], np.int64)
                        places = (pictures.tell() + np.cumsum(sizes) - sizes).tolist()
                        pictures.writelines(jpegs)
                    else:
                        places = _places(jpegs, content, path)
                    for jpeg, place in zip(jpegs, places, strict=True):
                        rows.write(_ROW.pack(number, len(jpeg), place, hashlib.sha256(jpeg).digest()[:8]))

        commit.write(folder, fill, {"here": sum(rows for rows, _ in shards[:whole])})


def _places(jpegs: list[bytes], shard: bytes, path: Path) -> list[int]:
    """Where each picture begins in the bytes of its shard, in which they lie in order. Failed: they do not."""
    places, end = list[int](), 0
    for jpeg in jpegs:
        if (place := shard.find(jpeg, end)) < 0:
            raise _damaged(path)
        places.append(place)
        end = place + len(jpeg)
    return places


@contextmanager
def alone(lock: Path, wait: bool) -> Iterator[None]:
    """Hold a lock, as `locked`."""
    with commit.storage(lock):
        file = lock.open("a")
    with locked(file, wait):
        yield


def remove_partials(folder: Path) -> None:
    """Remove what killed commits of this folder left beside it; for who is alone here."""
    for path in folder.parent.glob(f".{escape(folder.name)}.*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def _jpegs(path: Path, digest: str, rows: int) -> tuple[bytes, list[bytes]]:
    """A shard and its pictures, read once and held against its checksum: page checksums alone leave out the footer."""
    with _reading(path):
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != digest:
            raise _damaged(path)
        jpegs: list[bytes] = pq.read_table(io.BytesIO(content), columns=["jpeg"]).column("jpeg").to_pylist()
    if len(jpegs) != rows or not all(isinstance(jpeg, bytes) for jpeg in jpegs):
        raise _damaged(path)
    return content, jpegs


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

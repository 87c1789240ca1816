"""Rows that take hours to compute: written shard by shard, and what a killed writer finished is not computed again.

Finished shards lie beside the folder that they are for, until all are there:

    .test-ten_crop.0123456789abcdef.unfinished/00000/...   a committed folder, a file NAME-00000.npy an array

Memory holds one block of rows: a shard grows on disk.
"""

import hashlib
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from aliprod.errors import Failed, StorageFull
from aliprod.store import commit
from aliprod.store.layout import canonical

SHARD_STEP = 256  # a shard has a multiple of so many rows: whole batches, so that one predicted again sees the same
SHARD_ROWS = 32 * SHARD_STEP  # of soft labels, 3 MB, and of features, 32 MB at 2048 of them
SHARD_BYTES = 256 * 2**20  # of probabilities in float16

Part = tuple[int, int]  # of the shards: every so many, counted from which
ALL: Part = (0, 1)
Rows = npt.NDArray[np.int64]
Block = Mapping[str, npt.NDArray[Any]]  # arrays by name: the same rows of each

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class ResumableRows:
    """Rows for ``folder``, and the shards of them that are finished: of just these images, classes and facts. ``ids``:
    (N,). ``classes``: (K,). ``record``: what is committed with the rows."""

    folder: Path
    ids: pa.StringArray
    classes: npt.NDArray[np.int64]
    record: Mapping[str, Any]
    per_shard: int

    def finish(
        self,
        blocks: Callable[[Rows], Iterable[Block]],
        fill: Callable[[Path], Mapping[str, str] | None],
        part: Part = ALL,
    ) -> dict[str, Any]:
        """Write the shards that are missing, then commit the folder, and remove the shards.

        Where the folder is committed already, it stays. What was left of other weights, images or classes of the same
        split and views is removed. Several writers at once share the shards; the first to commit wins, and the others
        stop at their next shard.

        Args:
            blocks: called with the rows that are missing, ascending and whole shards: their blocks, in that order.
            fill: as of `aliprod.store.commit.write`, called when all shards are there.
            part: of the shards, which is written here; the folder is committed by the part that finds all others there.
        Returns:
            The record that now stands in the folder; {} while shards of other parts are missing.
        Raises:
            Failed: from ``blocks``; nothing is left behind.
            StorageFull: no room; finished shards are kept.
            ValueError: the blocks have more or fewer rows than are missing.
        """
        if (there := commit.read(self.folder)) is not None:
            return there
        self._sweep()
        try:
            commit.refresh(self._room)
            self._write(blocks, part)
            if part != ALL:
                commit.refresh(self._room)  # other parts may be made on other machines
            if not all(path.exists() for path in self._shards) and commit.read(self.folder) is None:
                return {}
            written = commit.read(self.folder) or commit.write(self.folder, fill, dict(self.record), room=self._room)
        except StorageFull:
            if (there := commit.read(self.folder)) is None:
                raise
            written = there  # another writer was faster, and has removed the shards
        except Failed:
            commit.remove(self._room)
            raise
        commit.remove(self._room)
        return written

    def files(self, name: str) -> list[Path]:
        """The file of an array in each shard."""
        return [shard_file(path / name, shard) for shard, path in enumerate(self._shards)]

    def link(self, name: str, target: Path) -> dict[str, str]:
        """Give the files of an array a second name in ``target``, or copy them where there are no links. Returns the
        sha256 of each by its name."""
        for file in self.files(name):
            commit.fetch(file.parent)
            commit.link(file, target / file.name)
        return {file.name: commit.digests(file.parent)[file.name] for file in self.files(name)}

    @cached_property
    def _room(self) -> Path:
        facts = [self.folder.name, self.record, self.per_shard]
        digest = hashlib.sha256(canonical(facts).encode())
        digest.update("\0".join(self.ids.to_pylist()).encode())
        digest.update(self.classes.tobytes())
        return self.folder.parent / f".{self._kind}.{digest.hexdigest()[:16]}.unfinished"

    @property
    def _kind(self) -> str:
        """The split and views of predictions, else the folder's name: what is left of others of it is obsolete."""
        said = [str(self.record[fact]) for fact in ("split", "views") if fact in self.record]
        return "-".join(said) or self.folder.name

    @cached_property
    def _shards(self) -> list[Path]:
        return [self._room / f"{shard:05d}" for shard in range(-(-len(self.ids) // self.per_shard))]

    def _end(self, shard: int) -> int:
        return min(len(self.ids), (shard + 1) * self.per_shard)

    def _sweep(self) -> None:
        for other in self.folder.parent.glob(f".{self._kind}.*.unfinished"):
            if other != self._room:
                commit.remove(other)

    def _write(self, blocks: Callable[[Rows], Iterable[Block]], part: Part) -> None:
        if not len(missing := self._missing(part)):
            return
        if part == ALL and len(missing) < len(self.ids):
            log.info("%s: %d of %d rows are left to predict.", self._room, len(missing), len(self.ids))
        growing = self._room / f".{uuid.uuid4().hex[:8]}.partial"
        try:
            for rows, pieces in self._by_shard(missing, blocks(missing)):
                with commit.storage(self._room):
                    commit.make_folder(growing)
                    for name, piece in pieces.items():
                        append(growing / name, piece, int(rows[0]), len(self.ids), self.per_shard)
                shard = int(rows[-1]) // self.per_shard
                if rows[-1] + 1 < self._end(shard):
                    continue
                if commit.read(self.folder) is not None:
                    break
                commit.write(self._shards[shard], lambda staging: _move(growing, staging))
        finally:
            shutil.rmtree(growing, ignore_errors=True)
            with suppress(OSError):  # it holds finished shards
                self._room.rmdir()

    def _missing(self, part: Part) -> Rows:
        """Rows of the part's shards that are not there. One whose bytes are others than were written is set aside."""
        missing = [np.empty(0, np.int64)]
        for shard, path in list(enumerate(self._shards))[part[0] :: part[1]]:
            if path.exists() and commit.verify(path):
                log.warning("%s is damaged and is predicted again.", path)
                commit.set_aside(path, self._room / f".{path.name}.{uuid.uuid4().hex[:8]}.bad")
            if not path.exists():
                missing.append(np.arange(shard * self.per_shard, self._end(shard)))
        return np.concatenate(missing)

    def _by_shard(self, missing: Rows, blocks: Iterable[Block]) -> Iterator[tuple[Rows, Block]]:
        """The blocks and the rows that they are, cut where a shard ends."""
        done = 0
        for block in blocks:
            count = len(next(iter(block.values())))
            rows = missing[done : done + count]
            done += count
            if done > len(missing):
                break
            cuts = np.flatnonzero(np.diff(rows // self.per_shard)) + 1
            for start, stop in zip([0, *cuts], [*cuts, count], strict=True):
                if start < stop:
                    yield rows[start:stop], {name: array[start:stop] for name, array in block.items()}
        if done != len(missing):
            raise ValueError(f"{done} rows of probabilities for {len(missing)} images")


def rows_of_a_shard(num_classes: int) -> int:
    """As many rows as make 256 MB of probabilities, at most 8192, a multiple of `SHARD_STEP`."""
    rows = min(8192, SHARD_BYTES // (2 * max(1, num_classes)))
    return max(SHARD_STEP, rows - rows % SHARD_STEP)


def shards(rows: int, num_classes: int) -> int:
    """How many shards probabilities of so many rows have."""
    return -(-rows // rows_of_a_shard(num_classes))


def finished_shards(folder: Path) -> int:
    """How many shards of rows for folders in this one are finished, of what is not whole yet."""
    return sum(1 for _ in folder.glob(".*.unfinished/[0-9]*"))


def append(stem: Path, rows: npt.NDArray[Any], row: int, total: int, per_shard: int) -> None:
    """Write rows ``row`` and on to the end of their shards: STEM-00000.npy, per_shard rows each, ``total`` in all.

    Plain writes, not a writable map: on a full disk a map ends the process (SIGBUS), a write raises.
    """
    while len(rows):
        shard, offset = divmod(row, per_shard)
        piece, rows = rows[: per_shard - offset], rows[per_shard - offset :]
        shape = (min(per_shard, total - shard * per_shard), rows.shape[1])
        header = {"descr": np.lib.format.dtype_to_descr(rows.dtype), "fortran_order": False, "shape": shape}
        with shard_file(stem, shard).open("r+b" if offset else "wb") as file:  # its beginning must be there
            file.seek(0, os.SEEK_END)
            if offset == 0:
                np.lib.format.write_array_header_1_0(file, header)
            file.write(np.ascontiguousarray(piece).data)
        row += len(piece)


def shard_file(stem: Path, number: int) -> Path:
    """STEM-00000.npy: the file of a shard."""
    return stem.with_name(f"{stem.name}-{number:05d}.npy")


def _move(room: Path, staging: Path) -> None:
    for file in room.iterdir():
        os.replace(file, staging / file.name)

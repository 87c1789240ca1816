"""A member's probabilities on an image set, as a committed folder of row shards in float16.

    probabilities-00000.npy ...  (n, K) float16, rows_per_shard rows each, fewer in the last
    rows.parquet                 image_id (string), label (int64 class id, null where unknown), in row order
    classes.parquet              class_id (int64), in column order
    manifest.json                checksums and the record: job, key, weights, split, views, ...

At 250,000 images and 50,030 classes this is 25 GB, and hours of work: it is read a few rows at a time, and written
shard by shard (`aliprod.store.resumable`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from aliprod.errors import Failed
from aliprod.store import commit
from aliprod.store.resumable import ALL, Part, ResumableRows, Rows, rows_of_a_shard, shard_file

STEM = "probabilities"
_ADVICE = "Delete the folder and submit jobs/ensemble.py: only this member is predicted again."
FLOOR = 2.0**-25  # what a stored 0 counts as where it has to have a logarithm: half the smallest float16
ROWS_PER_CHECK = 16  # rows summed in float64 at once: 6 MB at 50,030 classes

_ROWS_PER_BLOCK = 1024

Half = npt.NDArray[np.float16]


@dataclass(frozen=True, eq=False)
class Probabilities:
    """An open store. Nothing but ids is in memory; rows are read from the shards when asked for."""

    folder: Path
    ids: pa.StringArray  # (N,) in row order
    classes: npt.NDArray[np.int64]  # (K,) class ids in column order
    labels: pa.Int64Array  # (N,) class ids, null where unknown
    record: dict[str, Any]
    rows_per_shard: int

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def name(self) -> str:
        """The job whose probabilities these are, for messages."""
        return str(self.record.get("job", self.folder))

    @property
    def split(self) -> str:
        """The image set that was predicted: train, val or test."""
        return str(self.record.get("split", ""))

    def take(self, rows: Rows) -> Half:
        """The given rows in the given order: (len(rows), K); where they follow each other in one shard, a read-only
        view of the file. IndexError: there is no such row."""
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of {len(self)}")
        shards = rows // self.rows_per_shard
        if len(rows) and (shards == shards[0]).all():
            return self._of_shard(shards[0], rows)
        taken = np.empty((len(rows), len(self.classes)), np.float16)
        for shard in np.unique(shards):
            places = shards == shard
            taken[places] = self._of_shard(shard, rows[places])
        return taken

    def predicted(self) -> npt.NDArray[np.int64]:
        """Class ids (N,) of each row's highest probability, ties to the lowest id; a few rows in memory at once."""
        order, best = np.argsort(self.classes), np.empty(len(self), np.int64)
        for low in range(0, len(self), _ROWS_PER_BLOCK):
            rows = np.arange(low, min(low + _ROWS_PER_BLOCK, len(self)))
            best[rows] = self.take(rows)[:, order].argmax(axis=1)
        return self.classes[order][best]

    def _of_shard(self, shard: int, rows: Rows) -> Half:
        inside = rows - shard * self.rows_per_shard
        # Opened anew each time: every map holds a file open, and eleven members have a thousand shards.
        file = np.load(shard_file(self.folder / STEM, shard), mmap_mode="r")
        part: Half = file[inside[0] : inside[-1] + 1] if (np.diff(inside) == 1).all() else file[inside]
        return part


def write(
    folder: Path,
    ids: Sequence[str] | pa.StringArray,
    classes: npt.ArrayLike,
    blocks: Callable[[Rows], Iterable[Tensor]],
    labels: Sequence[int | None] | pa.Int64Array | None = None,
    record: Mapping[str, Any] | None = None,
    rows_per_shard: int | None = None,
    part: Part = ALL,
) -> dict[str, Any]:
    """Write probabilities as they come, checked, and commit them; resumed as `ResumableRows.finish` says.

    Args:
        ids, classes: (N,) image ids in row order, (K,) class ids in column order, each once.
        blocks: called with the rows that are missing, ascending and whole shards: (n, K) blocks of those rows, in that
            order, on any device; rounded to the nearest float16.
        labels: (N,) class ids, None where unknown.
        record: what the manifest is to say.
        part: of the shards, which is to be written here; the last of the parts commits all.
    Returns:
        The record that now stands in the folder; {} while other parts are not there.
    Raises:
        Failed: a row holds NaN or does not sum to one; nothing is left behind.
        ValueError: ids, classes and blocks do not fit each other.
    """
    record = dict(record or {})
    names, numbers = pa.array(ids, pa.string()), np.asarray(classes, dtype=np.int64)
    known = pa.nulls(len(names), pa.int64()) if labels is None else pa.array(labels, pa.int64())
    if names.null_count or len(names.unique()) != len(names) or len(np.unique(numbers)) != len(numbers):
        raise ValueError("an image id or a class id occurs twice")
    resumable = ResumableRows(folder, names, numbers, record, rows_per_shard or rows_of_a_shard(len(numbers)))
    member, split = str(record.get("job", folder)), record.get("split", "")

    def checked(missing: Rows) -> Iterator[dict[str, Half]]:
        done = 0
        for block in blocks(missing):
            rows = block.detach().half().cpu().contiguous()
            places = missing[done : done + len(rows)]
            if rows.shape != (len(places), len(numbers)):
                wanted = f"{len(places)} rows and {len(numbers)} classes"
                raise ValueError(f"a block of shape {tuple(rows.shape)} for {wanted}")
            check(rows, names.take(places), places.tolist(), member, split)
            done += len(rows)
            yield {STEM: rows.numpy()}

    def fill(staging: Path) -> dict[str, str]:
        table = pa.table({"image_id": names, "label": known})
        metadata = {"rows_per_shard": str(resumable.per_shard)}
        pq.write_table(table.replace_schema_metadata(metadata), staging / "rows.parquet")
        pq.write_table(pa.table({"class_id": numbers}), staging / "classes.parquet")
        return resumable.link(STEM, staging)

    return resumable.finish(checked, fill, part)


def open_store(folder: Path) -> Probabilities:
    """Open committed probabilities; sizes are checked, bytes are not (`commit.verify` does). Failed: there are none, or
    they are damaged."""
    record = commit.fetch(folder)
    if record is None:
        what = "holds no finished probabilities: there is no manifest, or a file has another size than it says."
        raise Failed(what, folder, _ADVICE)
    try:
        rows, classes = pq.read_table(folder / "rows.parquet"), pq.read_table(folder / "classes.parquet")
        store = Probabilities(
            folder,
            rows["image_id"].combine_chunks(),
            classes["class_id"].to_numpy(),
            rows["label"].combine_chunks(),
            record,
            int(rows.schema.metadata[b"rows_per_shard"]),
        )
        for number, low in enumerate(range(0, len(store), store.rows_per_shard)):
            expected = (min(store.rows_per_shard, len(store) - low), len(store.classes))
            shard = np.load(shard_file(folder / STEM, number), mmap_mode="r")
            if shard.shape != expected or shard.dtype != np.float16:
                raise ValueError(f"shard {number} is {shard.shape} {shard.dtype}, not {expected}")
    except (OSError, ValueError, KeyError, TypeError) as error:  # pyarrow's errors are ValueErrors and KeyErrors
        raise Failed(f"the probabilities are damaged: {error}.", folder, _ADVICE) from error
    return store


def as_labels(labels: Sequence[int] | Rows, classes: Rows) -> pa.Int64Array:
    """Class ids of rows of a class list, null where negative."""
    rows = np.asarray(labels, dtype=np.int64)
    return pa.array(classes[np.maximum(rows, 0)], pa.int64(), mask=rows < 0)


def tolerance(num_classes: int) -> float:
    """How far from one the sum of a row of float16 may lie: rounding, and what flushed to zero."""
    return float(2**-11 + num_classes * 2**-25)


def tempered(rows: Tensor, temperature: float) -> Tensor:
    """p**(1/T), made to sum to one: (n, K) -> (n, K) float64."""
    powers = rows.double().clamp_min(FLOOR).pow(1 / temperature)
    return powers / powers.sum(dim=1, keepdim=True)


def check(rows: Tensor, ids: pa.StringArray, numbers: Sequence[int], member: str, split: str = "") -> None:
    """Every row must be a distribution. Failed: naming member, image and row, by ``numbers`` (n,) in its store."""
    for low in range(0, len(rows), ROWS_PER_CHECK):
        part = rows[low : low + ROWS_PER_CHECK]
        sums = part.sum(dim=1, dtype=torch.float64)
        good = ((sums - 1).abs() <= tolerance(rows.shape[1])) & (part >= 0).all(dim=1)
        if bool(good.all()):
            continue
        bad = int(good.logical_not().nonzero()[0])
        image = f"{split} image {ids[low + bad].as_py()}".strip()
        raise Failed(
            f"the probabilities of {image} (row {numbers[low + bad]:,}) {_fault(part[bad], float(sums[bad]))}.",
            member,
            "Nothing was written. Move the alias `member` to another version, or take the member out of the plan, "
            "and submit jobs/ensemble.py.",
        )


def _fault(row: Tensor, total: float) -> str:
    if bool(row.isnan().any()):
        return "hold NaN"
    if not bool(row.isfinite().all()):
        return "hold infinity"
    if bool((row < 0).any()):
        return "hold a number below zero"
    return f"sum to {total:.6g}, not to one"

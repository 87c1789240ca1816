"""Soft labels: the largest probabilities that a teacher gives each image, the rest spread evenly (Hinton 2015).

A whole row of 50,030 float16 is 100 kB; its 64 largest and their classes are 384 bytes. A committed folder holds

    classes.npy       (n, k) int32, columns of the class list, the surest first
    probabilities.npy (n, k) float16
    rows.parquet      image_id (string), in row order
    class_ids.npy     (K,) int64

A teacher looks at millions of images for hours: what it has said is kept shard by shard (`aliprod.store.resumable`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from aliprod.catalogue.catalogue import Integers
from aliprod.errors import Refused
from aliprod.store import commit
from aliprod.store.resumable import SHARD_STEP, ResumableRows, Rows

LARGEST = 64
_ARRAYS = ("classes", "probabilities")
SHARD = 32 * SHARD_STEP  # rows that are kept together on the way: 3 MB


@dataclass(frozen=True, eq=False)
class SoftLabels:
    """What one or more teachers think of the same images, memory-mapped."""

    num_classes: int
    stores: tuple[tuple[NDArray[np.int32], NDArray[np.float16]], ...]  # of each, classes and probabilities (n, k)
    places: tuple[Integers, ...]  # (N,) the row of each image in each

    @classmethod
    def open(cls, folders: Sequence[Path], ids: pa.StringArray, class_ids: Integers) -> "SoftLabels":
        """Open the soft labels of these images, a folder a teacher. Refused: there are none, of another class list, or
        not of all the images."""
        stores, places = [], []
        for folder in folders:
            if commit.read(folder) is None:
                raise Refused("holds no finished soft labels.", folder, "Run the plan again: they are made anew.")
            own = pq.read_table(folder / "rows.parquet")["image_id"].combine_chunks()
            found = pc.index_in(ids, value_set=own)
            if found.null_count or not np.array_equal(np.load(folder / "class_ids.npy"), class_ids):
                advice = "Delete the folder and run the plan again."
                raise Refused("are soft labels of other images or classes.", folder, advice)
            places.append(found.to_numpy().astype(np.int64))
            stores.append(tuple(np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS))
        return cls(len(class_ids), tuple(stores), tuple(places))

    def rows(self, rows: Integers) -> tuple[Tensor, Tensor]:
        """Classes (n, teachers, k) int64 and probabilities (n, teachers, k) float32 of some images."""
        picked = [(c[p[rows]], q[p[rows]]) for (c, q), p in zip(self.stores, self.places, strict=True)]
        classes = np.stack([classes for classes, _ in picked], axis=1).astype(np.int64)
        return torch.from_numpy(classes), torch.from_numpy(np.stack([q for _, q in picked], axis=1).astype(np.float32))


def spread(classes: Tensor, probabilities: Tensor, num_classes: int) -> Tensor:
    """The teachers' mean distribution: each one's kept probabilities, and what is left over all its other classes.

    (n, teachers, k) of `SoftLabels.rows` -> (n, K) float32, rows sum to 1.
    """
    kept = classes.shape[2]
    rest = (1 - probabilities.sum(dim=2, keepdim=True)).clamp_min(0) / max(1, num_classes - kept)
    total = rest.sum(dim=1).expand(-1, num_classes).clone()
    for columns, own in zip(classes.unbind(1), (probabilities - rest).unbind(1), strict=True):
        total.scatter_add_(1, columns, own)  # a teacher at a time: no column twice, so the order of adding is one
    total = total.clamp_min(0)
    return total / total.sum(dim=1, keepdim=True)


def write(
    folder: Path,
    ids: pa.StringArray,
    class_ids: Integers,
    blocks: Callable[[Rows], Iterable[Tensor]],
    record: Mapping[str, Any],
    rows_per_shard: int = SHARD,
) -> None:
    """Commit a teacher's soft labels. Of a writer of the same that was killed, the finished shards are kept.

    Args:
        blocks: called with the rows that are missing, ascending and whole shards: (m, K) probabilities of those rows,
            in that order.
        rows_per_shard: a multiple of `aliprod.store.resumable.SHARD_STEP`, for the same bytes as without a stop.
    """
    kept = min(LARGEST, len(class_ids))
    resumable = ResumableRows(folder, ids, class_ids, record, rows_per_shard)

    def largest(missing: Rows) -> Iterator[dict[str, NDArray[Any]]]:
        for block in blocks(missing):
            top = torch.topk(block, kept, dim=1)
            yield {"classes": top.indices.int().cpu().numpy(), "probabilities": top.values.half().cpu().numpy()}

    def fill(staging: Path) -> None:
        for name in _ARRAYS:
            shards = [np.load(file, mmap_mode="r") for file in resumable.files(name)]
            np.save(staging / f"{name}.npy", np.concatenate(shards))
        np.save(staging / "class_ids.npy", class_ids)
        pq.write_table(pa.table({"image_id": ids}), staging / "rows.parquet")

    resumable.finish(largest, fill)

"""Features of images, once for all stages of the same frozen backbone: what it makes of one view of each, pooled.

    features-00000.npy ...   (n, F) float16, in the catalogue's order of a split
    rows.parquet             image_id (string), in row order

float16 is off by 2**-11 of a value at most, less than bfloat16's forward pass; 2.5 million x 2048 of them are 10 GB.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from aliprod.catalogue.catalogue import Images, Integers
from aliprod.errors import Failed, Refused
from aliprod.store import commit
from aliprod.store.resumable import ALL, SHARD_ROWS, Part, ResumableRows, Rows, shard_file

_STEM = "features"


@dataclass(frozen=True, eq=False)
class Features:
    """Features of images, memory-mapped: ``rows`` (N,) of those on disk, each shard ``SHARD_ROWS`` of them."""

    shards: tuple[NDArray[np.float16], ...]
    rows: Integers

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def width(self) -> int:
        return int(self.shards[0].shape[1])

    def of(self, rows: Integers) -> "Features":
        """Those of some of the images."""
        return replace(self, rows=self.rows[rows])

    def take(self, rows: Integers) -> Tensor:
        """(len(rows), F) float16, in this order."""
        shards, places = np.divmod(self.rows[rows], SHARD_ROWS)
        taken = np.empty((len(rows), self.width), np.float16)
        for shard in np.unique(shards):
            its = shards == shard
            taken[its] = self.shards[shard][places[its]]
        return torch.from_numpy(taken)


def open_features(folder: Path, images: Images) -> Features:
    """Open the features of a split. Refused: there are none, or they are of other images."""
    if commit.fetch(folder) is None:
        raise Refused("holds no finished features.", folder, "Run the plan: they are made first.")
    ids = pq.read_table(folder / "rows.parquet")["image_id"].combine_chunks()
    if not ids.equals(images.ids):
        raise Refused("are features of other images.", folder, "Delete the folder and run the plan again.")
    count = -(-len(images) // SHARD_ROWS)
    shards = tuple(np.load(shard_file(folder / _STEM, shard), mmap_mode="r") for shard in range(count))
    return Features(shards, np.arange(len(images)))


def write_features(
    folder: Path,
    images: Images,
    blocks: Callable[[Rows], Iterable[Tensor]],
    record: dict[str, Any],
    part: Part = ALL,
) -> None:
    """Write features as they come, and commit them; resumed as `ResumableRows.finish` says.

    Args:
        blocks: called with the rows that are missing, ascending and whole shards: (n, F) blocks of those rows, in that
            order.
    Raises:
        Failed: a value is not finite, or beyond float16; nothing is left behind.
    """
    rows = ResumableRows(folder, images.ids, np.empty(0, np.int64), record, SHARD_ROWS)

    def halves(missing: Rows) -> Iterator[dict[str, NDArray[np.float16]]]:
        done = 0
        for block in blocks(missing):
            half = block.half().cpu()
            if not bool((finite := half.isfinite().all(dim=1)).all()):
                bad = images.ids[int(missing[done + int((~finite).nonzero()[0])])].as_py()
                advice = 'Weights that were trained in bfloat16 may make such: say features = "computed".'
                raise Failed(f"the features of {images.split} image {bad} do not fit float16.", folder, advice)
            done += len(half)
            yield {_STEM: half.numpy()}

    def fill(staging: Path) -> dict[str, str]:
        pq.write_table(pa.table({"image_id": images.ids}), staging / "rows.parquet")
        return rows.link(_STEM, staging)

    rows.finish(halves, fill, part)

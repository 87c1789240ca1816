"""Pseudo labels on disk: which test images a stage also trains on, as what, and how sure its labellers were.

A committed folder with ``pseudo_labels.parquet``: image_id (string), class_id (int64), probability (float32). Its
record names the labellers by job and key.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from aliprod.catalogue.catalogue import Catalogue, Integers
from aliprod.errors import Refused
from aliprod.store import commit

_FILE = "pseudo_labels.parquet"


def write(
    folder: Path,
    ids: pa.StringArray,
    class_ids: Integers,
    probabilities: NDArray[np.floating[Any]],
    record: dict[str, Any],
) -> None:
    """Commit the labels of some test images, a row each."""
    table = pa.table(
        {"image_id": ids, "class_id": class_ids, "probability": np.asarray(probabilities, dtype=np.float32)}
    )
    commit.write(folder, lambda staging: pq.write_table(table, staging / _FILE), record)


def read(folder: Path, catalogue: Catalogue) -> tuple[Integers, Integers]:
    """Rows of ``catalogue.test`` and their labels (rows of ``catalogue.classes``), both (n,).

    Raises:
        Refused: there are none, or they are of another catalogue.
    """
    if commit.read(folder) is None:
        raise Refused("holds no pseudo labels.", folder, "Run the plan again: they are made anew.")
    table = pq.read_table(folder / _FILE)
    ids = table["image_id"].combine_chunks()
    rows = pc.index_in(ids, value_set=catalogue.test.ids)
    class_ids = table["class_id"].to_numpy()
    labels = np.searchsorted(catalogue.classes, class_ids).clip(max=max(0, catalogue.num_classes - 1))
    if rows.null_count or not np.array_equal(catalogue.classes[labels], class_ids):
        raise Refused("are pseudo labels of another catalogue.", folder, "Delete the folder and run the plan again.")
    return rows.to_numpy().astype(np.int64), labels.astype(np.int64)

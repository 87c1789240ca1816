"""What reading a row of a prepared catalogue costs without decoding it, against the train transform of the same row.

CATALOGUE is prepared into a folder of its own, at the default short side, and read in the order of an epoch: single
rows at random, as the loader does, once they are laid out on this machine's disk. The page cache is warm.

    python benchmarks/read_rows.py CATALOGUE [--rows 200] [--rounds 5] [--interpolation bicubic]

With ``--bucket`` the shards are in a bucket that answers after 20 ms and sends 100 MB/s (`slow_s3.py`), and this
machine has no room for pictures: batches of 32, said beforehand as loaders do, against one picture after the other.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from checkpoints import bucket
from ratio import header, interleave, ratios, show
from torch import Tensor
from transform import STAGE

from aliprod.catalogue.sources import read
from aliprod.data import augment, selection
from aliprod.data.augment import train_view
from aliprod.ingest.prepare import Settings, prepare
from aliprod.store import commit, mirror

BATCH = 32


def main() -> None:
    """Prepare, then measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("catalogue", type=Path, metavar="CATALOGUE")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--interpolation", choices=["bicubic", "bilinear"], default="bicubic")
    parser.add_argument("--bucket", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print(header(), f"decoder {'simplejpeg' if augment.simplejpeg else 'Pillow'}", asked.interpolation, sep=", ")
    if asked.bucket:
        from_a_bucket(asked.catalogue, asked.rows, asked.rounds)
        return
    with tempfile.TemporaryDirectory(prefix="read-rows-") as folder:
        os.environ["ALIPROD_CACHE"] = f"{folder}/cache"
        for _ in prepare(asked.catalogue, Path(folder) / "prepared", Settings()):
            pass
        images = read(Path(folder) / "prepared").train
        order = selection.order(len(images), 0, 0).tolist()
        for name, rows in {"a": order[: asked.rows], "b": order[asked.rows : 2 * asked.rows]}.items():
            jpegs = {row: images.source(row) for row in rows}

            def transform(row: int, number: int, jpegs: dict[int, Path | bytes] = jpegs) -> Tensor:
                return train_view(augment.picture_of(jpegs[row]), STAGE, 1000 * number + row, asked.interpolation)[0]

            reading, view = interleave(
                {"reading": lambda row, _: images.source(row), "transform": transform}, rows, asked.rounds
            )
            show(f"set {name}, {len(rows)} rows", reading, view, "us", 1e6)
            share = statistics.median(1 / found for found in ratios(reading, view))
            print(f"reading takes {share:.2%} of the transform's time (bar: <= 2 %)")


def from_a_bucket(catalogue: Path, count: int, rounds: int) -> None:
    """Read pictures that have no room here."""
    with tempfile.TemporaryDirectory(prefix="read-rows-") as folder, bucket() as storage:
        local = Path(folder) / "prepared"
        for _ in prepare(catalogue, local, Settings()):
            pass
        names = commit.digests(local)
        commit.write(
            storage, lambda new: [shutil.copy(local / name, new) for name in names] and None, commit.read(local)
        )
        os.environ["ALIPROD_CACHE"] = f"{folder}/cache"
        os.environ["ALIPROD_CACHE_GB"] = "0"
        images = read(mirror.here(mirror.local(mirror.shown(storage)))).train
        rows = selection.order(len(images), 0, 0).tolist()[: count - count % BATCH]
        images.source(0)

        def ahead(start: int, _: int) -> None:
            images.ask(rows[start : start + BATCH])
            one_by_one(start, _)

        def one_by_one(start: int, _: int) -> None:
            for row in rows[start : start + BATCH]:
                images.source(row)

        sides = {"one after the other": one_by_one, "said beforehand": ahead}
        slow, fast = interleave(sides, range(0, len(rows), BATCH), rounds, time.perf_counter)
        show(f"{len(rows)} rows, wall time", fast, slow, "ms a batch", 1e3)


if __name__ == "__main__":
    main()

"""What reading a row of a prepared catalogue costs without decoding it, against the train transform of the same row.

CATALOGUE is prepared into a folder of its own, at the default short side, and read in the order of an epoch: single
rows at random, as the loader does, once they are laid out on this machine's disk. The page cache is warm.

    python benchmarks/read_rows.py CATALOGUE [--rows 200] [--rounds 5] [--interpolation bicubic]
"""

import argparse
import os
import statistics
import tempfile
from pathlib import Path

import torch
from ratio import header, interleave, ratios, show
from torch import Tensor
from transform import STAGE

from aliprod.catalogue.sources import read
from aliprod.data import augment, selection
from aliprod.data.augment import train_view
from aliprod.ingest.prepare import Settings, prepare


def main() -> None:
    """Prepare, then measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("catalogue", type=Path, metavar="CATALOGUE")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--interpolation", choices=["bicubic", "bilinear"], default="bicubic")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print(header(), f"decoder {'simplejpeg' if augment.simplejpeg else 'Pillow'}", asked.interpolation, sep=", ")
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


if __name__ == "__main__":
    main()

"""What it takes to fit an ensemble and to compare it with its members, at a size that does not fit here.

Members are those of ensemble_sum.py, with labels. Fitting (temperatures, then greedy or mixed weights, each six times)
and comparing (every member, the ensemble without each, its best parts, 1,000 draws) go over all probabilities row by
row, so their CPU time is measured at two numbers of images of all classes, and what a further image takes is multiplied
up. That nothing grows faster than the images, two larger numbers of few classes show. Memory is the largest growth of
what no file stands behind. Probabilities come from the page cache: at full size a disk has to give them, once for each
pass, of which fitting makes one and comparing three.

    python benchmarks/ensemble_compare.py [--rows 128 384] [--members 11] [--classes 50030]
        [--full 150000] [--images 2000 8000]
"""

import argparse
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from ensemble_sum import anonymous, write
from ratio import cpu, header

from aliprod.ensemble.choose import Combination, fit
from aliprod.ensemble.compare import compare
from aliprod.inference import probabilities

FEW_CLASSES = 16
Result = TypeVar("Result")


def main() -> None:
    """Measure at both sizes, and print what follows for the full one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs=2, default=[128, 384])
    parser.add_argument("--members", type=int, default=11)
    parser.add_argument("--classes", type=int, default=50_030)
    parser.add_argument("--full", type=int, default=150_000)
    parser.add_argument("--images", type=int, nargs=2, default=[2000, 8000])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print(header(("torch", "numpy", "pyarrow")))
    measured(asked.members, 16, FEW_CLASSES)  # what is imported and allocated once
    for classes, (few, many) in ((asked.classes, asked.rows), (FEW_CLASSES, asked.images)):
        at_few, at_many = (measured(asked.members, rows, classes) for rows in (few, many))
        print(f"{classes:,} classes, {asked.members} members:")
        for what, (seconds, megabytes) in at_many.items():
            image = (seconds - at_few[what][0]) / (many - few)
            each = [f"{at_few[what][0]:.2f} s for {few:,} images", f"{seconds:.2f} s for {many:,}"]
            each += [f"{1000 * image:.2f} ms a further image", f"{megabytes:.0f} MB"]
            hours = image * asked.full / 3600
            print(f"  {what}: {', '.join(each)}; computed for {asked.full:,}: {hours:.2f} h of one core")


def measured(members: int, rows: int, classes: int) -> dict[str, tuple[float, float]]:
    """Seconds of CPU and megabytes of each step."""
    folder = Path(tempfile.mkdtemp(prefix="ensemble-compare-"))
    try:
        write(folder, members, rows, classes, seed=0)
        stores = [probabilities.open_store(path) for path in sorted(folder.iterdir())]
        fitted, greedy = taken(lambda: fit(stores, "greedy", 0))
        _, mixed = taken(lambda: fit(stores, "weights", 0))
        _, plain = taken(lambda: compare(stores, [Combination((1,) * members)], 0))
        _, cross = taken(lambda: compare(stores, fitted, 0))
    finally:
        shutil.rmtree(folder)
    return {"fit greedy": greedy, "fit weights": mixed, "compare the sum": plain, "compare what was fitted": cross}


def taken(work: Callable[[], Result]) -> tuple[Result, tuple[float, float]]:
    """What a piece of work gives, its seconds of CPU, and by how many megabytes memory grew, looked at every 2 ms."""
    before, seen, ended = anonymous(), [0.0], threading.Event()

    def look() -> None:
        while not ended.wait(0.002):
            seen.append(anonymous() - before)

    thread, began = threading.Thread(target=look), cpu()
    thread.start()
    result = work()
    seconds = cpu() - began
    ended.set()
    thread.join()
    return result, (seconds, max(seen))


if __name__ == "__main__":
    main()

"""What opening a catalogue of 2.5 million rows costs, against the listing of torchvision's ImageFolder.

Both sides in processes of their own, alternating: CPU time with children, and what the peak of memory grew by. Ours
opens a prepared catalogue of all rows whose shards hold no pictures (opening looks at their sizes alone). ImageFolder
lists a real tree of fewer, empty files on a warm cache, and is scaled by the rows: that is its best case.

The ratio is above 5 because the sides do not do the same work for the same result: ours reads one file of columns,
written once by `data prepare`, where a listing asks the file system for every name.

    python benchmarks/open_rows.py [--rows 2500000] [--files 100000] [--rounds 5]
"""

import argparse
import json
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa

from aliprod.catalogue import shards
from aliprod.catalogue.catalogue import Catalogue, Images
from aliprod.ingest.prepare import SHARD
from aliprod.store import commit

CLASSES = 50_030


def main() -> None:
    """Compare, or be one of the sides."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_500_000)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--side", choices=["ours", "torchvision"], help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.side:
        print(json.dumps(measured(asked.side, asked.path)))
        return
    folder = Path(tempfile.mkdtemp(prefix="open-rows-"))
    try:
        compare(folder, asked.rows, asked.files, asked.rounds)
    finally:
        shutil.rmtree(folder)


def compare(folder: Path, rows: int, files: int, rounds: int) -> None:
    """Both sides, alternating."""
    write_catalogue(folder / "prepared", rows)
    write_tree(folder / "tree", files)
    runs: dict[str, list[dict[str, float]]] = {"ours": [], "torchvision": []}
    for side, path in [("ours", "prepared"), ("torchvision", "tree")] * rounds:
        command = [sys.executable, __file__, "--side", side, "--path", str(folder / path)]
        runs[side].append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    if {run["rows"] for run in runs["ours"]} != {rows} or {run["rows"] for run in runs["torchvision"]} != {files}:
        sys.exit("not all rows were opened")
    names = ("torch", "torchvision", "pyarrow", "numpy")
    print(platform.processor() or platform.machine(), *(f"{name} {version(name)}" for name in names), sep=", ")
    scale = rows / files
    seconds = show(f"aliprod, {rows:,} rows", runs["ours"], 1)
    theirs = show(f"ImageFolder, {files:,} files x {scale:g}", runs["torchvision"], scale)
    print(f"ratio {theirs / seconds:.1f} (bar: <= 1 s CPU, <= 100 MB a process)")


def show(name: str, runs: list[dict[str, float]], scale: float) -> float:
    """Print the median and the spread of a side; the median of its seconds."""
    seconds = [scale * run["seconds"] for run in runs]
    megabytes = statistics.median(scale * run["megabytes"] for run in runs)
    middle = statistics.median(seconds)
    print(f"{name}: {middle:.2f} s CPU ({min(seconds):.2f} to {max(seconds):.2f}), {megabytes:.0f} MB")
    return middle


def measured(side: str, path: Path) -> dict[str, float]:
    """Open once, in this process."""
    if side == "ours":
        from aliprod.catalogue.sources import read as opened
    else:
        from torchvision.datasets import ImageFolder as opened  # type: ignore[assignment]
    memory, seconds = peak(), cpu()
    rows = opened(path)
    count = len(rows.train) if isinstance(rows, Catalogue) else len(rows)
    if isinstance(rows, Catalogue) and len(rows.fingerprint) != 64:
        sys.exit("no fingerprint")
    return {"rows": count, "seconds": cpu() - seconds, "megabytes": (peak() - memory) / 1000}


def cpu() -> float:
    """Seconds, with children."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def peak() -> float:
    """The largest resident memory so far, kB. Not ru_maxrss, in which a child begins with its parent's."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return float(status.partition("VmHWM:")[2].split()[0])


def write_catalogue(out: Path, rows: int) -> None:
    """A manifest, the ids and labels of ``rows`` training images, and shards without a byte."""
    draw = np.random.default_rng(0)
    numbers = draw.permutation(np.arange(1_000_000, 1_000_000 + rows))
    ids = pa.array([f"{number}.jpg" for number in numbers.tolist()])
    labels = np.sort(np.append(np.arange(CLASSES), draw.integers(0, CLASSES, rows - CLASSES)))
    none, nothing = pa.array([], pa.string()), np.empty(0, np.int64)
    catalogue = Catalogue(
        root=out,
        classes=np.arange(CLASSES),
        names=("a name of some length",) * CLASSES,
        train=Images("train", ids, labels, ids, out),
        val=Images("val", none, nothing, none, out),
        test=Images("test", none, nothing, none, out),
        test_labels=None,
        ancestor=np.stack([np.arange(CLASSES) // 1000, np.arange(CLASSES) // 100, np.arange(CLASSES)]),
        problems=(),
    )
    sizes = [(min(SHARD, rows - start), 0) for start in range(0, rows, SHARD)]
    record = shards.Record(
        prepared=shards.FORMAT,
        short_side=512,
        quality=90,
        source="",
        content="",
        classes=catalogue.classes.tolist(),
        names=list(catalogue.names),
        ancestor=None if catalogue.ancestor is None else catalogue.ancestor.tolist(),
        counts={"train": catalogue.class_counts.tolist(), "val": [0] * CLASSES},
        test_labels=False,
        shards={"train": sizes, "val": [], "test": []},
        skipped=[],
        problems=[],
    )

    def fill(folder: Path) -> None:
        for images in catalogue.splits:
            shards.write_rows(folder, images.split, images.ids, images.labels)
        for name in record.file_names():
            (folder / name).touch()

    commit.write(out, fill, record.model_dump())


def write_tree(root: Path, files: int) -> None:
    """50 empty files a class, as many as AliProducts has."""
    for start in range(0, files, 50):
        folder = root / f"{start // 50:05}"
        folder.mkdir(parents=True)
        for number in range(start, min(start + 50, files)):
            (folder / f"{number:07}.jpg").touch()


if __name__ == "__main__":
    main()

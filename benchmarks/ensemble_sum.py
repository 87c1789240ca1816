"""What the exact sum of an ensemble with its arg max costs, against a plain read of the same arrays, on one core.

Members are committed stores of float16 probabilities (softmax of random logits), mapped from the page cache. The other
side copies the same rows into a small buffer and does nothing with them. Ours adds them exactly, checks that rows are
distributions and finds the five highest sums; sums and arg max are first compared with NumPy's in float64. The memory
of both row counts is the largest anonymous resident memory of a process of its own: mapped files are not counted.

    python benchmarks/ensemble_sum.py [--rows 256 1024] [--members 11] [--classes 50030] [--rounds 7] [--seeds 0 1]
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from ratio import alternate, header, show
from torch import Tensor

from aliprod.ensemble.add import MatchedMembers, each_block, match
from aliprod.inference import probabilities

BUFFER = 2**18  # entries of the other side's buffer: it stays in a core's cache
BAR = "bar >= 0.28, stretch 0.40"


def main() -> None:
    """Compare, or measure the memory of one sum."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs=2, default=[256, 1024])
    parser.add_argument("--members", type=int, default=11)
    parser.add_argument("--classes", type=int, default=50_030)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--memory-of", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.memory_of:
        print(json.dumps(memory_of(asked.memory_of)))
        return
    print(header(("torch", "numpy", "pyarrow")))
    for seed in asked.seeds:
        folder = Path(tempfile.mkdtemp(prefix="ensemble-sum-"))
        try:
            compare(folder, asked.rows, asked.members, asked.classes, seed, asked.rounds)
        finally:
            shutil.rmtree(folder)


def compare(folder: Path, row_counts: list[int], members: int, classes: int, seed: int, rounds: int) -> None:
    """Equal sums first, then both sides in turn, then the memory at two row counts."""
    few, many = (folder / f"{rows}" for rows in row_counts)
    for place, rows in zip((few, many), row_counts, strict=True):
        write(place, members, rows, classes, seed)
    ensemble = opened(many)  # larger than a cache
    check(ensemble)
    sides = {"exact sum and arg max": lambda: summed(ensemble), "plain read": lambda: read(ensemble)}
    ours, theirs = alternate(sides, rounds)
    print(f"seed {seed}: {members} members, {row_counts[1]} rows, {classes:,} classes; sums and arg max equal NumPy's")
    show(f"fraction of a plain read ({BAR})", ours, theirs)
    megabytes = [measured(place) for place in (few, many)]
    print(f"  memory: {megabytes[0]:.0f} MB for {row_counts[0]} rows, {megabytes[1]:.0f} MB for {row_counts[1]} rows")


def write(folder: Path, members: int, rows: int, classes: int, seed: int) -> None:
    """Members that mostly agree on each image's class."""
    ids = [str(1_000_000 + row) for row in range(rows)]
    truth = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(seed))
    for member in range(members):
        own = partial(blocks, truth, classes, seed, member)
        probabilities.write(folder / str(member), ids, np.arange(classes), own, truth.tolist())


def blocks(truth: Tensor, classes: int, seed: int, member: int, rows: np.ndarray) -> Iterator[Tensor]:
    """Softmax of normal logits with a random bonus for the true class, 64 rows at a time."""
    draw = torch.Generator().manual_seed(1000 * seed + member)
    for labels in truth[rows].split(64):
        logits = 2 * torch.randn(len(labels), classes, generator=draw)
        logits[torch.arange(len(labels)), labels] += 16 * torch.rand(len(labels), generator=draw)
        yield logits.softmax(dim=1)


def opened(folder: Path) -> MatchedMembers:
    """All members, matched."""
    return match([probabilities.open_store(path) for path in sorted(folder.iterdir())])


def summed(ensemble: MatchedMembers) -> Tensor:
    """The columns of the five highest sums of each row."""
    return torch.cat([block.columns for block in each_block(ensemble)])


def read(ensemble: MatchedMembers) -> None:
    """Every entry of every member into one small buffer."""
    buffer = np.empty(BUFFER, np.float16)
    for member in ensemble.members:
        for low in range(0, len(member), 256):
            flat = member.take(np.arange(low, min(low + 256, len(member)))).reshape(-1)
            for start in range(0, len(flat), BUFFER):
                piece = flat[start : start + BUFFER]
                np.copyto(buffer[: len(piece)], piece)


def check(ensemble: MatchedMembers) -> None:
    """Sums and arg max against float64."""
    for block in each_block(ensemble, 16):
        rows = [member.take(np.arange(block.low, block.high)).astype(np.float64) for member in ensemble.members]
        sums = np.sum(rows, axis=0)
        if not np.array_equal(block.rounded.numpy(), sums.astype(np.float32)):
            sys.exit("the sums are not exact")
        if not np.array_equal(block.columns[:, 0].numpy(), sums.argmax(axis=1)):
            sys.exit("the arg max is another")


def measured(folder: Path) -> float:
    """Megabytes that a process of its own takes for the sum, beyond what it takes for its imports."""
    command = [sys.executable, __file__, "--memory-of", str(folder)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(json.loads(answer.splitlines()[-1]))


def memory_of(folder: Path) -> float:
    """The largest growth of anonymous memory while adding up, looked at every 2 ms."""
    ensemble, before, seen, ended = opened(folder), anonymous(), [0.0], threading.Event()

    def look() -> None:
        while not ended.wait(0.002):
            seen.append(anonymous() - before)

    thread = threading.Thread(target=look)
    thread.start()
    summed(ensemble)
    ended.set()
    thread.join()
    return max(seen)


def anonymous() -> float:
    """Megabytes of this process that no file stands behind."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return float(status.partition("RssAnon:")[2].split()[0]) / 1000


if __name__ == "__main__":
    main()

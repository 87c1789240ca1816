"""What checkpoints at the default interval (one an epoch) cost a job, against none.

The same job with and without, in turn, in one process: wall time (what a user waits) and CPU time of all threads (what
the writer takes, too). Weights must be equal to the bit. The share hangs on the length of an epoch, so the cost of one
checkpoint is told as well, and from which length of an epoch on it is under 2 %.

    python benchmarks/checkpoints.py [--network resnet18] [--images 960] [--epochs 3] [--rounds 3] [--seeds 0 1]

With ``--bucket`` storage is a bucket that answers after 20 ms and takes 100 MB/s (`slow_s3.py`), the side without
checkpoints a folder: the end of a job, which sends its weights, is timed too.
"""

import argparse
import logging
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from ratio import Side, cpu, header, show

from aliprod.catalogue import sources
from aliprod.catalogue.catalogue import Catalogue
from aliprod.recipe import Machine, Stage, TrainingJob
from aliprod.store import commit, mirror
from aliprod.store.bucket import opened
from aliprod.synth.synth import synthesise
from aliprod.training import job
from aliprod.training.checkpoint import Background

NEVER = 1e9


def main() -> None:
    """Compare over two sets of pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet18")
    parser.add_argument("--images", type=int, default=960)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--bucket", action="store_true")
    asked = parser.parse_args()
    logging.disable(logging.WARNING)
    print(header())
    for seed in asked.seeds:
        folder = Path(tempfile.mkdtemp(prefix="checkpoints-"))
        try:
            synthesise(folder / "photos", classes=8, images=asked.images, seed=seed)
            catalogue = sources.read(folder / "photos")
            catalogue = replace(catalogue, val=catalogue.val.take(np.arange(0)))
            with bucket() if asked.bucket else nullcontext(folder) as storage:
                compare(folder, storage, catalogue, seed, asked)
        finally:
            shutil.rmtree(folder)


@contextmanager
def bucket() -> Iterator[Path]:
    """The mirror of a bucket that is slow."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, Path(__file__).with_name("slow_s3.py"), "--port", str(port)]
    address = f"http://127.0.0.1:{port}"
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as server, tempfile.TemporaryDirectory() as cache:
        os.environ |= keys | {"AWS_ENDPOINT_URL": address, "ALIPROD_CACHE": cache}
        for _ in range(300):
            with suppress(OSError):
                urllib.request.urlopen(urllib.request.Request(f"{address}/team", method="PUT")).close()
                break
            time.sleep(0.1)
        opened.cache_clear()  # the bucket of another server
        yield mirror.local("s3://team/storage")
        server.kill()


def compare(folder: Path, storage: Path, catalogue: Catalogue, seed: int, asked: argparse.Namespace) -> None:
    """With, in ``storage``, and without, in a folder, in turn."""
    network, epochs, rounds = asked.network, asked.epochs, asked.rounds
    stage = Stage(seed=seed, resize=64, crop=64, batch_size=16, epochs=epochs, ema=0.99, augmentation=("resize",))
    walls: dict[str, list[float]] = {"with": [], "without": []}
    waits: dict[str, list[float]] = {"with": [], "without": []}
    cpus: dict[str, list[float]] = {"with": [], "without": []}
    digests = set[str]()
    megabytes = size(TrainingJob("net/stage", "size", network, stage, folder / "size"), catalogue)
    for _ in range(rounds):
        for side, place, seconds in (("with", storage, 0.0), ("without", folder, NEVER)):
            work = TrainingJob("net/stage", side, network, stage, place / side, machine=Machine(save_seconds=seconds))
            wall, cpu_before = time.perf_counter(), cpu()
            with waited() as waiting:
                for _ in job.run(work, catalogue):
                    pass
            walls[side].append(time.perf_counter() - wall)
            waits[side].append(sum(waiting))
            cpus[side].append(cpu() - cpu_before)
            digests.add(commit.digests(work.folder / "weights")["model.safetensors"])
            commit.remove(work.folder)
    if len(digests) > 1:
        sys.exit("no equal work: other weights")
    print(f"seed {seed}: {network}, {epochs} epochs, {epochs - 1} checkpoints of {megabytes:.0f} MB, equal weights")
    for side, seconds in waits.items():
        share = sum(seconds) / sum(walls[side])
        print(f"{side} checkpoints the training waited for storage {share:.2%} of its time (bar 2 %)")
    for clock, taken in (("wall", walls), ("CPU", cpus)):
        without, with_ = (Side(f"{name} checkpoints", tuple(taken[name])) for name in ("without", "with"))
        show(f"{clock}, with / without (bar <= 1.02)", without, with_)
        cost = statistics.median(a - b for a, b in zip(with_.rounds, without.rounds, strict=True)) / (epochs - 1)
        print(f"  {cost:.2f} s a checkpoint: 2 % of an epoch of {50 * max(0.0, cost):.0f} s")


def wrapped(timed: Callable[..., Any], whole: Callable[..., Any]) -> Callable[..., Any]:
    """A function or method that is timed."""
    return lambda *arguments, **options: timed(whole, *arguments, **options)


@contextmanager
def waited() -> Iterator[list[float]]:
    """The seconds that the thread that trains waits for what is written: checkpoints, lines of metrics, weights."""
    seconds, training, at_work = list[float](), threading.get_ident(), False

    def timed(whole: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        nonlocal at_work
        if at_work or threading.get_ident() != training:
            return whole(*arguments, **options)
        began, at_work = time.perf_counter(), True
        try:
            return whole(*arguments, **options)
        finally:
            at_work = False
            seconds.append(time.perf_counter() - began)

    writes = [(commit, "write"), (commit, "remove"), (commit, "refresh"), (commit, "send")]
    with ExitStack() as patches:
        for owner, name in (*writes, (Background, "start"), (Background, "wait")):
            patches.enter_context(mock.patch.object(owner, name, wrapped(timed, getattr(owner, name))))
        yield seconds


def size(work: TrainingJob, catalogue: Catalogue) -> float:
    """Megabytes of the checkpoint that the first epoch leaves; a run that is not timed."""
    training = job.run(work, catalogue)
    next(training)
    training.close()  # type: ignore[attr-defined]
    (checkpoint,) = work.folder.glob("resume/step-*")
    if commit.read(checkpoint) is None:
        sys.exit("no checkpoint was written")
    return sum(path.stat().st_size for path in checkpoint.iterdir()) / 1e6


if __name__ == "__main__":
    main()

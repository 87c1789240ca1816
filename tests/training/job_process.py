"""A process of a job, as tests start them: it may be killed at a named moment, and leaves what each rank saw."""

import hashlib
import json
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from aliprod.catalogue import sources
from aliprod.errors import AliprodError
from aliprod.recipe import TrainingJob, never
from aliprod.training.job import run


@dataclass(frozen=True)
class Death:
    """SIGKILL at the ``count``-th audit event of this name (Python's own: open, os.rename ...) on such a path."""

    event: str
    path: str
    count: int = 1


def start(
    jobs: TrainingJob | list[TrainingJob],
    catalogue: Path,
    death: Death | None = None,
    rank: int = 0,
    world_size: int = 1,
    end: int = 0,
) -> BaseProcess:
    """Start a rank of one job, or of several in turn, as a process, forked from one that has imported what it needs.

    Args:
        end: the last rank says that the job is to stop when it is asked for the so manieth time: once after each
            step, and once before each block of a scoring. The others hear of it at the next question.
    """
    jobs = jobs if isinstance(jobs, list) else [jobs]
    process = multiprocessing.get_context("forkserver").Process(
        target=_train, args=(jobs, catalogue, death, rank, world_size, end)
    )
    process.start()
    return process


def train(job: TrainingJob, catalogue: Path, death: Death | None = None) -> int:
    """Exit code of a job of one rank."""
    return ended(start(job, catalogue, death))


def ended(process: BaseProcess, seconds: float = 120) -> int:
    """Exit code of a process, which is killed where it hangs."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise TimeoutError("the job hangs")
    return process.exitcode


def log_of(job: TrainingJob, rank: int = 0) -> str:
    return (job.folder / f"log-{rank}.txt").read_text()


def seen_by(job: TrainingJob, rank: int) -> list[dict[str, int | str]]:
    """What a rank saw at the end of each epoch: its threads, and the sha256 of its weights and buffers."""
    return [json.loads(line) for line in (job.folder / f"rank-{rank}.jsonl").read_text().splitlines()]


def sha256(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _train(jobs: list[TrainingJob], catalogue: Path, death: Death | None, rank: int, world_size: int, end: int) -> None:
    folder = jobs[0].folder
    folder.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"stderr-{rank}.txt").open("w") as stderr:
        os.dup2(stderr.fileno(), 2)
    logging.basicConfig(filename=folder / f"log-{rank}.txt", level=logging.INFO)
    if world_size > 1:
        meeting = folder.with_suffix(".meeting")
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size)
    if death is not None:
        _arm(death)
    try:
        for job in jobs:
            _train_one(job, catalogue, rank, end if rank == world_size - 1 else 0)
    except AliprodError as error:
        logging.getLogger().error("%s", error)
        sys.exit(error.status)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _train_one(job: TrainingJob, catalogue: Path, rank: int, end: int) -> None:
    job.folder.mkdir(parents=True, exist_ok=True)
    with (job.folder / f"rank-{rank}.jsonl").open("a") as seen:
        for progress in run(job, sources.read(catalogue), _asked(end) if end else never):
            if progress.last is not None:
                line = {"threads": torch.get_num_threads(), "weights": sha256(progress.last.tensors)}
                seen.write(json.dumps(line) + "\n")


def _asked(often: int) -> Callable[[], bool]:
    questions = count(1)
    return lambda: next(questions) >= often


def _arm(death: Death) -> None:
    left = death.count

    def die(event: str, args: tuple[object, ...]) -> None:
        nonlocal left
        if event == death.event and death.path in f"{args[:2]}":
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(die)

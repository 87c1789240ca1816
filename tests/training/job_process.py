"""A process of a job, as tests start them: it may be killed at a named moment, and leaves what each rank saw."""

import hashlib
import json
import logging
import multiprocessing
import os
import signal
import sys
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from aliprod.catalogue import sources
from aliprod.errors import AliprodError
from aliprod.training.job import run
from aliprod.training.training_job import TrainingJob


@dataclass(frozen=True)
class Death:
    """SIGKILL at the ``count``-th audit event of this name (Python's own: open, os.rename ...) on such a path."""

    event: str
    path: str
    count: int = 1


def start(
    job: TrainingJob, catalogue: Path, death: Death | None = None, rank: int = 0, world_size: int = 1
) -> BaseProcess:
    """Start a rank of a job as a process of its own, forked from a clean one that has imported what it needs."""
    process = multiprocessing.get_context("forkserver").Process(
        target=_train, args=(job, catalogue, death, rank, world_size)
    )
    process.start()
    return process


def train(job: TrainingJob, catalogue: Path, death: Death | None = None) -> int:
    """Exit code of a job of one rank."""
    return ended(start(job, catalogue, death))


def ended(process: BaseProcess) -> int:
    """Exit code of a process, which is killed where it hangs."""
    process.join(120)
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


def _train(job: TrainingJob, catalogue: Path, death: Death | None, rank: int, world_size: int) -> None:
    job.folder.mkdir(parents=True, exist_ok=True)
    with (job.folder.parent / f"stderr-{rank}.txt").open("w") as stderr:
        os.dup2(stderr.fileno(), 2)
    logging.basicConfig(filename=job.folder / f"log-{rank}.txt", level=logging.INFO)
    if world_size > 1:
        meeting = job.folder.with_suffix(".meeting")
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size)
    if death is not None:
        _arm(death)
    try:
        with (job.folder / f"rank-{rank}.jsonl").open("a") as seen:
            for progress in run(job, sources.read(catalogue)):
                if progress.last is not None:
                    line = {"threads": torch.get_num_threads(), "weights": sha256(progress.last.tensors)}
                    seen.write(json.dumps(line) + "\n")
    except AliprodError as error:
        logging.getLogger().error("%s", error)
        sys.exit(error.status)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _arm(death: Death) -> None:
    left = death.count

    def die(event: str, args: tuple[object, ...]) -> None:
        nonlocal left
        if event == death.event and death.path in f"{args[:2]}":
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(die)

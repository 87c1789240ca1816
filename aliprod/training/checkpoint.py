"""The resume state of a job: everything it needs to go on bit for bit. Tensors in safetensors, the rest in JSON."""

import json
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from aliprod.store import commit
from aliprod.training.candidates import Candidate
from aliprod.training.ema import Average
from aliprod.training.learner import Learner
from aliprod.training.optimizer import Optimizer

Fill = Callable[[Path], None]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingState:
    """Where a job stands. Counters start at 0. ``losses``: sums of this epoch's loss parts so far. ``best``: the best
    candidate so far; None before the first epoch has ended."""

    epoch: int = 0
    step: int = 0
    step_in_epoch: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    best: Candidate | None = None


def snapshot(state: TrainingState, learner: Learner, optimizer: Optimizer, average: Average | None) -> Fill:
    """Copy the resume state to the CPU: training may go on while the result writes it into a folder that
    `aliprod.store.commit.write` hands out. Not the best weights, which nobody changes. Synchronises with the device."""
    files = {"learner": learner.state_dict(), "optimizer": optimizer.state()}
    if average is not None:
        files["average"] = average.state(learner.model)
    copies = {name: {key: _copy(tensor) for key, tensor in tensors.items()} for name, tensors in files.items()}
    if learner.place.device.type == "cuda":
        torch.cuda.synchronize(learner.place.device)
    facts, best = vars(state), state.best
    if best is not None:
        copies["best"] = best.tensors
        facts = facts | {"best": {"epoch": best.epoch, "kind": best.kind, "top1_error": best.top1_error}}

    def fill(folder: Path) -> None:
        for name, tensors in copies.items():
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / f"{name}.safetensors")
        (folder / "state.json").write_text(json.dumps(facts), encoding="utf-8")

    return fill


def restore(folder: Path, learner: Learner, optimizer: Optimizer, average: Average | None) -> TrainingState:
    """Load what a `snapshot` wrote."""
    commit.fetch(folder)  # another rank's machine may have written it
    learner.load_state_dict(load_file(folder / "learner.safetensors"))
    optimizer.load_state(load_file(folder / "optimizer.safetensors"))
    if average is not None:
        average.load(load_file(folder / "average.safetensors"))
    facts = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    if facts["best"] is not None:
        facts["best"] = Candidate(**facts["best"], tensors=load_file(folder / "best.safetensors"))
    return TrainingState(**facts)


def newest(folder: Path) -> Path | None:
    """The newest undamaged checkpoint of a job; damaged ones are set aside, each with one line in the log."""
    for candidate in sorted(_committed(folder), reverse=True):
        damaged = commit.verify(candidate)
        if not damaged:
            return candidate
        aside = candidate.with_name(f"{candidate.name}.bad")
        commit.set_aside(candidate, aside)
        log.warning("%s is damaged (%s): set aside, going on from the one before.", candidate, ", ".join(damaged))
    return None


def write(place: Path, fill: Fill, record: dict[str, Any]) -> None:
    """Commit a snapshot as a checkpoint, then drop the old ones beside it."""
    commit.write(place, fill, record)
    prune(place.parent)


def prune(folder: Path) -> None:
    """Keep the newest two."""
    for old in sorted(_committed(folder))[:-2]:  # the newest may be damaged: the one before is then used
        commit.remove(old)


def last_time(folder: Path, began: float) -> float:
    """When the newest checkpoint was written, in seconds since the epoch; ``began`` where there is none."""
    return max((path.stat().st_mtime for path in _committed(folder)), default=began)


def place_of(folder: Path, state: TrainingState) -> Path:
    """Where the checkpoint of a state lies: names sort by step."""
    return folder / f"step-{state.step:010d}"


def _committed(folder: Path) -> list[Path]:
    return [path for path in folder.glob("step-*") if path.suffix != ".bad"]


def _copy(tensor: Tensor) -> Tensor:
    """A copy on the CPU, in pinned memory (which PyTorch keeps for the next one) where it comes from a GPU."""
    empty = torch.empty_like(tensor, device="cpu", requires_grad=False, pin_memory=tensor.is_cuda)
    return empty.copy_(tensor.detach(), non_blocking=True)


class Background:
    """A thread for writes. An error of a write is raised once: by the next `check`, `start` or `wait`."""

    def __init__(self, thread: Executor) -> None:
        self._thread = thread
        self._write: Future[None] | None = None

    def start(self, prepare: Callable[[], Callable[[], None]]) -> None:
        """Wait for the write before (``prepare`` makes copies, and memory has room for one set), call ``prepare``
        here, and what it returns in the thread."""
        if self._write is not None and not self._write.done():
            log.info("The checkpoint before is still being written: training waits for it.")
        self.wait()
        self._write = self._thread.submit(prepare())

    def check(self) -> None:
        """Raise the error of a write that has ended. Takes a microsecond."""
        if self._write is not None and self._write.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the write under way."""
        write, self._write = self._write, None
        if write is not None:
            write.result()


@contextmanager
def background() -> Iterator[Background]:
    """A thread for writes. Leaving the context waits for the one under way; leaving it well raises its error, too."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint") as thread:
        writer = Background(thread)
        yield writer
    writer.wait()

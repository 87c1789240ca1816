"""train(): one job, read from top to bottom. It knows no Ray and no MLflow: it yields, whoever iterates decides."""

import math
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from aliprod.catalogue.catalogue import Catalogue
from aliprod.data.loader import Batch, TrainBatches
from aliprod.data.training_set import TrainingSet, training_set
from aliprod.errors import NonFiniteLoss, listing
from aliprod.models import weights
from aliprod.randomness import seed_of
from aliprod.recipe import Stage
from aliprod.training import checkpoint
from aliprod.training.candidates import Candidate, best_candidate
from aliprod.training.checkpoint import Snapshot, TrainingState
from aliprod.training.ema import Average
from aliprod.training.learner import Learner, Place, place, set_up
from aliprod.training.optimizer import Optimizer
from aliprod.training.watchdog import Watchdog

_Seen = tuple[dict[str, float], list[str]]  # loss parts and image ids of a step on one rank

_CHECK_STEPS = 50  # a non-finite loss is noticed within so many steps; the weights are safe at once


@dataclass(frozen=True)
class EpochEnd:
    """What an epoch leaves: the best candidate so far and this epoch's own, which may be the same."""

    best: Candidate
    last: Candidate


@dataclass(frozen=True)
class Progress:
    """What a job tells, in the same places on every rank.

    Attributes:
        metrics: numbers by name: ``train/...`` of this rank, ``val/...`` of all.
        snapshot: copies the resume state.
        end: None in mid-epoch, where only a checkpoint is due.
    """

    state: TrainingState
    metrics: dict[str, float]
    snapshot: Callable[[], Snapshot]
    place: Place
    end: EpochEnd | None = None

    def capture(self, folder: Path) -> None:
        """Write a resume checkpoint into an empty folder."""
        self.snapshot().write(folder)


def train(
    stage: Stage,
    network: str,
    catalogue: Catalogue,
    *,
    data: TrainingSet | None = None,
    start: Path | None = None,
    pretrained: Path | None = None,
    resume: Path | None = None,
    save_every_steps: int | None = None,
    threads: int = 1,
    loader_processes: int = 0,
    compiles: bool = False,
    exact: bool = True,
    watchdog: Watchdog | None = None,
    after_step: Callable[[], None] | None = None,
) -> Iterator[Progress]:
    """Train one job; yield a Progress at each epoch's end and at each step where a checkpoint is due.

    Args:
        network: timm's name.
        data: what the stage trains on; None: its images of the catalogue, no more.
        start: weights folder of the parent job.
        pretrained: safetensors file of the backbone, in a stage without parent.
        resume: a resume checkpoint of this very job; wins over both.
        save_every_steps: a checkpoint is due every so many steps; None: at the ends of epochs only.
        threads: of PyTorch; sums differ with it.
        compiles: the backbone is compiled (`torch.compile`); sums differ with it.
        exact: kernels that give the same bytes each time; without, the device may choose by speed.
        watchdog: ends the process where a step or a validation hangs.
        after_step: called after each step; what it raises ends the training.
    Raises:
        NonFiniteLoss: names epoch, step, loss parts, rates and image ids; the weights are as before it.
        Refused: weights that do not fit.
    """
    watchdog = watchdog or Watchdog(None)
    watchdog.phase()
    where = place(threads, compiles, exact)
    data = data or training_set(catalogue, stage)
    learner, feed, batches = set_up(stage, network, catalogue, data, where, loader_processes)
    optimizer = Optimizer(learner, stage, batches.steps_per_epoch)
    if resume is None:
        _load(learner, start, pretrained, catalogue)
    average = Average(learner.model, stage.ema) if stage.ema else None
    state, best = TrainingState(), dict[str, Tensor]()
    if resume is not None:
        state, best = checkpoint.restore(resume, learner, optimizer, average)
    step_of = learner.distributed()
    copied = partial(checkpoint.snapshot, learner=learner, optimizer=optimizer, average=average)

    while state.epoch < stage.epochs:
        learner.train()
        watch, sums, recent = _Watch(), _Sums(state.losses, where.device), _Recent(optimizer, batches)
        for batch in watch.waits(batches.epoch(state.epoch, skip=state.step_in_epoch)):
            parts = _gradients(step_of, optimizer, batch, batch.split(stage.accumulate, learner.needs.group))
            optimizer.update(state.step)
            state.step, state.step_in_epoch = state.step + 1, state.step_in_epoch + 1
            if average is not None:
                average.update(learner.model, state.step)
            sums.add(parts)
            recent.add(batch, parts)
            watchdog.step()
            if after_step is not None:
                after_step()
            if (
                save_every_steps
                and state.step % save_every_steps == 0
                and state.step_in_epoch < batches.steps_per_epoch
            ):
                recent.check()
                state.losses = sums.totals()
                metrics = _train_metrics(stage, state, optimizer, watch, sums)
                yield Progress(state, metrics, partial(copied, state=state, best=best), where)
        watchdog.phase()
        recent.check()
        learner.share_buffers()
        metrics = _train_metrics(stage, state, optimizer, watch, sums)
        last, errors = best_candidate(learner, average, catalogue, feed, batches, state.epoch)
        if last.top1_error is None or state.best_error is None or last.top1_error < state.best_error:
            best, state.best_epoch, state.best_kind, state.best_error = (
                last.tensors,
                state.epoch,
                last.kind,
                last.top1_error,
            )
        state.epoch, state.step_in_epoch, state.losses = state.epoch + 1, 0, {}
        chosen = Candidate(state.best_epoch, state.best_kind, state.best_error, best)
        snapshot = partial(copied, state=state, best=best)
        yield Progress(state, metrics | errors, snapshot, where, EpochEnd(chosen, last))


def _load(learner: Learner, start: Path | None, pretrained: Path | None, catalogue: Catalogue) -> None:
    """The weights that a job begins with."""
    stage, model = learner.stage, learner.model
    if start is not None:
        weights.load_parent(model, start, catalogue.classes.tolist())
    elif pretrained is not None:
        weights.load_pretrained(model, pretrained)
    if stage.trains == "classifier":
        torch.manual_seed(seed_of(stage.seed, "classifier", model.network))
        model.reset_classifier()


def _gradients(step_of: nn.Module, optimizer: Optimizer, batch: Batch, micro_batches: list[Batch]) -> dict[str, Tensor]:
    """Forward and backward of a batch, part by part; the loss parts of the whole. Ranks exchange their gradients with
    the last part."""
    sums: dict[str, Tensor] = {}
    for micro_batch in micro_batches:
        weight = len(micro_batch.rows) / len(batch.rows)
        with _alone(step_of) if micro_batch is not micro_batches[-1] else nullcontext():
            parts = {name: part * weight for name, part in step_of(micro_batch).items()}
            optimizer.backward(torch.stack(list(parts.values())).sum())
        sums = {name: part.detach() + sums.get(name, 0.0) for name, part in parts.items()}
    return sums


def _alone(step_of: nn.Module) -> AbstractContextManager[None]:
    """A context in which a rank keeps its gradients to itself."""
    return step_of.no_sync() if isinstance(step_of, DistributedDataParallel) else nullcontext()


def _train_metrics(
    stage: Stage, state: TrainingState, optimizer: Optimizer, watch: "_Watch", sums: "_Sums"
) -> dict[str, float]:
    rates = {f"lr/{part}": optimizer.lr_of(part, state.step - 1) for part in ("backbone", "heads")}
    losses = {f"train/loss_{name}": total / state.step_in_epoch for name, total in sums.totals().items()}
    speed = {
        "speed/images_per_second": watch.steps * stage.batch_size / watch.seconds,
        "speed/data_wait_share": watch.waited / watch.seconds,
        "speed/memory_bytes": float(peak_memory_bytes()),
    }
    return {"train/loss": sum(losses.values()), **losses, **rates, **speed}


class _Recent:
    """The steps since the last check, so that a loss that is not finite is laid at its step's door."""

    def __init__(self, optimizer: Optimizer, batches: TrainBatches) -> None:
        self.optimizer, self.batches = optimizer, batches
        self.steps: dict[int, tuple[Tensor, dict[str, Tensor]]] = {}

    def add(self, batch: Batch, parts: dict[str, Tensor]) -> None:
        detached = {name: part.detach() for name, part in parts.items()}
        self.steps[batch.step] = batch.rows, detached
        if len(self.steps) == _CHECK_STEPS:
            self.check()

    def check(self) -> None:
        """Raise NonFiniteLoss where a step was not finite. Synchronises with the device."""
        bad = self.optimizer.first_bad_step()
        if bad is not None:
            raise self._error(bad)
        self.steps.clear()

    def _error(self, step: int) -> NonFiniteLoss:
        rows, parts = self.steps[step]
        mine = {name: float(part) for name, part in parts.items()}, self.batches.ids(rows)
        losses, ids = min(_of_all_ranks(mine), key=lambda seen: math.isfinite(sum(seen[0].values())))  # the culprit's
        values = ", ".join(f"{name} {value:g}" for name, value in losses.items())
        epoch, rate = step // self.batches.steps_per_epoch, self.optimizer.lr_of("backbone", step)
        return NonFiniteLoss(
            f"the loss or its gradient is not finite in epoch {epoch}, step {step} ({values}; lr {rate:g}).",
            advice=f"The weights are as they were before it. Images: {listing(ids, 8)}\n"
            "A lower lr, a warm-up or a smaller clip_norm usually cures it.",
        )


def _of_all_ranks(mine: _Seen) -> list[_Seen]:
    if not dist.is_initialized():
        return [mine]
    gathered = [mine] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    return gathered


class _Watch:
    """Seconds since it was made, and how many of them were spent waiting for batches."""

    def __init__(self) -> None:
        self.began, self.waited, self.steps = time.perf_counter(), 0.0, 0

    @property
    def seconds(self) -> float:
        return max(1e-9, time.perf_counter() - self.began)

    def waits(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - asked
            if batch is None:
                return
            self.steps += 1
            yield batch


class _Sums:
    """Sums of the loss parts of an epoch, kept on the device so that no step waits for them."""

    def __init__(self, before: dict[str, float], device: torch.device) -> None:
        self.device = device
        self.sums = {name: torch.tensor(value, device=device) for name, value in before.items()}

    def add(self, parts: dict[str, Tensor]) -> None:
        for name, part in parts.items():
            zero = self.sums.get(name)
            self.sums[name] = part.detach().float() + (0.0 if zero is None else zero)

    def totals(self) -> dict[str, float]:
        return {name: float(total) for name, total in self.sums.items()}


def peak_memory_bytes() -> int:
    """The most so far: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

"""The training loop, read from top to bottom. It knows no Ray and no MLflow: it yields, whoever iterates decides."""

import math
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from aliprod.catalogue.catalogue import Catalogue
from aliprod.data.loader import TrainBatch, TrainBatches
from aliprod.data.training_set import training_set
from aliprod.errors import NonFiniteLoss, listing
from aliprod.models import weights
from aliprod.randomness import seed_of
from aliprod.recipe import DEFAULT_MACHINE, NO_INPUTS, Inputs, Machine, Stage, never
from aliprod.training import checkpoint
from aliprod.training.candidates import Candidate, best_candidate
from aliprod.training.checkpoint import Fill, TrainingState
from aliprod.training.ema import Average
from aliprod.training.learner import Learner, Place, Setup, set_up
from aliprod.training.optimizer import Optimizer
from aliprod.training.shares import Losses, ShareMean

_CHECK_STEPS = 50  # a non-finite loss is noticed within so many steps; the weights are safe at once


@dataclass(frozen=True)
class Step:
    """A step that has been made. ``last``: of its epoch; the scoring that follows takes longer than a step."""

    last: bool


@dataclass(frozen=True)
class Progress:
    """A job's results at the end of an epoch, or in mid-epoch where a checkpoint is due; at the same on every rank.

    Attributes:
        metrics: numbers by name, of all ranks; ``speed/...`` is seen by this one.
        snapshot: copies the resume state; what it returns writes it into a folder.
        last: this epoch's own candidate (the best so far is the state's); None in mid-epoch.
        stopped: the last of its job for now: it was told to stop.
    """

    state: TrainingState
    metrics: dict[str, float]
    snapshot: Callable[[], Fill]
    place: Place
    last: Candidate | None = None
    stopped: bool = False


def train(
    stage: Stage,
    network: str,
    catalogue: Catalogue,
    inputs: Inputs = NO_INPUTS,
    machine: Machine = DEFAULT_MACHINE,
    resume: Path | None = None,
) -> Iterator[Progress]:
    """Train a stage on a bare machine: what `steps` yields, without the steps. ``network``: timm's name."""
    setup = set_up(stage, network, catalogue, machine, training_set(catalogue, stage, inputs))
    return (event for event in steps(setup, inputs, resume) if isinstance(event, Progress))


def steps(
    setup: Setup, inputs: Inputs = NO_INPUTS, resume: Path | None = None, stop: Callable[[], bool] = never
) -> Iterator[Step | Progress]:
    """Train; yield a Step after each step, and a Progress at each epoch's end and where a checkpoint is due.

    Args:
        inputs: ``start`` or ``pretrained`` are the weights that it begins with.
        resume: a resume checkpoint of this very job, made on any number of ranks; wins over both.
        stop: whether to end early. Where any rank is told so, all end at one of the next two steps, or in the scoring
            behind it, with a Progress that is ``stopped``.
    Raises:
        NonFiniteLoss: names epoch, step, loss parts, rates and image ids; the weights are as before it.
        Refused: weights that do not fit.
    """
    learner, batches, where = setup.learner, setup.batches, setup.learner.place
    stage, save_every_steps = learner.stage, where.machine.save_every_steps
    optimizer, mean = Optimizer(learner, stage, batches.steps_per_epoch), setup.share_mean(learner.trained())
    if resume is None:
        weights.load_inputs(learner.model, inputs, setup.catalogue.classes.tolist())
        if stage.trains == "classifier":
            torch.manual_seed(seed_of(stage.seed, "classifier", learner.model.network))
            learner.model.reset_classifier()
    average = Average(learner.model, stage.ema) if stage.ema else None
    state = TrainingState() if resume is None else checkpoint.restore(resume, learner, optimizer, average)
    snapshot = partial(checkpoint.snapshot, learner=learner, optimizer=optimizer, average=average)
    vote = _StopVote(stop)
    setup = replace(setup, between=vote.heed)

    while state.epoch < stage.epochs:
        learner.train()
        meter = _Meter(state, optimizer, batches)
        shares = meter.waits(batches.epoch(state.epoch, skip=state.step_in_epoch))
        while state.step_in_epoch < batches.steps_per_epoch:
            losses, of_shares = gradients(learner, optimizer, mean, islice(shares, len(batches.mine)))
            optimizer.update(state.step)
            state = replace(state, step=state.step + 1, step_in_epoch=state.step_in_epoch + 1)
            if average is not None:
                average.update(learner.model, state.step)
            meter.add(state.step - 1, losses, of_shares)
            last_step = state.step_in_epoch == batches.steps_per_epoch
            yield Step(last_step)
            stopped = vote.is_for_stopping()
            if stopped or (save_every_steps and state.step % save_every_steps == 0 and not last_step):
                state = replace(state, losses=meter.losses())
                yield Progress(state, meter.metrics(state), partial(snapshot, state), where, stopped=stopped)
                if stopped:
                    return
        state = replace(state, losses=meter.losses())
        metrics = meter.metrics(state)
        try:
            last, errors = best_candidate(setup, average, state.epoch)
        except _Stopped:
            yield Progress(state, metrics, partial(snapshot, state), where, stopped=True)
            return
        best = last if last.beats(state.best) else state.best
        state = TrainingState(state.epoch + 1, state.step, best=best)
        yield Progress(state, metrics | errors, partial(snapshot, state), where, last)


def gradients(
    learner: Learner, optimizer: Optimizer, mean: ShareMean, step: Iterable[TrainBatch]
) -> tuple[Losses, list[Losses]]:
    """Forward and backward of this rank's shares of a step; returns what `ShareMean.of` does.

    With SAM the gradients are those uphill of the weights; losses and norm statistics are of the weights as they are.
    """

    def backward(share: TrainBatch) -> Losses:
        parts: Losses = learner(share)
        kept = [buffer.clone() for buffer in mean.buffers] if learner.place.machine.checkpointing else []
        optimizer.backward(torch.stack(list(parts.values())).sum() / mean.shares)
        if kept:  # blocks that were computed again have counted their norm statistics twice
            torch._foreach_copy_(mean.buffers, kept)
        return {name: part.detach() for name, part in parts.items()}

    radius = learner.stage.optimizer.sharpness
    if radius is None:
        return mean.of(step, backward)
    step = list(step)
    found, statistics = mean.of(step, backward), [buffer.clone() for buffer in mean.buffers]
    before = optimizer.climb(radius)
    mean.of(step, backward)
    optimizer.descend(before)
    if statistics:
        torch._foreach_copy_(mean.buffers, statistics)
    return found


class _Meter:
    """Losses and speed of an epoch's steps.

    Loss parts are summed on the device, so that no step waits for them. Those of the shares since the last check are
    kept with their rows: an error names the step that was not finite, and the images of the share.
    """

    def __init__(self, state: TrainingState, optimizer: Optimizer, batches: TrainBatches) -> None:
        self.optimizer, self.batches = optimizer, batches
        self.sums = {name: torch.tensor(value, device=batches.feed.device) for name, value in state.losses.items()}
        self.recent: dict[int, list[tuple[Tensor, Losses]]] = {}
        self.rows = list[Tensor]()  # of the shares of this step
        self.began, self.waited, self.steps = time.perf_counter(), 0.0, 0

    def waits(self, shares: Iterator[TrainBatch]) -> Iterator[TrainBatch]:
        """The shares; counts the seconds that each is waited for."""
        while True:
            asked = time.perf_counter()
            share = next(shares, None)
            self.waited += time.perf_counter() - asked
            if share is None:
                return
            self.rows.append(share.rows)
            yield share

    def add(self, step: int, losses: Losses, of_shares: list[Losses]) -> None:
        """Add the mean loss parts of a step, and keep those of its shares. Every so many steps they are checked."""
        for name, part in losses.items():
            self.sums[name] = part.float() + self.sums.get(name, 0.0)
        self.recent[step], self.rows = list(zip(self.rows, of_shares, strict=True)), []
        self.steps += 1
        if len(self.recent) == _CHECK_STEPS:
            self._check()

    def losses(self) -> dict[str, float]:
        """Sums of the loss parts, all finite. Synchronises with the device."""
        self._check()
        return {name: float(total) for name, total in self.sums.items()}

    def metrics(self, state: TrainingState) -> dict[str, float]:
        """Mean losses of a state's epoch so far, the rates of its last step, and the speed."""
        seconds = max(1e-9, time.perf_counter() - self.began)
        losses = {f"train/loss_{name}": total / state.step_in_epoch for name, total in state.losses.items()}
        rates = {f"lr/{part}": self.optimizer.lr_of(part, state.step - 1) for part in ("backbone", "heads")}
        speed = {
            "speed/images_per_second": self.steps * self.batches.stage.batch_size / seconds,
            "speed/data_wait_share": self.waited / seconds,
            "speed/memory_bytes": float(peak_memory_bytes()),
        }
        return {"train/loss": sum(losses.values()), **losses, **rates, **speed}

    def _check(self) -> None:
        """Raise NonFiniteLoss where a step was not finite."""
        bad = self.optimizer.first_bad_step()
        if bad is not None:
            raise self._error(bad)
        self.recent.clear()

    def _error(self, step: int) -> NonFiniteLoss:
        mine = [({name: float(part) for name, part in parts.items()}, rows) for rows, parts in self.recent[step]]
        shares = [[(losses, self.batches.ids(rows)) for losses, rows in mine]] * self.batches.feed.world_size
        if len(shares) > 1:
            dist.all_gather_object(shares, shares[0])
        losses, ids = min(chain(*shares), key=lambda seen: math.isfinite(sum(seen[0].values())))  # the culprit's
        values = ", ".join(f"{name} {value:g}" for name, value in losses.items())
        epoch, rate = step // self.batches.steps_per_epoch + 1, self.optimizer.lr_of("backbone", step)
        return NonFiniteLoss(
            f"the loss or its gradient is not finite in epoch {epoch}, step {step} ({values}; lr {rate:g}).",
            advice=f"The weights are as they were before it. Images: {listing(ids, 8)}\n"
            "A lower lr, a warm-up or a smaller clip_norm usually cures it.",
        )


class _Stopped(Exception):
    """The ranks have agreed to stop."""


class _StopVote:
    """Asks every rank at each step, so that all end together where one is told to (``stop``); the answer is that of the
    step before, so that no step waits for it."""

    def __init__(self, stop: Callable[[], bool]) -> None:
        self.stop = stop
        several = dist.is_initialized() and dist.get_world_size() > 1
        self._group: Any = dist.new_group(backend="gloo") if several else None  # on the CPU: no GPU is waited for
        self._asked: tuple[Tensor, Any] | None = None

    def is_for_stopping(self) -> bool:
        """Whether any rank was told to stop; every rank must ask equally often."""
        if self._group is None:
            return self.stop()
        before = self._asked
        told = torch.tensor([float(self.stop())])
        self._asked = told, dist.all_reduce(told, dist.ReduceOp.MAX, self._group, async_op=True)
        if before is None:
            return False
        answer, work = before
        work.wait()
        return bool(answer.item())

    def heed(self) -> None:
        """Ask, and raise `_Stopped` where the answer is yes."""
        if self.is_for_stopping():
            raise _Stopped


def peak_memory_bytes() -> int:
    """The peak so far: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

"""Backward, clipping, precision, and the learning rate of a step."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aliprod.recipe import Stage
from aliprod.training.learner import Learner

_SCALER = ("scale", "_growth_tracker")  # the changing part of a gradient scaler's state


def lr_at(
    step: int, base_lr: float, steps_per_epoch: int, warmup_epochs: float, milestones: Sequence[int], gamma: float
) -> float:
    """Learning rate of a step: linear warm-up, then ``gamma`` at each milestone (methods: "manual decay").

    Args:
        step: optimizer steps since the job began, from 0.
        milestones: epochs, from 0, from which on the rate is multiplied by ``gamma`` once more.
    """
    warmup_steps = warmup_epochs * steps_per_epoch
    if step < warmup_steps:
        return base_lr * min(1.0, (step + 1) / warmup_steps)
    return base_lr * gamma ** bisect_right(sorted(milestones), step // steps_per_epoch)


def cosine_lr_at(step: int, base_lr: float, steps_per_epoch: int, warmup_epochs: float, epochs: int) -> float:
    """Learning rate of a step: linear warm-up, then half a cosine to zero (Loshchilov and Hutter 2017, eq. 5)."""
    warmup_steps = warmup_epochs * steps_per_epoch
    if step < warmup_steps:
        return base_lr * min(1.0, (step + 1) / warmup_steps)
    progress = (step - warmup_steps) / (epochs * steps_per_epoch - warmup_steps)
    return base_lr * 0.5 * (1 + math.cos(math.pi * progress))


class Optimizer:
    """SGD of a learner's backbone and heads, each at its own rate, that never lets a non-finite step through.

    A step whose gradient norm is not finite is skipped on the device, and so are all after it, without a
    synchronisation; `first_bad_step` reports which one it was. Where one rank's loss is not finite, all
    ranks skip the step. In float16 gradients overflow now and then: the scaler skips such a step and lowers its scale,
    and only a scale below 1 means that losses are not finite.
    """

    def __init__(self, learner: Learner, stage: Stage, steps_per_epoch: int) -> None:
        self.stage, self.steps_per_epoch = stage, steps_per_epoch
        self.groups = _parameter_groups(learner, stage)
        recipe = stage.optimizer
        self.sgd = torch.optim.SGD(self.groups, lr=0.0, momentum=recipe.momentum, fused=True)
        self.parameters = [p for group in self.groups for p in group["params"]]
        device = self.parameters[0].device
        self._bad_step = torch.full((), -1, dtype=torch.int64, device=device)
        self._scaler = torch.amp.GradScaler(device.type) if learner.dtype is torch.float16 else None

    def step(self, loss: Tensor, step: int) -> None:
        """Call `backward` and `update`."""
        self.backward(loss)
        self.update(step)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss to those since the last update."""
        one = torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan)  # NaN reaches all ranks with the gradients
        if self._scaler is None:
            loss.backward(one)
        else:
            self._scaler.scale(loss).backward(one)

    def update(self, step: int) -> None:
        """Update the weights once with this step's learning rates, and free the gradients for the next forward pass."""
        for group in self.groups:
            group["lr"] = self.lr_of(group["part"], step)
        if self._scaler is not None:
            self._scaler.unscale_(self.sgd)
        self._update(torch.isfinite(self._clip()), step)
        self.sgd.zero_grad(set_to_none=True)

    def lr_of(self, part: str, step: int) -> float:
        """The learning rate of the backbone or the heads at a step."""
        lr, epochs = self.stage.lr, self.stage.epochs
        base_lr = lr.backbone if part == "backbone" else lr.heads
        if lr.schedule == "cosine":
            return cosine_lr_at(step, base_lr, self.steps_per_epoch, lr.warmup_epochs, epochs)
        return lr_at(step, base_lr, self.steps_per_epoch, lr.warmup_epochs, lr.milestones, lr.gamma)

    def first_bad_step(self) -> int | None:
        """The step whose loss or gradient was not finite, and from which on nothing was updated. Synchronises."""
        step = int(self._bad_step.item())
        return None if step < 0 or (self._scaler is not None and self._scaler.get_scale() >= 1) else step

    def state(self) -> dict[str, Tensor]:
        """Momentum by position of the parameter, for a resume checkpoint."""
        buffers = (self.sgd.state[p].get("momentum_buffer") for p in self.parameters)
        state = {f"momentum.{i}": buffer for i, buffer in enumerate(buffers) if buffer is not None}
        if self._scaler is not None:
            scaler = self._scaler.state_dict()
            state |= {f"scaler.{name}": torch.tensor(scaler[name]) for name in _SCALER}
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Load what `state` returned."""
        for i, parameter in enumerate(self.parameters):
            if (momentum := state.get(f"momentum.{i}")) is not None:
                buffer = torch.empty_like(parameter, memory_format=torch.preserve_format)
                self.sgd.state[parameter]["momentum_buffer"] = buffer.copy_(momentum)
        if self._scaler is not None:
            saved = {name: state[f"scaler.{name}"].item() for name in _SCALER}
            self._scaler.load_state_dict(self._scaler.state_dict() | saved)

    def _clip(self) -> Tensor:
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None], foreach=True)
        if self.stage.optimizer.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.stage.optimizer.clip_norm, norm, foreach=True)
        return norm

    def _update(self, finite: Tensor, step: int) -> None:
        if self._scaler is None:
            self._bad_step.copy_(torch.where((self._bad_step < 0) & ~finite, step, self._bad_step))
            self.sgd.found_inf = (self._bad_step >= 0).float()  # type: ignore[attr-defined]
            self.sgd.step()
        else:
            self._bad_step.copy_(torch.where(finite, self._bad_step, step))
            self._scaler.step(self.sgd)
            self._scaler.update()


def _parameter_groups(learner: Learner, stage: Stage) -> list[dict[str, Any]]:
    """Backbone and heads, with and without weight decay (none on norm parameters and biases)."""
    groups: list[dict[str, Any]] = []
    for part, parameters in (("backbone", learner.model.backbone_parameters()), ("heads", learner.head_parameters())):
        trained = [p for p in parameters if p.requires_grad]
        weights, others = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
        groups.append({"params": weights, "part": part, "weight_decay": stage.optimizer.weight_decay})
        groups.append({"params": others, "part": part, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]

"""Backward, clipping, precision, and the learning rate of a step."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from fnmatch import fnmatch
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn

from aliprod.errors import Refused
from aliprod.recipe import OptimizerRecipe, Stage
from aliprod.training.learner import Learner

_SHORT = {"momentum_buffer": "momentum"}  # names of torch's in a resume checkpoint
_LONG = {short: name for name, short in _SHORT.items()}
_SCALER = ("scale", "_growth_tracker")  # the changing part of a gradient scaler's state


def lr_at(
    step: int, base_lr: float, steps_per_epoch: int, warmup_epochs: float, milestones: Sequence[int], gamma: float
) -> float:
    """Learning rate of a step, from 0: linear warm-up, then ``gamma`` once more from each milestone (an epoch, from 0)
    on (methods: "manual decay")."""
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


def one_cycle_lr_at(step: int, base_lr: float, steps: int, warmup_steps: float) -> float:
    """Learning rate of a step of so many: half a cosine up from a 25th of the rate, then half a cosine down to a
    ten thousandth of where it began (Smith and Topin 2018; with a cosine as torch's OneCycleLR)."""
    low, top, last = base_lr / 25, warmup_steps - 1, steps - 1
    if step <= top:
        start, end, progress = low, base_lr, step / top if top > 0 else 1.0
    else:
        start, end, progress = base_lr, low / 10_000, (step - top) / (last - top)
    return end + (start - end) / 2 * (1 + math.cos(math.pi * progress))


class Optimizer:
    """Moves a learner's backbone and heads, each at its own rate, and never lets a non-finite step through.

    A step whose gradient norm is not finite is skipped on the device, and so are all after it, without a
    synchronisation (LAMB, Lion and Muon wait for it once a step); `first_bad_step` reports which one it was. Where one
    rank's loss is not finite, all ranks skip the step. In float16 gradients overflow now and then: the scaler skips
    such a step and lowers its scale, and only a scale below 1 means that losses are not finite.
    """

    def __init__(self, learner: Learner, stage: Stage, steps_per_epoch: int) -> None:
        self.stage, self.steps_per_epoch = stage, steps_per_epoch
        self.groups = _parameter_groups(learner, stage)
        self.kernel = _kernel(self.groups, stage.optimizer)
        self._on_device = bool(self.kernel.defaults.get("fused"))  # it reads there whether a step is to be skipped
        self.parameters = [p for group in self.groups for p in group["params"]]
        device = self.parameters[0].device
        self._bad_step = torch.full((), -1, dtype=torch.int64, device=device)
        self._scaler = torch.amp.GradScaler(device.type, enabled=learner.dtype is torch.float16)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss to those since the last update."""
        one = torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan)  # NaN reaches all ranks with the gradients
        self._scaler.scale(loss).backward(one)

    @torch.no_grad()
    def climb(self, radius: float) -> list[Tensor]:
        """Move the weights ``radius`` along the gradient, where its loss is about the largest (SAM, Foret et al. 2021,
        equation 2), and free the gradients; not at all where their norm is not finite, which `update` notices. Returns
        the weights from before, for `descend`."""
        moved = [p for p in self.parameters if p.grad is not None]
        gradients = [p.grad for p in moved if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients, foreach=True)
        share = torch.where(torch.isfinite(norm), radius / (norm + 1e-12), 0.0)
        before = [p.detach().clone() for p in self.parameters]
        for parameter, gradient in zip(moved, gradients, strict=True):
            parameter.add_(torch.where(share > 0, gradient * share, 0.0))
        self.kernel.zero_grad(set_to_none=True)
        return before

    @torch.no_grad()
    def descend(self, before: list[Tensor]) -> None:
        """Put the weights back to where `climb` found them."""
        torch._foreach_copy_(self.parameters, before)

    def update(self, step: int) -> None:
        """Update the weights once with this step's learning rates, and free the gradients for the next forward pass."""
        for group in self.groups:
            group["lr"] = self.lr_of(group["part"], step) * group["lr_scale"]
        self._scaler.unscale_(self.kernel)
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None], foreach=True)
        if self.stage.optimizer.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.stage.optimizer.clip_norm, norm, foreach=True)
        finite = torch.isfinite(norm)
        if self._scaler.is_enabled():
            self._bad_step.copy_(torch.where(finite, self._bad_step, step))
            self._scaler.step(self.kernel)
            self._scaler.update()
        else:
            self._bad_step.copy_(torch.where((self._bad_step < 0) & ~finite, step, self._bad_step))
            if self._on_device:
                self.kernel.found_inf = (self._bad_step >= 0).float()  # type: ignore[attr-defined]
            if self._on_device or self._bad_step.item() < 0:
                self.kernel.step()
        self.kernel.zero_grad(set_to_none=True)

    def lr_of(self, part: str, step: int) -> float:
        """The learning rate of the backbone or the heads at a step."""
        lr, epochs = self.stage.lr, self.stage.epochs
        base_lr = lr.backbone if part == "backbone" else lr.heads
        warmup = lr.warmup_epochs if lr.warmup_steps is None else lr.warmup_steps / self.steps_per_epoch
        match lr.schedule:
            case "cosine":
                return cosine_lr_at(step, base_lr, self.steps_per_epoch, warmup, epochs)
            case "one_cycle":
                return one_cycle_lr_at(step, base_lr, epochs * self.steps_per_epoch, warmup * self.steps_per_epoch)
            case "steps":
                return lr_at(step, base_lr, self.steps_per_epoch, warmup, lr.milestones, lr.gamma)

    def first_bad_step(self) -> int | None:
        """The step whose loss or gradient was not finite, and from which on nothing was updated. Synchronises."""
        step = int(self._bad_step.item())
        return None if step < 0 or (self._scaler.is_enabled() and self._scaler.get_scale() >= 1) else step

    def state(self) -> dict[str, Tensor]:
        """Momentum and the like by position of the parameter, counters of a group by its position, for a resume
        checkpoint."""
        state = {f"group.{i}": group["step"] for i, group in enumerate(self.groups) if "step" in group}
        for i, parameter in enumerate(self.parameters):
            state |= {f"{_SHORT.get(name, name)}.{i}": one for name, one in self.kernel.state[parameter].items()}
        scaler = self._scaler.state_dict()  # {} where there is no need of one
        state |= {f"scaler.{name}": torch.tensor(scaler[name]) for name in _SCALER if scaler}
        return {name: value for name, value in state.items() if isinstance(value, Tensor)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Load what `state` returned."""
        for key, value in state.items():
            kind, _, place = key.rpartition(".")
            if kind == "group":
                self.groups[int(place)]["step"] = value
            elif kind != "scaler":  # laid out as its parameter, or a counter where the optimizer wants it
                parameter = self.parameters[int(place)]
                device = parameter.device if self._on_device else "cpu"
                copy = torch.empty_like(parameter).copy_(value) if value.ndim else value.to(device)
                self.kernel.state[parameter][_LONG.get(kind, kind)] = copy
        if self._scaler.is_enabled():
            saved = {name: state[f"scaler.{name}"].item() for name in _SCALER}
            self._scaler.load_state_dict(self._scaler.state_dict() | saved)


def _kernel(groups: list[dict[str, Any]], recipe: OptimizerRecipe) -> torch.optim.Optimizer:
    """The optimizer that a recipe names. Rates are set before each step, gradients are clipped by then."""
    own: dict[str, Any] = {} if recipe.betas is None else {"betas": recipe.betas}
    match recipe.name:
        case "sgd":
            return torch.optim.SGD(groups, lr=0.0, momentum=recipe.momentum, fused=True)
        case "adamw":
            return torch.optim.AdamW(groups, lr=0.0, fused=True, **own)
        case "lamb":
            from timm.optim.lamb import Lamb  # here: timm's optimizers import much that no other needs

            return Lamb(groups, lr=0.0, max_grad_norm=None, **own)
        case "lion":
            from timm.optim.lion import Lion

            return Lion(groups, lr=0.0, **own)
        case "muon":
            from timm.optim.muon import Muon

            return Muon(groups, lr=0.0, momentum=recipe.momentum, **own)


def _parameter_groups(learner: Learner, stage: Stage) -> list[dict[str, Any]]:
    """Backbone and heads, layer by layer where their rates differ, with and without weight decay (none on norm
    parameters, biases, and what timm names beside them). Heads are no matrices to Muon."""
    backbone, recipe = learner.model.backbone, stage.optimizer
    names = {parameter: name for name, parameter in backbone.named_parameters()}
    scales = layer_scales(backbone, recipe.layer_decay) if recipe.layer_decay else {}
    spared = backbone.no_weight_decay() if hasattr(backbone, "no_weight_decay") else ()  # type: ignore[operator]
    parts = [("backbone", learner.model.backbone_parameters()), ("heads", learner.head_parameters())]
    groups: dict[tuple[str, float, bool], dict[str, Any]] = {}
    for part, parameters in parts:
        behind = 1.0 if part == "heads" else recipe.layer_decay or 1.0  # branches are the last layer
        for parameter in filter(attrgetter("requires_grad"), parameters):
            name = names.get(parameter, "")
            decays = parameter.ndim > 1 and not any(fnmatch(name, pattern) for pattern in spared)
            scale = scales.get(name, behind)
            new = {"params": [], "part": part, "lr_scale": scale, "use_fallback": part == "heads"}
            new["weight_decay"] = recipe.weight_decay if decays else 0.0
            groups.setdefault((part, scale, not decays), new)["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def layer_scales(backbone: nn.Module, decay: float) -> dict[str, float]:
    """Factor of the learning rate of each of a backbone's parameters: ``decay`` to the power of the layers between it
    and the heads (BEiT, Bao et al. 2022), by timm's grouping, in which a classifier is the last layer. Refused: the
    network has no layers that timm can tell apart."""
    if not hasattr(backbone, "group_matcher"):
        raise Refused(f"{type(backbone).__name__} names no layers: leave layer_decay out.")
    heads = backbone.pretrained_cfg["classifier"] or "head"  # type: ignore[index]
    head = f"{heads if isinstance(heads, str) else heads[0]}.weight"
    matcher = backbone.group_matcher(coarse=False)  # type: ignore[operator]
    layers = group_with_matcher(chain(backbone.named_parameters(), [(head, None)]), matcher, reverse=True)
    return {name: decay ** (max(layers.values()) - layer) for name, layer in layers.items() if name != head}

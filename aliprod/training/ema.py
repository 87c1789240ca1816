"""Averaged weights: an exponential moving average beside the raw ones (Polyak and Juditsky 1992)."""

import torch
from torch import Tensor, nn


def update(ema: Tensor, weights: Tensor, decay: float, step: int | None = None) -> Tensor:
    """The new average d ema + (1 - d) weights, a new tensor. ``step``: number of this update, from 1, for the warm-up
    d = min(decay, (1 + step) / (10 + step)); None: none."""
    return ema.lerp(weights.to(ema.dtype), 1 - warmed_up(decay, step))


def warmed_up(decay: float, step: int | None) -> float:
    """The decay of an update, lower in the first ones so that the initial weights are soon forgotten."""
    return decay if step is None else min(decay, (1 + step) / (10 + step))


class Average:
    """The average of the weights of a model that move. Buffers (norm statistics, counters) are copied, not averaged."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Add a step to the average, in one fused call; ``step`` from 1."""
        current: list[Tensor] = [parameter for parameter in model.parameters() if parameter.requires_grad]
        torch._foreach_lerp_(list(self.parameters.values()), current, 1 - warmed_up(self.decay, step))

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """A state dict for ``model``: averaged parameters, the model's own buffers."""
        return dict(model.state_dict()) | self.parameters

    def load(self, state: dict[str, Tensor]) -> None:
        """Load parameters by name."""
        for name, parameter in self.parameters.items():
            parameter.copy_(state[name])

"""Focal loss (Lin et al. 2017, equation 4), without the class weight alpha."""

import torch
from torch import Tensor, nn

from aliprod.objectives import Batch, Context, Model, Reduction, mean_over, precise, reduced, require


def loss(logits: Tensor, labels: Tensor, gamma: float = 2.0, reduction: Reduction = "mean") -> Tensor:
    """-(1 - p_t)^gamma log p_t: cross entropy (gamma 0) that counts an image less the better it is known."""
    log_p = precise(logits).log_softmax(dim=1).gather(1, labels[:, None])[:, 0]
    miss = -torch.expm1(log_p)
    # below gamma = 1 the slope at miss = 0 is infinite, and infinity times 0 is NaN
    return reduced(-(miss.clamp_min(1e-8) ** gamma) * log_p, reduction)


class Objective(nn.Module):
    """Focal loss of the classifier's logits."""

    def __init__(self, context: Context, *, gamma: float = 2.0) -> None:  # noqa: ARG002
        super().__init__()
        require(gamma >= 0, f"gamma = {gamma} is negative.", "2 is usual, 0 is cross entropy.")
        self.gamma = gamma

    def forward(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        values = loss(model(batch.images), batch.labels, self.gamma, reduction="none")
        return {"focal": mean_over(values, batch)}

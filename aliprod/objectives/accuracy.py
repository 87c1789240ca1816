"""Accuracy loss, equation 1 of the AliProducts report: the expected top-1 error of a sampled prediction."""

import torch
from torch import Tensor, nn

from aliprod.objectives import Batch, Context, Model, Reduction, mean_over, precise, reduced


def loss(logits: Tensor, labels: Tensor, reduction: Reduction = "mean") -> Tensor:
    """1 - p_t, in 0 to 1; as a sigmoid, since from a float32 softmax it is rounding noise below 1e-5."""
    logits, true = precise(logits), labels[:, None]
    ahead = (logits - logits.gather(1, true)).scatter_(1, true, -torch.inf)  # (B, K), without the true class
    return reduced(torch.sigmoid(ahead.logsumexp(dim=1)), reduction)


class Objective(nn.Module):
    """1 - p_t of the classifier's logits, to finetune a balanced checkpoint."""

    def __init__(self, context: Context) -> None:  # noqa: ARG002 (every objective is built with its context)
        super().__init__()

    def forward(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        return {"accuracy": mean_over(loss(model(batch.images), batch.labels, reduction="none"), batch)}

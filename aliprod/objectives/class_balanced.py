"""Class-balanced loss (Cui et al., CVPR 2019): cross entropy, each class weighted by its effective number of images."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from aliprod.objectives import Batch, Context, Model, Reduction, counts_of, mean_over, precise, reduced, require


def weights(counts: Tensor, beta: float) -> Tensor:
    """(K,) float64, proportional to (1 - beta) / (1 - beta^n), mean 1 over the classes that have images (equation 6);
    a class without images has weight 0. ``beta``: in 0 to 1, 1 excluded."""
    n = counts.double()
    inverse = torch.where(n > 0, (1 - beta) / -torch.expm1(n * torch.tensor(beta, dtype=torch.float64).log()), 0.0)
    return inverse * (n > 0).sum() / inverse.sum()


def loss(logits: Tensor, labels: Tensor, counts: Tensor, beta: float = 0.9999, reduction: Reduction = "mean") -> Tensor:
    """w_t nll_t with `weights` w; beta 0 is cross entropy, towards 1 it weighs by 1/n."""
    logits = precise(logits)
    values = functional.cross_entropy(logits, labels, reduction="none")
    return reduced(weights(counts, beta).to(logits)[labels] * values, reduction)


class Objective(nn.Module):
    """Class-balanced cross entropy with the catalogue's class counts; the paper's beta are 0.9, 0.99, ... 0.9999."""

    counts: Tensor

    def __init__(self, context: Context, *, beta: float = 0.9999) -> None:
        super().__init__()
        require(0 <= beta < 1, f"beta = {beta} is not in 0 to 1.", "0.9999 is the default, 0 is cross entropy.")
        self.register_buffer("counts", counts_of(context, "class_balanced"), persistent=False)
        self.beta = beta

    def forward(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        values = loss(model(batch.images), batch.labels, self.counts, self.beta, reduction="none")
        return {"class_balanced": mean_over(values, batch)}

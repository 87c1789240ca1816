"""BBN, the bilateral-branch network for long tails (Zhou et al. 2020): its mixing, loss and reversed sampling."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from aliprod.objectives import Batch, Context, Model, Needs, Reduction, full_precision, mean_over, precise, reduced


def alpha(epoch: int, epochs: int) -> float:
    """Weight of the conventional branch, 1 - ((T-1)/T_max)^2 (section 4.3); epoch T from 1."""
    return 1.0 - ((epoch - 1) / epochs) ** 2


def logits(uniform: Tensor, reversed: Tensor, weight: Tensor, bias: Tensor | None, alpha: float) -> Tensor:  # noqa: A002
    """W [2 alpha f_c ; 2 (1 - alpha) f_r] + b, equation 1 with the public code's factor 2.

    Features (B, C) of the two branches, weight (K, 2C) -> (B, K). alpha 0.5, at inference, leaves both unscaled.
    """
    mixed = torch.cat([2 * alpha * precise(uniform), 2 * (1 - alpha) * precise(reversed)], dim=1)
    with full_precision(mixed):
        return functional.linear(mixed, precise(weight), None if bias is None else precise(bias))


def loss(
    logits: Tensor, labels: Tensor, reversed_labels: Tensor, alpha: float, reduction: Reduction = "mean"
) -> Tensor:
    """alpha CE(z, uniform labels) + (1 - alpha) CE(z, reversed labels), equation 3."""
    logits = precise(logits)
    uniform = functional.cross_entropy(logits, labels, reduction="none")
    rebalancing = functional.cross_entropy(logits, reversed_labels, reduction="none")
    return reduced(alpha * uniform + (1 - alpha) * rebalancing, reduction)


def reversed_probability(counts: Tensor) -> Tensor:
    """(K,) float64, P(class i) proportional to n_max/n_i (section 4.2); 0 for a class without images."""
    inverse = torch.where(counts > 0, 1 / counts.double(), 0.0)
    return inverse / inverse.sum()


class Objective(nn.Module):
    """Two branches, one fed with images as they come, the other from the reversed sampler; alpha moves between them.

    A step reads two images for one of cross entropy's. Weights of images count in the first batch.
    """

    needs = Needs(second=True, branches=2)

    def __init__(self, context: Context) -> None:
        super().__init__()
        self.epochs = context.epochs

    def forward(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        assert batch.second is not None  # noqa: S101  needed, so given
        uniform = model.pool(model.branch(model.trunk(batch.images), 0))
        rebalancing = model.pool(model.branch(model.trunk(batch.second.images), 1))
        share = alpha(batch.epoch + 1, self.epochs)
        mixed = logits(uniform, rebalancing, model.classifier.weight, None, share)
        first = mean_over(functional.cross_entropy(mixed, batch.labels, reduction="none"), batch)
        second = functional.cross_entropy(mixed, batch.second.labels)
        return {"uniform": share * first, "reversed": (1 - share) * second}

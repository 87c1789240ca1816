"""A-softmax (SphereFace, Liu et al. 2017, equations 6 to 8): a margin between the classes' angles."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from aliprod.objectives import Batch, Context, Model, Needs, full_precision, mean_over, precise, require


def logits(features: Tensor, weight: Tensor, labels: Tensor, margin: int, blend: float) -> Tensor:
    """Logits |x| cos theta_j (B, K), at the true class blended with |x| phi(theta_t); for cross entropy.

    Features (B, F); the columns of the weight (F, K) are scaled to unit length here. ``margin``: m, 1 (none) and up.
    ``blend``: lambda, the share of the plain cosine; see `blend`.
    """
    features, true = precise(features), labels[:, None]
    with full_precision(features):
        scaled = features @ functional.normalize(precise(weight), dim=0)  # |x| cos theta
    length = features.norm(dim=1, keepdim=True)
    plain = scaled.gather(1, true)
    cosine = plain / length.clamp_min(torch.finfo(length.dtype).tiny)
    target = (blend * plain + length * _phi(cosine, margin)) / (1 + blend)
    return scaled.scatter(1, true, target)


def blend(iteration: int) -> float:
    """lambda of the public training code: max(5, 1500 / (1 + 0.1 iteration)); starts nearly without margin."""
    return max(5.0, 1500.0 / (1.0 + 0.1 * iteration))


def _phi(cosine: Tensor, margin: int) -> Tensor:
    """(-1)^k cos(m theta) - 2k; k by counting, as acos has an infinite slope at 1 and -1. No gradient in k."""
    k = sum(((cosine < math.cos(j * math.pi / margin)).to(cosine) for j in range(1, margin)), torch.zeros_like(cosine))
    before, now = torch.ones_like(cosine), cosine
    for _ in range(margin - 1):  # cos(m theta) by Chebyshev's recurrence: T_m = 2 c T_(m-1) - T_(m-2)
        before, now = now, 2 * cosine * now - before
    return (1 - 2 * (k % 2)) * now - 2 * k


class Objective(nn.Module):
    """Cross entropy of A-softmax's logits. At inference the classifier's rows are of unit length, without margin."""

    needs = Needs(unit_weights=True)

    def __init__(self, context: Context, *, margin: int = 4) -> None:  # noqa: ARG002
        super().__init__()
        require(margin >= 1, f"margin = {margin} is below 1.", "4 is the paper's, 1 is none.")
        self.margin = margin

    def forward(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        features, weight = model.pool(model.features(batch.images)), model.classifier.weight.T
        angular = logits(features, weight, batch.labels, self.margin, blend(batch.step))
        values = functional.cross_entropy(angular, batch.labels, reduction="none")
        return {"angular": mean_over(values, batch)}

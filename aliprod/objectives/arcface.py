"""ArcFace (Deng et al., CVPR 2019, equation 3): a margin that is added to the angle of the true class; with several
centres a class, Sub-center ArcFace (Deng et al., ECCV 2020, equation 4)."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from aliprod.objectives import Batch, Context, Model, Needs, full_precision, mean_over, precise, require


def logits(
    features: Tensor, weight: Tensor, labels: Tensor, margin: float = 0.5, scale: float = 30.0, centres: int = 1
) -> Tensor:
    """Logits s cos theta_j (B, K), at the true class s cos(theta_t + margin); for cross entropy.

    Beyond theta = pi - margin the target goes on as a straight line, s (cos theta_t - margin sin margin), as in the
    public code (deepinsight/insightface): the cosine would rise again.

    Args:
        features: (B, F), weight: (F, K centres), those of a class side by side: both are scaled to unit length here.
        margin: radians. scale: s, the length that features count as scaled to.
        centres: of each class; the nearest one's angle is the class's.
    """
    features, true = functional.normalize(precise(features)), labels[:, None]
    with full_precision(features):
        cosines = features @ functional.normalize(precise(weight), dim=0)
    cosines = cosines.unflatten(1, (-1, centres)).amax(dim=2)
    cosine = cosines.gather(1, true)
    sine = (1 - cosine.square()).clamp_min(torch.finfo(cosine.dtype).eps).sqrt()  # its slope at 0 is infinite
    turned = cosine * math.cos(margin) - sine * math.sin(margin)
    target = torch.where(cosine > -math.cos(margin), turned, cosine - margin * math.sin(margin))
    margined: Tensor = scale * cosines.scatter(1, true, target)
    return margined


class Objective(nn.Module):
    """Cross entropy of ArcFace's logits. At inference they are the same without the margin."""

    def __init__(self, context: Context, *, margin: float = 0.5, centres: int = 1) -> None:  # noqa: ARG002
        super().__init__()
        require(0 <= margin < math.pi / 2, f"margin = {margin} is no angle of 0 to 1.57.", "0.5 is the paper's.")
        require(
            1 <= centres <= 16, f"centres = {centres} are not 1 to 16 of a class.", "3 are the paper's, 1 is plain."
        )
        self.margin = margin
        self.needs = Needs(unit_weights=True, scale=30.0, centres=centres)

    def forward(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        features, weight = model.pool(model.features(batch.images)), model.classifier.weight.T
        found = logits(features, weight, batch.labels, self.margin, self.needs.scale, self.needs.centres)
        values = functional.cross_entropy(found, batch.labels, reduction="none")
        return {"arcface": mean_over(values, batch)}

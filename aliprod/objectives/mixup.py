"""Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019): two images in one, and their labels in the same shares."""

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms import v2

from aliprod.objectives import Batch, Context, Model, Needs, mean_over, precise, require


class Objective(nn.Module):
    """Cross entropy of mixed images with mixed labels, a batch mixed or cut at even odds where both are on.

    Mixed by torchvision's transforms, which pair each image with the one before it in the shuffled batch.

    Args:
        alpha, cutmix: of the Beta distribution that a mixup's or a CutMix's share is drawn from; 0: none.
        plain: last epochs in which nothing is mixed.
    """

    needs = Needs(pixels=True)

    def __init__(self, context: Context, *, alpha: float = 0.2, cutmix: float = 0.0, plain: int = 0) -> None:
        super().__init__()
        require(alpha >= 0 and cutmix >= 0, f"alpha = {alpha}, cutmix = {cutmix}: one is negative.", "0 is none.")
        require(alpha + cutmix > 0, "alpha = 0 and cutmix = 0 mix nothing.", "alpha = 0.2 or cutmix = 1.0 is usual.")
        kinds = [(v2.MixUp, alpha), (v2.CutMix, cutmix)]
        require(0 <= plain < context.epochs, f"plain = {plain} of {context.epochs} epochs.", "It is of the last ones.")
        self.until = context.epochs - plain
        self.mixes = [kind(alpha=share, num_classes=context.num_classes) for kind, share in kinds if share]

    def forward(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        if batch.epoch >= self.until:
            values = functional.cross_entropy(precise(model(batch.images)), batch.labels, reduction="none")
            return {"mixup": mean_over(values, batch)}
        chosen = int(torch.randint(len(self.mixes), ()))  # from the generator that the step has seeded
        images, targets = self.mixes[chosen](batch.images, batch.labels)
        values = functional.cross_entropy(precise(model(images)), precise(targets), reduction="none")
        return {"mixup": mean_over(values, batch)}

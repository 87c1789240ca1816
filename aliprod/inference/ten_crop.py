"""Test-time augmentation: ten crops of an image, and the mean of their softmaxes."""

import torch
from torch import Tensor

from aliprod.errors import Refused


def boxes(height: int, width: int, crop: int) -> Tensor:
    """Where the ten crops lie, in the order of torchvision's ten_crop, (10, 3) int64: top, left, flipped (0 or 1).

    Top left, top right, bottom left, bottom right, centre, then the same five of the mirrored image, given as boxes of
    the unmirrored one that are to be flipped. The centre's offset is rounded half to even. Refused: the image is
    smaller than the crop.
    """
    return torch.tensor(_boxes(height, width, crop))


def crops(image: Tensor, crop: int) -> Tensor:
    """The ten crops of images, in the order of `boxes`: (..., C, H, W) -> (..., 10, C, crop, crop)."""
    found = [
        image[..., top : top + crop, left : left + crop].flip(-1 if flipped else ())
        for top, left, flipped in _boxes(image.shape[-2], image.shape[-1], crop)  # no tensor: it is exported too
    ]
    return torch.stack(found, dim=-4)


def mean_probabilities(logits: Tensor) -> Tensor:
    """Mean over crops of their softmaxes, not softmax of their mean, so that a row stays a distribution: (B, V, K) ->
    (B, K) float32, or float64 where the logits are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=2).mean(dim=1)


def _boxes(height: int, width: int, crop: int) -> list[tuple[int, int, int]]:
    if crop < 1 or min(height, width) < crop:
        what = f"ten crops of {crop} pixels do not fit an image of {height} x {width}."
        raise Refused(what, advice="A stage's resize must not be smaller than its crop.")
    bottom, right = height - crop, width - crop
    five = [(0, 0), (0, right), (bottom, 0), (bottom, right), (round(bottom / 2), round(right / 2))]
    mirrored = [(top, right - left, 1) for top, left in five]
    return [(top, left, 0) for top, left in five] + mirrored

"""AutoAugment (Cubuk et al., CVPR 2019) with ImageNet's policy: torchvision's, pixel for pixel.

What is done is drawn before any pixel is there: how exactly a picture must be resized depends on it.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageOps
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, InterpolationMode
from torchvision.transforms import functional as F

from aliprod.data.pixels import Picture, as_image, as_pixels

GREY = (128, 128, 128)  # fills what is uncovered (JDAI-CV/DCL, ImageNetPolicy)

_POLICIES = AutoAugment(AutoAugmentPolicy.IMAGENET).policies
_MAGNITUDES = {  # of the ten levels; they and the signs as torchvision has them
    "ShearX": torch.linspace(0.0, 0.3, 10),
    "Rotate": torch.linspace(0.0, 30.0, 10),
    "Color": torch.linspace(0.0, 0.9, 10),
    "Contrast": torch.linspace(0.0, 0.9, 10),
    "Sharpness": torch.linspace(0.0, 0.9, 10),
    "Posterize": 8 - (torch.arange(10) / (9 / 4)).round(),
    "Solarize": torch.linspace(255.0, 0.0, 10),
}
_SIGNED = {"ShearX", "Rotate", "Color", "Contrast", "Sharpness"}
_EVEN = {"Invert", "Rotate", "ShearX"}  # they move grey levels; all others have steps, or stretch


@dataclass(frozen=True)
class Operation:
    """A name of the policy and how strongly."""

    name: str
    magnitude: float = 0.0

    @property
    def even(self) -> bool:
        """Whether two pictures that differ by a grey level do so afterwards too, and by no more."""
        return self.name in _EVEN


def drawn() -> list[Operation]:
    """What is done to a picture, in order, from torch's default generator."""
    operations = []
    for name, probability, level in _POLICIES[int(torch.randint(len(_POLICIES), ()))]:
        if torch.rand(()) <= probability:
            magnitude = 0.0 if level is None else float(_MAGNITUDES[name][level])
            negative = name in _SIGNED and bool(torch.rand(()) <= 0.5)
            operations.append(Operation(name, -magnitude if negative else magnitude))
    return operations


def applied(operation: Operation, picture: Picture) -> Picture:
    """The result of an operation, of the same size: pixels or an image, whichever is cheaper to make."""
    name, magnitude = operation.name, operation.magnitude
    if name == "Invert":
        return as_pixels(picture).bitwise_not()
    if name == "Posterize":
        return as_pixels(picture).bitwise_and(256 - 2 ** (8 - int(magnitude)))
    if name == "Solarize":  # invert what is not below
        pixels = as_pixels(picture)
        return pixels.bitwise_xor(-(pixels >= math.ceil(magnitude)).view(torch.uint8))
    redrawn: Image.Image = _redrawn(name, magnitude, as_image(picture))
    return redrawn


def _redrawn(name: str, magnitude: float, image: Image.Image) -> Any:  # an Image; torchvision has no types
    if name == "Equalize":
        return ImageOps.equalize(image)
    if name == "AutoContrast":
        return ImageOps.autocontrast(image)
    if name == "Rotate":
        return F.rotate(image, magnitude, InterpolationMode.NEAREST, fill=GREY)
    if name == "ShearX":
        shear = [math.degrees(math.atan(magnitude)), 0.0]
        return F.affine(image, 0.0, [0, 0], 1.0, shear, InterpolationMode.NEAREST, fill=GREY, center=[0, 0])
    adjusted = {"Color": F.adjust_saturation, "Contrast": F.adjust_contrast, "Sharpness": F.adjust_sharpness}[name]
    return adjusted(image, 1.0 + magnitude)

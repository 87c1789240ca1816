"""(seed, epoch, image id) becomes a transform: what a model sees of a picture, and nothing else decides it.

Geometry and colour work on 8-bit RGB pictures, as torchvision's transforms do on PIL images; pixels stay 8 bit
until they are on the device, where they are normalised and cut out.
"""

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from aliprod.recipe import Stage

GREY = (128, 128, 128)  # fills what a rotation or AutoAugment uncovers (JDAI-CV/DCL, ImageNetPolicy)
_ROTATION_DEGREES = 15.0  # JDAI-CV/DCL, config
_CUTOUT_SHARE = 4  # side of the crop over side of the square: 56 at 224


def train_view(image: Image.Image, stage: Stage, seed: int, interpolation: str) -> tuple[Tensor, Tensor]:
    """One augmented view of a picture, as a function of ``seed``.

    Args:
        image: RGB, of any size.
        stage: its ``augmentation`` in order; with random_crop the picture is squared to ``resize`` first.
        seed: 32 bits; reseeds torch's default generator.
        interpolation: of resizing, "bicubic" or "bilinear", with antialiasing.
    Returns:
        Pixels (3, crop, crop) uint8, and the centre (row, column) of the cutout square, (-1, -1) without one.
    """
    torch.default_generator.manual_seed(seed)
    mode = InterpolationMode(interpolation)
    centre = torch.full((2,), -1, dtype=torch.int64)
    if "random_crop" in stage.augmentation:
        image = F.resize(image, [stage.resize, stage.resize], mode)
    for name in stage.augmentation:
        if name == "random_resized_crop":
            image = v2.RandomResizedCrop(stage.crop, stage.scale, (3 / 4, 4 / 3), mode)(image)
        elif name == "random_crop":
            image = v2.RandomCrop(stage.crop)(image)
        elif name == "resize":
            image = F.resize(image, [stage.crop, stage.crop], mode)
        elif name == "rotation":
            image = v2.RandomRotation(_ROTATION_DEGREES, InterpolationMode.BILINEAR, fill=GREY)(image)
        elif name == "flip":
            image = v2.RandomHorizontalFlip()(image)
        elif name == "auto_augment":
            image = v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET, fill=GREY)(image)
        else:  # cutout, on the device after normalising
            centre = torch.randint(stage.crop, (2,))
    return _pixels(image), centre


def square(image: Image.Image, side: int, interpolation: str) -> Tensor:
    """A picture squared to ``side``, its ratio not kept (the report): (3, side, side) uint8."""
    return _pixels(F.resize(image, [side, side], InterpolationMode(interpolation)))


def eval_view(image: Tensor, resize: int, crop: int, interpolation: str = "bicubic") -> Tensor:
    """Square resize and centre crop: uint8 (3, H, W) -> uint8 (3, crop, crop). Pillow's pixels: torch's may differ by
    10 grey levels at hard edges, since it does not clip what overshoots between rows and columns."""
    squared = square(F.to_pil_image(image), resize, interpolation)
    offset = round((resize - crop) / 2)
    return squared[:, offset : offset + crop, offset : offset + crop]


def normalise(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 (..., 3, H, W) -> float32 of the same shape: (pixels / 255 - mean) / std."""
    shape = (3, 1, 1)
    offset = torch.tensor(mean, device=pixels.device).view(shape)
    scale = torch.tensor(std, device=pixels.device).view(shape)
    return (pixels.float() / 255 - offset) / scale


def cutout_mask(size: int, side: int, centre: Tensor) -> Tensor:
    """Where DeVries and Taylor (2017) erase: a square around ``centre``, clipped at the border.

    Args:
        size, side: pixels, of the crop and of the square.
        centre: (..., 2) row and column; a negative one erases nothing.
    Returns:
        (..., size, size) bool, true = erased.
    """
    centre = torch.as_tensor(centre)
    offset = torch.arange(size, device=centre.device) - centre[..., None] + side // 2  # (..., 2, size)
    inside = (offset >= 0) & (offset < side) & (centre[..., None] >= 0)
    return inside[..., 0, :, None] & inside[..., 1, None, :]


def on_device(pixels: Tensor, centre: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """What is left of the transform once pixels are on the device: normalise, then cut out (set to 0).

    Args:
        pixels: (B, 3, H, H) uint8. centre: (B, 2).
    Returns:
        (B, 3, H, H) float32, channels last.
    """
    images = normalise(pixels, mean, std).contiguous(memory_format=torch.channels_last)
    size = pixels.shape[-1]
    return images.masked_fill_(cutout_mask(size, size // _CUTOUT_SHARE, centre)[:, None], 0.0)


def _pixels(image: Image.Image) -> Tensor:
    """(3, H, W) uint8."""
    pixels: Tensor = F.pil_to_tensor(image)
    return pixels

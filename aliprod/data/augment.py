"""(seed, epoch, image id) becomes a transform: what a model sees of a picture, and nothing else decides it.

The views are those of torchvision's transforms on PIL images, draw for draw; what is resized differs by two grey levels
at most. Pixels lie as (H, W, 3), so that a crop is a view and a batch is channels last, and stay 8 bit until they are
on the device, where they are normalised and cut out. To turn a Pillow image into pixels costs a large one a tenth of
its decoding, so it is done to a crop.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision import transforms
from torchvision.transforms.autoaugment import _apply_op
from torchvision.transforms.v2 import functional as F

from aliprod.catalogue.decode import baseline_jpeg, content_of, decode
from aliprod.recipe import Stage

try:
    import simplejpeg  # the extra `fast`
except ImportError:
    simplejpeg = None

Picture = Tensor | Image.Image  # (H, W, 3) uint8, or RGB: the same pixels
Step = tuple[str, Any]  # what is done to a picture, and what was drawn for it

GREY = (128, 128, 128)  # fills what is uncovered (JDAI-CV/DCL, ImageNetPolicy)
_POLICY = transforms.AutoAugment(transforms.AutoAugmentPolicy.IMAGENET)
_MAGNITUDES = _POLICY._augmentation_space(10, (1, 1))
_EVEN = {"Invert", "Rotate", "ShearX"}  # pictures that differ by a grey level do so afterwards, and by no more
_RATIO = (3 / 4, 4 / 3)
_ROTATION_DEGREES = 15.0  # JDAI-CV/DCL, config
_CUTOUT_SHARE = 4  # side of the crop over side of the square: 56 at 224
_RAND_AUGMENT, _TRIVIAL_AUGMENT = transforms.RandAugment(), transforms.TrivialAugmentWide()  # at their defaults
_AUG_MIX = transforms.AugMix(fill=list(GREY))
_JITTER = transforms.ColorJitter(0.4, 0.4, 0.4)  # as Chen et al. 2020 and many since
_SEEDED = ("rand_augment", "trivial_augment", "color_jitter", "aug_mix")  # each draws from a seed of its own
_ERASING = {"scale": (0.02, 0.33), "ratio": (0.3, 3.3), "value": [0.0]}  # Zhong et al. 2020, table 1


def picture_of(source: Path | bytes) -> Picture:
    """A picture as `decode` shows it, pixel for pixel and refusal for refusal; faster with the extra ``fast``."""
    content = content_of(source)
    if simplejpeg and baseline_jpeg(content):
        with suppress(ValueError):  # of a damaged one, whose damage Pillow judges
            return torch.from_numpy(simplejpeg.decode_jpeg(content))
    return decode(content)


def train_view(picture: Picture, stage: Stage, seed: int, interpolation: str) -> tuple[Tensor, Tensor]:
    """One augmented view of a picture, as a function of ``seed`` (32 bits), which reseeds torch's default generator.

    Returns:
        Pixels (crop, crop, 3) uint8, and the box that is erased (top, left, height, width), (4,) int64: of no size
        where nothing is, and over the border where cutout's square is.
    """
    steps, erased = drawn(picture, stage, seed)
    # how exactly a picture must be resized depends on what is done to it afterwards
    stretched = any(name in _SEEDED or (name == "auto_augment" and what[0] not in _EVEN) for name, what in steps)
    by_torch = stage.resizing == "torch" or not stretched
    resized = partial(_resized_by_torch if by_torch else resized_by_pillow, interpolation=interpolation)
    return as_pixels(stepped(picture, steps, resized)).contiguous(), erased


def drawn(picture: Picture, stage: Stage, seed: int) -> tuple[list[Step], Tensor]:
    """What makes a view of a picture, step by step, and the box that is erased, as `train_view`."""
    torch.default_generator.manual_seed(seed)
    steps = list(_drawn(stage, *size_of(picture)))
    boxes = [what for name, what in steps if name == "erase"]  # on the device, after normalising
    return [step for step in steps if step[0] != "erase"], torch.tensor(boxes[0] if boxes else (0, 0, 0, 0))


def stepped(picture: Picture, steps: list[Step], resized: Callable[[Picture, int], Picture]) -> Picture:
    """A picture after steps of `drawn`; ``resized`` squares it to a side."""
    seen = picture
    for name, what in steps:
        match name:
            case "crop":
                seen = _cropped(seen, *what)
            case "resize":
                seen = resized(seen, what)
            case "rotation":
                seen = F.rotate(_as_image(seen), what, transforms.InterpolationMode.BILINEAR, fill=GREY)
            case "flip":
                seen = F.horizontal_flip(seen) if isinstance(seen, Image.Image) else seen.flip(1)
            case "aug_mix":
                torch.default_generator.manual_seed(what)
                seen = _AUG_MIX(_as_image(seen))
            case _:
                seen = _apply_op(_as_image(seen), *what, transforms.InterpolationMode.NEAREST, GREY)
    return seen


def _drawn(stage: Stage, height: int, width: int) -> Iterator[Step]:
    """What is done to a picture of this size, step by step, from torch's default generator; with random_crop it is
    squared to ``resize`` first."""
    if "random_crop" in stage.augmentation:
        yield "resize", stage.resize
        height = width = stage.resize
    for name in stage.augmentation:
        if name in ("random_resized_crop", "random_crop", "resize"):
            like = torch.empty(3, height, width, device="meta")  # torchvision looks at its size alone
            if name == "random_resized_crop":
                yield "crop", transforms.RandomResizedCrop.get_params(like, stage.scale, _RATIO)
            height = width = stage.crop
            draw = partial(transforms.RandomCrop.get_params, like, (height, width))
            yield ("crop", draw()) if name == "random_crop" else ("resize", stage.crop)
        elif name == "rotation":
            yield name, transforms.RandomRotation.get_params([-_ROTATION_DEGREES, _ROTATION_DEGREES])
        elif name == "flip" and torch.rand(1) < 0.5:
            yield name, None
        elif name == "auto_augment":
            yield from ((name, operation) for operation in _drawn_operations())
        elif name in ("cutout", "random_erasing"):
            yield from (("erase", box) for box in _drawn_boxes(name, stage.crop))
        elif name in _SEEDED:
            yield from ((name, what) for what in _drawn_apart(name, int(torch.randint(2**31, ())), height, width))


def _drawn_boxes(name: str, size: int) -> Iterator[tuple[int, ...]]:
    """What is erased of a crop: top, left, height, width."""
    if name == "cutout":
        side = size // _CUTOUT_SHARE
        row, column = torch.randint(size, (2,)).tolist()
        yield (row - side // 2, column - side // 2, side, side)
    elif torch.rand(1) < 0.5:
        box = transforms.RandomErasing.get_params(torch.empty(3, size, size, device="meta"), **_ERASING)[:4]
        if box[2] < size:  # else it has found none that fits
            yield box


def _drawn_operations() -> Iterator[tuple[str, float]]:
    """AutoAugment (Cubuk et al., CVPR 2019) with ImageNet's policy: what is done to a picture, and how strongly."""
    for name, probability, level in _POLICY.policies[int(torch.randint(len(_POLICY.policies), ()))]:
        if torch.rand(()) <= probability:
            magnitudes, signed = _MAGNITUDES[name]
            magnitude = 0.0 if level is None else float(magnitudes[level])
            yield name, -magnitude if signed and torch.rand(()) <= 0.5 else magnitude


def _drawn_apart(name: str, seed: int, height: int, width: int) -> Iterator[Any]:
    """Operations and how strongly, by torchvision's own draws from a seed; of AugMix, which mixes many, the seed."""
    draws = torch.Generator().manual_seed(seed)
    if name == "aug_mix":
        yield seed
    elif name == "color_jitter":
        order = torch.randperm(4, generator=draws).tolist()
        ranges = (_JITTER.brightness, _JITTER.contrast, _JITTER.saturation)
        factors = [float(torch.empty(1).uniform_(*between, generator=draws)) for between in ranges]
        yield from ((("Brightness", "Contrast", "Color")[which], factors[which] - 1) for which in order if which < 3)
    else:
        space = _space(name, height, width)
        for _ in range(_RAND_AUGMENT.num_ops if name == "rand_augment" else 1):
            operation = list(space)[int(torch.randint(len(space), (1,), generator=draws))]
            magnitudes, signed = space[operation]
            if len(magnitudes) > 1 and name == "trivial_augment":
                magnitude = magnitudes[int(torch.randint(len(magnitudes), (1,), generator=draws))]
            else:
                magnitude = magnitudes[_RAND_AUGMENT.magnitude % len(magnitudes)]
            yield operation, -magnitude if signed and torch.randint(2, (1,), generator=draws) else magnitude


@cache
def _space(name: str, height: int, width: int) -> dict[str, tuple[list[float], bool]]:
    """The magnitudes of each operation, and whether they have a sign; one where there is no choice."""
    if name == "rand_augment":
        space = _RAND_AUGMENT._augmentation_space(_RAND_AUGMENT.num_magnitude_bins, (height, width))
    else:
        space = _TRIVIAL_AUGMENT._augmentation_space(_TRIVIAL_AUGMENT.num_magnitude_bins)
    return {name: (magnitudes.double().reshape(-1).tolist(), signed) for name, (magnitudes, signed) in space.items()}


def square(image: Image.Image, side: int, interpolation: str) -> Tensor:
    """A picture squared to ``side``, its ratio not kept (the report): (3, side, side) uint8."""
    return _channels_first(as_pixels(resized_by_pillow(image, side, interpolation)))


def eval_view(image: Tensor, resize: int, crop: int, interpolation: str = "bicubic") -> Tensor:
    """Square resize and centre crop: uint8 (3, H, W) -> uint8 (3, crop, crop). Pillow's pixels: torch's may differ by
    10 grey levels at hard edges, since it does not clip what overshoots between rows and columns."""
    squared = square(F.to_pil_image(image), resize, interpolation)
    offset = round((resize - crop) / 2)
    return squared[:, offset : offset + crop, offset : offset + crop]


def normalise(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 (..., 3, H, W) -> float32 of the same shape: (pixels / 255 - mean) / std."""
    offset, scale = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (mean, std))
    return (pixels.float() / 255 - offset) / scale


def cutout_mask(size: int, side: int, centre: Tensor) -> Tensor:
    """Where DeVries and Taylor (2017) erase, (..., size, size) bool: a square around ``centre``, (..., 2) row and
    column, clipped at the border of the crop; a negative one erases nothing."""
    centre = torch.as_tensor(centre)
    sides = torch.where(centre >= 0, side, 0)
    return _box_mask(size, torch.cat([centre - side // 2, sides], dim=-1))


def _box_mask(size: int, box: Tensor) -> Tensor:
    """Where boxes (..., 4) of top, left, height, width lie in a crop: (..., size, size) bool."""
    offset = torch.arange(size, device=box.device) - box[..., :2, None]  # (..., 2, size)
    inside = (offset >= 0) & (offset < box[..., 2:, None])
    return inside[..., 0, :, None] & inside[..., 1, None, :]


def on_device(pixels: Tensor, erased: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """What is left of the transform once pixels are on the device: normalise, then erase (set to 0). (B, H, H, 3) uint8
    and boxes (B, 4), as `train_view` gives them, -> (B, 3, H, H) float32, channels last."""
    images = normalise(_channels_first(pixels), mean, std)
    return images.masked_fill_(_box_mask(images.shape[-1], erased)[:, None], 0.0)


def _resized_by_torch(picture: Picture, side: int, interpolation: str) -> Tensor:
    """Pixels squared to ``side``, antialiased, as Pillow 13 does it: what a bicubic filter overshoots is lost
    between the two passes, and the rows go first where they shrink by more than twice what the columns do."""
    batch = _channels_first(as_pixels(picture)[None])
    height, width = batch.shape[-2:]
    if height - side > max(0, 2 * (width - side)):
        batch = interpolate(batch, (side, width), mode=interpolation, antialias=True)
    return interpolate(batch, (side, side), mode=interpolation, antialias=True)[0].permute(1, 2, 0)


def resized_by_pillow(picture: Picture, side: int, interpolation: str) -> Image.Image:
    """A picture squared to ``side``, antialiased, as Pillow does it."""
    return _as_image(picture).resize((side, side), Image.Resampling[interpolation.upper()])


def _channels_first(pixels: Tensor) -> Tensor:
    return pixels.movedim(-1, -3)


def _cropped(picture: Picture, top: int, left: int, height: int, width: int) -> Picture:
    if isinstance(picture, Image.Image):
        return picture.crop((left, top, left + width, top + height))
    return picture[top : top + height, left : left + width]  # a view


def size_of(picture: Picture) -> tuple[int, int]:
    """Height and width."""
    return (picture.height, picture.width) if isinstance(picture, Image.Image) else (picture.shape[0], picture.shape[1])


def as_pixels(picture: Picture) -> Tensor:
    """(H, W, 3) uint8."""
    return torch.from_numpy(np.array(picture)) if isinstance(picture, Image.Image) else picture


def _as_image(picture: Picture) -> Image.Image:
    return picture if isinstance(picture, Image.Image) else Image.fromarray(picture.numpy())

"""The train view made on the device, a batch at once: Pillow's bytes, whatever device and whatever stands beside.

The loader decodes, draws and cuts out the box that is seen (`cut`), and lays all boxes of a batch in one row of pixels
(`pack`); the device resizes and does the rest (`views`). All sums are of integers, which are the same in any order;
what Pillow does in floating point is done in its type and order, an operation a kernel, so that nothing is fused.

Pillow's ways (python-pillow/Pillow, Resample.c, Geometry.c, Blend.c, Filter.c, Convert.c, ImageOps, ImageEnhance):
weights of a resized pixel have 22 bits behind the point, and a coordinate of nearest sampling 16.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.autoaugment import _apply_op
from torchvision.transforms.functional import _get_inverse_affine_matrix

from aliprod.data.augment import GREY, Picture, Step, as_pixels, drawn, resized_by_pillow, size_of, stepped
from aliprod.recipe import Stage

_WEIGHT_BITS, _PLACE_BITS = 22, 16
_MOST_TIMES = 4  # the crop: what is longer is resized by the loader, so that one picture does not slow a batch
_SUPPORT = {"bicubic": 2.0, "bilinear": 1.0}
_RAMP = Image.frombytes("L", (256, 1), bytes(range(256))).convert("RGB")


class Cut(NamedTuple):
    """A picture from the loader: the pixels (N, 3) of ``size`` (height, width), the side that it is squared to, and
    what is done then."""

    pixels: Tensor
    size: tuple[int, int]
    side: int
    steps: list[Step]


Kernel = Callable[[Tensor, Tensor], Tensor]  # images (n, H, H, 3) uint8, and numbers for each (n, p) float64


class Packed(NamedTuple):
    """A batch before it is on the device, in few tensors: a loader process spends an open file on each."""

    pixels: Tensor  # (N, 3) uint8, of all pictures one after the other
    sizes: Tensor  # (B, 2) int64 heights and widths
    side: int  # what all are squared to
    kernels: list[tuple[Kernel, int, int]]  # in order, each with n images and p numbers for each
    rows: Tensor  # of all kernels one after the other: int64, which images
    numbers: Tensor  # and float64, what for them


def cut(picture: Picture, stage: Stage, seed: int, interpolation: str) -> tuple[Cut, Tensor]:
    """What the device needs of a picture, and the box that is erased; as `augment.train_view`. What stands before the
    crop in the stage's list is done here."""
    steps, erased = drawn(picture, stage, seed)
    place = [name for name, _ in steps].index("resize")
    resized = partial(resized_by_pillow, interpolation=interpolation)
    seen = stepped(picture, steps[:place], resized)
    side = steps[place][1]
    if max(size_of(seen)) > _MOST_TIMES * side:
        seen = resized(seen, side)
    return Cut(as_pixels(seen).reshape(-1, 3), size_of(seen), side, steps[place + 1 :]), erased


def pack(cuts: Sequence[Cut]) -> Packed:
    """A batch to be sent, of pictures that are squared to the same."""
    grouped: dict[tuple[int, int, Kernel], dict[int, list[float]]] = {}
    for row, one in enumerate(cuts):
        for key, numbers in _kernels(one.steps, one.side):
            grouped.setdefault(key, {})[row] = numbers
    in_order = sorted(grouped.items(), key=lambda item: item[0][:2])
    return Packed(
        torch.cat([one.pixels for one in cuts]),
        torch.tensor([one.size for one in cuts]),
        cuts[0].side,
        [(kernel, len(rows), len(next(iter(rows.values())))) for (*_, kernel), rows in in_order],
        torch.tensor([row for _, rows in in_order for row in rows], dtype=torch.int64),
        torch.tensor([n for _, rows in in_order for numbers in rows.values() for n in numbers], dtype=torch.float64),
    )


def views(packed: Packed, interpolation: str, device: torch.device) -> Tensor:
    """What `augment.train_view` gives with Pillow's resizing, (B, crop, crop, 3) uint8 on the device, bit for bit."""
    sent, side = partial(torch.Tensor.to, device=device, non_blocking=True), packed.side
    # both are known here: nothing waits for the device
    count = int(_turned(packed.sizes, side)[1].sum())
    taps = 2 * math.ceil(_SUPPORT[interpolation] * max(1.0, int(packed.sizes.max()) / side)) + 1
    weights = partial(_weights, side=side, taps=taps, interpolation=interpolation)
    seen = _resized(sent(packed.pixels), sent(packed.sizes), side, count, weights)
    rows = sent(packed.rows).split([n for _, n, _ in packed.kernels])
    numbers = sent(packed.numbers).split([n * p for _, n, p in packed.kernels])
    for (kernel, n, p), its_rows, its_numbers in zip(packed.kernels, rows, numbers, strict=True):
        changed = kernel(seen[its_rows], its_numbers.view(n, p))
        seen = changed if n == len(seen) else seen.index_copy(0, its_rows, changed)
    return seen


def _kernels(steps: list[Step], side: int) -> Iterator[tuple[tuple[int, int, Kernel], list[float]]]:
    """Kernels for steps, with what they are ordered by: those of the same place are of different images."""
    part = 0
    for place, (name, what) in enumerate(steps):
        if name == "crop":  # at the same place for all, since their size changes
            (top, left, side, _), part = what, 1
            yield (1, 0, _cropped), [*range(top, top + side), *range(left, left + side)]
        elif name == "rotation":
            yield (part, place, _rotated), _rotation(what, side)
        elif name == "flip":
            yield (part, place, _moved), _fixed([-1, 0, side, 0, 1, 0])
        elif what[0] != "Identity":
            kernel, numbers = _operation(what[0], what[1], side)
            yield (part, place, kernel), numbers


def _operation(name: str, magnitude: float, side: int) -> tuple[Kernel, list[float]]:
    """The kernel for an operation of AutoAugment, as torchvision's `_apply_op` does it to a Pillow image."""
    match name:
        case "ShearX" | "ShearY":
            shear = math.degrees(math.atan(magnitude))
            shears = [shear, 0.0] if name == "ShearX" else [0.0, shear]
            return _moved, _fixed(_get_inverse_affine_matrix([0, 0], 0.0, [0, 0], 1.0, shears))
        case "TranslateX":
            return _moved, _fixed([1, 0, -int(magnitude), 0, 1, 0])
        case "TranslateY":
            return _moved, _fixed([1, 0, 0, 0, 1, -int(magnitude)])
        case "Rotate":
            return _moved, _fixed(_rotation(magnitude, side))
        case "Brightness" | "Posterize" | "Solarize" | "Invert":  # a level becomes another, whatever is around it
            return _looked_up, _table(name, magnitude)
    return _OF_THE_WHOLE[name], [1.0 + magnitude]


@lru_cache(1024)
def _table(name: str, magnitude: float) -> list[float]:
    return list(_apply_op(_RAMP, name, magnitude, InterpolationMode.NEAREST, GREY).tobytes()[::3])


def _rotation(degrees: float, side: int) -> list[float]:
    """Where a pixel comes from, (a, b, c, d, e, f): x = a x' + b y' + c, y = d x' + e y' + f (PIL.Image.rotate)."""
    angle, centre = -math.radians(degrees % 360), side / 2
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    opposite = round(-math.sin(angle), 15)
    c, f = cos * -centre + sin * -centre + 0.0, opposite * -centre + cos * -centre + 0.0
    return [cos, sin, c + centre, opposite, cos, f + centre]


def _fixed(matrix: Sequence[float]) -> list[float]:
    """A matrix of pixel's middles as integers with 16 bits behind the point."""
    a, b, c, d, e, f = matrix
    middles = (a, b, c + a * 0.5 + b * 0.5, d, e, f + d * 0.5 + e * 0.5)
    return [math.floor(number * 2**_PLACE_BITS + 0.5) for number in middles]


def _turned(sizes: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of pictures (B, 2): are their columns resized before their rows, how many are resized first, and of what length.
    Pillow 13 resizes along the height first where it shrinks by more than twice what the width does."""
    height, width = sizes.unbind(1)
    turned = height - side > (2 * (width - side)).clamp(min=0)
    return turned, torch.where(turned, width, height), torch.where(turned, height, width)


def _resized(
    pixels: Tensor, sizes: Tensor, side: int, count: int, weights: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> Tensor:
    """Pictures of ``sizes`` squared to ``side``: pixels (N, 3) -> (B, side, side, 3) uint8. ``count``: of the lines of
    all pictures that are resized first, rows or columns."""
    turned, lines, length = _turned(sizes, side)
    numbers, area, width = torch.arange(len(sizes), device=sizes.device), sizes.prod(1), sizes[:, 1]
    picture = torch.repeat_interleave(numbers, lines, output_size=count)
    first = lines.cumsum(0) - lines
    line = torch.arange(count, device=sizes.device) - first[picture]
    start = (area.cumsum(0) - area)[picture] + line * torch.where(turned, 1, width)[picture]
    half = _filtered(pixels, start, picture, torch.where(turned, width, 1), weights(length))
    seen = _filtered(half, first, numbers, torch.ones_like(first), weights(lines))
    return torch.where(turned[:, None, None, None], seen.transpose(1, 2), seen)


def _filtered(pixels: Tensor, start: Tensor, picture: Tensor, stride: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
    """Lines of pixels (N, ...) resized: (L, side, ...) uint8. Where each starts, and its picture, (L,); how far apart
    the pixels of a picture are, (B,), and their `_weights`."""
    shape = (len(start), weights[0].shape[-1], *[1] * (pixels.ndim - 1))
    half = 1 << (_WEIGHT_BITS - 1)
    total = torch.full((*shape[:2], *pixels.shape[1:]), half, dtype=torch.int32, device=start.device)
    for place, weight in zip(*weights, strict=True):
        at = start[:, None] + (place * stride[:, None])[picture]
        total.addcmul_(pixels[at], weight[picture].view(shape))
    return (total >> _WEIGHT_BITS).clamp_(0, 255).byte()


def _weights(length: Tensor, side: int, taps: int, interpolation: str) -> tuple[Tensor, Tensor]:
    """Which pixels of lines make those of ``side``, and with what weight: (taps, B, side) integers."""
    scale = (length.double() / side)[:, None]
    stretch, last = scale.clamp(min=1.0), length[:, None] - 1
    reach = stretch * _SUPPORT[interpolation]
    centre = (torch.arange(side, device=length.device) + 0.5) * scale
    low = (centre - reach + 0.5).long().clamp(min=0)
    high = torch.minimum((centre + reach + 0.5).long(), last + 1)
    kernel = _bicubic if interpolation == "bicubic" else _bilinear
    place = low + torch.arange(taps, device=length.device)[:, None, None]
    weight = kernel(((place - centre + 0.5) * (1.0 / stretch)).abs()).where(place < high, 0.0)
    scaled = weight / sum(weight) * 2**_WEIGHT_BITS  # added tap by tap: in another order it is another number
    return torch.minimum(place, last), (scaled + torch.where(scaled < 0, -0.5, 0.5)).int()


def _bilinear(x: Tensor) -> Tensor:
    return (1.0 - x).clamp(min=0.0)


def _bicubic(x: Tensor) -> Tensor:
    """Keys 1981, a = -1/2; x >= 0."""
    near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    return torch.where(x < 1, near, far.where(x < 2, 0.0))


def _cropped(pixels: Tensor, kept: Tensor) -> Tensor:
    """``kept``: (n, 2 crop) rows and columns."""
    rows, columns = kept.long().chunk(2, dim=1)
    images = torch.arange(len(pixels), device=pixels.device)
    return pixels[images[:, None, None], rows[:, :, None], columns[:, None]]


def _moved(pixels: Tensor, matrix: Tensor) -> Tensor:
    """Nearest pixels, grey where there is none; ``matrix``: (n, 6), as `_fixed`."""
    side = pixels.shape[1]
    a, b, c, d, e, f = matrix.int()[:, :, None, None].unbind(1)
    column = torch.arange(side, device=pixels.device, dtype=torch.int32)
    row = column[:, None]
    x, y = (a * column + b * row + c) >> _PLACE_BITS, (d * column + e * row + f) >> _PLACE_BITS
    inside = (x >= 0) & (x < side) & (y >= 0) & (y < side)
    return _taken(pixels, x, y).where(inside[..., None], GREY[0])


def _rotated(pixels: Tensor, matrix: Tensor) -> Tensor:
    """Bilinear between pixels' middles, grey where there is none; ``matrix``: (n, 6)."""
    side = pixels.shape[1]
    a, b, c, d, e, f = matrix[:, :, None, None].unbind(1)
    column = torch.arange(side, device=pixels.device) + 0.5
    row = column[:, None]
    x, y = a * column + b * row + c, d * column + e * row + f
    inside = (x >= 0) & (x < side) & (y >= 0) & (y < side)
    x, y = x - 0.5, y - 0.5
    left, top = x.floor(), y.floor()
    dx, dy = (x - left)[..., None], (y - top)[..., None]
    upper, lower = (
        near + (_taken(pixels, left + 1, line).double() - near) * dx
        for line in (top, top + 1)
        for near in [_taken(pixels, left, line).double()]
    )
    return (upper + (lower - upper) * dy).byte().where(inside[..., None], GREY[0])


def _taken(pixels: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Pixels at places (n, H, W), the next one inside."""
    side = pixels.shape[1]
    place = y.long().clamp(0, side - 1) * side + x.long().clamp(0, side - 1)
    return pixels.flatten(1, 2).gather(1, place.flatten(1)[..., None].expand(-1, -1, 3)).view(*place.shape, 3)


def _looked_up(pixels: Tensor, tables: Tensor) -> Tensor:
    """``tables``: (n, 256) of all channels, or (n, 3, 256)."""
    tables = tables.byte().view(len(pixels), -1, 256).expand(-1, 3, -1)
    return tables.gather(2, _by_channel(pixels)).transpose(1, 2).reshape(pixels.shape)


def _by_channel(pixels: Tensor) -> Tensor:
    """Levels (n, 3, H * W) int64."""
    return pixels.flatten(1, 2).transpose(1, 2).long()


def _auto_contrast(pixels: Tensor, _: Tensor) -> Tensor:
    """Each channel stretched from its least and largest level to all."""
    low, high = (ends[..., None].double() for ends in pixels.flatten(1, 2).aminmax(dim=1))
    levels = torch.arange(256, device=pixels.device, dtype=torch.float64)
    scale = torch.full_like(high, 255.0) / (high - low).clamp(min=1.0)  # 255 / tensor is 255 * (1 / tensor)
    stretched = (levels * scale + -low * scale).clamp(0, 255)
    return _looked_up(pixels, torch.where(high > low, stretched, levels))


def _equalize(pixels: Tensor, _: Tensor) -> Tensor:
    """Each channel's levels equally frequent; counts are integers, whose sum hangs on no order."""
    levels = _by_channel(pixels)
    counts = levels.new_zeros(len(pixels), 3, 256).scatter_add_(2, levels, levels.new_ones(()).expand_as(levels))
    of_largest = counts.gather(2, levels.amax(2, keepdim=True))
    step = (counts.sum(2, keepdim=True) - of_largest) // 255
    table = (step // 2 + counts.cumsum(2) - counts) // step.clamp(min=1)
    own = torch.arange(256, device=pixels.device)
    return _looked_up(pixels, torch.where(step > 0, table.clamp(max=255), own))


def _contrast(pixels: Tensor, factor: Tensor) -> Tensor:
    grey = _grey(pixels).flatten(1)
    mean = (2 * grey.sum(1) + grey.shape[1]) // (2 * grey.shape[1])
    return _blended(mean[:, None, None, None], pixels, factor)


def _color(pixels: Tensor, factor: Tensor) -> Tensor:
    return _blended(_grey(pixels)[..., None], pixels, factor)


def _sharpness(pixels: Tensor, factor: Tensor) -> Tensor:
    """From or to a mean of 3 x 3 in which the middle counts five times; the border stays."""
    whole = pixels.int()
    rows = whole[:, :-2] + whole[:, 1:-1] + whole[:, 2:]
    total = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * whole[:, 1:-1, 1:-1]
    smooth = whole.clone()
    smooth[:, 1:-1, 1:-1] = (2 * total + 13) // 26
    return _blended(smooth, pixels, factor)


def _grey(pixels: Tensor) -> Tensor:
    """Luma of ITU-R 601 in 16 bits behind the point: (n, H, W) int64."""
    red, green, blue = pixels.long().unbind(-1)
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


def _blended(other: Tensor, pixels: Tensor, factor: Tensor) -> Tensor:
    """Pixels, so many times as far from another image, in float32."""
    base = other.float()
    return (base + factor.float().view(-1, 1, 1, 1) * (pixels.float() - base)).clamp(0, 255).byte()


_OF_THE_WHOLE: dict[str, Kernel] = {
    "AutoContrast": _auto_contrast,
    "Equalize": _equalize,
    "Contrast": _contrast,
    "Color": _color,
    "Sharpness": _sharpness,
}

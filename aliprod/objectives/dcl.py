"""DCL, destruction and construction learning (Chen et al., CVPR 2019).

Each image is also shown cut into a grid and shuffled: the classifier must know it all the same, a swap head separates
originals from destructed images, a location head says where each cell came from. Both are left out at inference.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from aliprod.objectives import Batch, Context, Model, Needs, full_precision, mean_over, precise, require, require_map

STRIDE = 32  # pixels of a cell of most feature maps


def shuffle(parts: int, reach: float, generator: torch.Generator) -> Tensor:
    """The paper's destruction (section 3.1): (N, N) int64, the row-major index of the original cell now at each place.
    First every row, then every column is put in the order of j + u_j, u_j uniform in (-reach, reach)."""
    return shuffles(1, parts, reach, generator)[0]


def shuffles(images: int, parts: int, reach: float, generator: torch.Generator) -> Tensor:
    """`shuffle` for each of so many images at once: (images, N, N) int64."""
    noise = torch.rand(2, images, parts, parts, generator=generator, dtype=torch.float64)
    return arranged(*(reach * (2 * noise - 1)))


def arranged(row_noise: Tensor, column_noise: Tensor) -> Tensor:
    """The destruction (..., N, N) that these displacements make, [r, c] of column c of row r, then [c, r] of row r."""
    places = torch.arange(row_noise.shape[-1], device=row_noise.device)
    in_rows = places[:, None] * len(places) + (places + row_noise).argsort(dim=-1)
    order = (places + column_noise).argsort(dim=-1).transpose(-1, -2)  # [r, c]: row that column c takes for row r
    return in_rows.gather(-2, order)


def jigsaw(image: Tensor, source: Tensor) -> Tensor:
    """Cell (a, b) of the result is cell ``source[a, b]`` of the image (..., H, W), unresampled. Refused: a side is not
    a multiple of N."""
    return _jigsaws(image.reshape(1, -1, *image.shape[-2:]), source[None]).reshape(image.shape)


def location_targets(source: Tensor) -> Tensor:
    """(source - floor(N²/2)) / N²: where each cell came from, in -1/2 to 1/2; (..., N, N) -> (..., N²) float64."""
    cells = source.shape[-1] ** 2
    return (source.flatten(-2).double() - cells // 2) / cells


def heads(
    features: Tensor,
    class_weight: Tensor,
    swap_weight: Tensor,
    location_weight: Tensor,
    location_bias: Tensor,
    parts: int = 7,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (2B, K), swap logits (2B, 2) and locations (2B, N²) in -1 to 1 (section 3.2) of the feature maps
    (2B, C, S, S) of originals and destructed images. Refused: S is not a multiple of N."""
    locations = _locations(features, location_weight, location_bias, parts)
    return _linear(features, class_weight), _linear(features, swap_weight), locations


def losses(
    logits: Tensor, swap_logits: Tensor, locations: Tensor, labels: Tensor, swap_labels: Tensor, targets: Tensor
) -> dict[str, Tensor]:
    """The three means over all 2B rows (equations 2, 4 and 8), unweighted.

    Logits (2B, K), swap_logits (2B, 2), locations and targets (2B, N²); swap_labels: 1 = original, 0 = destructed.
    """
    locations = precise(locations)
    return {
        "class": functional.cross_entropy(precise(logits), labels),
        "swap": functional.cross_entropy(precise(swap_logits), swap_labels),
        "location": (locations - targets.to(locations)).abs().mean(),
    }


def _jigsaws(images: Tensor, sources: Tensor) -> Tensor:
    """`jigsaw` of each image (B, C, H, W) by its own source (B, N, N), in one gather."""
    parts = sources.shape[-1]
    height, width = images.shape[-2:]
    _fits(height % parts == width % parts == 0, f"an image of {height}x{width}", parts)
    cells: Tensor = images.unflatten(3, (parts, -1)).unflatten(2, (parts, -1))  # (B, C, N, h, N, w)
    image = torch.arange(len(images), device=images.device)[:, None, None]
    sources = sources.long()
    moved = cells[image, :, sources // parts, :, sources % parts]  # (B, N, N, C, h, w)
    return moved.permute(0, 3, 1, 4, 2, 5).reshape(images.shape)


def _interleaved(originals: Tensor, destructed: Tensor) -> Tensor:
    """Rows o0, d0, o1, d1, ..."""
    return torch.stack([originals, destructed], dim=1).flatten(0, 1)


def _linear(features: Tensor, weight: Tensor) -> Tensor:
    """A head on the mean of the feature map."""
    pooled = features.mean(dim=(2, 3), dtype=torch.promote_types(features.dtype, torch.float32))
    with full_precision(pooled):
        return functional.linear(pooled, precise(weight))


def _locations(features: Tensor, weight: Tensor, bias: Tensor, parts: int) -> Tensor:
    """tanh of a 1x1 convolution, averaged over each of N x N windows (which come first, being linear too)."""
    side = features.shape[-1]
    advice = f"A larger crop, or fewer parts: its sides must be multiples of {parts}."  # not every stride is 32
    require(side % parts == 0, f"a feature map of {side}x{side} cannot be cut into {parts}x{parts} cells.", advice)
    windows = precise(functional.avg_pool2d(features, side // parts))
    with full_precision(windows):
        located = functional.conv2d(windows, precise(weight), precise(bias))
    return located.flatten(1).tanh()


def _fits(holds: bool, what: str, parts: int, stride: int = STRIDE) -> None:
    """Refuse what cannot be cut into so many cells a side."""
    sizes = ", ".join(str(parts * stride * multiple) for multiple in (1, 2, 3))
    advice = f"With parts = {parts}, a crop of {sizes}, ... works."
    require(holds, f"{what} cannot be cut into {parts}x{parts} cells.", advice)


class Objective(nn.Module):
    """Class, swap and location loss of a batch of originals and their destructed copies.

    Args:
        parts: cells a side; the crop must be a multiple of parts * stride of the network's map (32, or its patches).
        reach: how far cells move, in cells.
        beta, gamma: weights of the swap and of the location loss.
        swap: what the swap head separates: a "pair" of original and destructed, or "classes", each in both forms,
            2K rows (JDAI-CV/DCL, cls_mul: its recipe for birds; at 50,030 classes 205 million parameters).
    """

    needs = Needs(distorts=True, maps=True)  # half of the norm layers' images are destructed

    def __init__(
        self,
        context: Context,
        *,
        parts: int = 7,
        reach: float = 2.0,
        beta: float = 1.0,
        gamma: float = 1.0,
        swap: Literal["pair", "classes"] = "pair",
    ) -> None:
        super().__init__()
        require(parts >= 2, f"parts = {parts} leaves nothing to shuffle.", "7 is the paper's.")
        require(reach > 0, f"reach = {reach} is not positive.", "2 is the paper's.")
        require(beta >= 0 and gamma >= 0, f"beta = {beta}, gamma = {gamma}: one is negative.", "1 is the default.")
        require_map(context, "dcl")
        stride = context.crop / context.side if context.side else STRIDE
        _fits(context.crop % (parts * stride) == 0, f"dcl's crop of {context.crop}", parts, round(stride))
        self.parts, self.reach, self.beta, self.gamma = parts, reach, beta, gamma
        channels = context.num_features
        self.classes = context.num_classes if swap == "classes" else 0
        rows = 2 * self.classes or 2
        self.swap_weight = nn.Parameter(torch.empty(rows, channels).normal_(std=0.01))  # as the classifier's
        self.location_weight = nn.Parameter(torch.empty(1, channels, 1, 1).normal_(std=0.001))  # starts mid-targets
        self.location_bias = nn.Parameter(torch.zeros(1))

    def forward(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(batch.seed)
        sources = shuffles(len(batch.images), self.parts, self.reach, generator)
        sources = sources.to(batch.images.device, non_blocking=True)  # blocking would wait for the step before
        pairs = _interleaved(batch.images, _jigsaws(batch.images, sources))
        if batch.images.is_contiguous(memory_format=torch.channels_last):
            pairs = pairs.contiguous(memory_format=torch.channels_last)
        features = model.features(pairs)
        maps, labels = model.maps(features), batch.labels.repeat_interleave(2)
        unmoved = torch.arange(self.parts**2, device=sources.device).view(self.parts, self.parts).expand_as(sources)
        logits = precise(model.classify(features))
        parts = losses(
            logits,
            _linear(maps, self.swap_weight),
            _locations(maps, self.location_weight, self.location_bias, self.parts),
            labels,
            self._swap_labels(labels),
            location_targets(_interleaved(unmoved, sources)),
        )
        if batch.weights is not None:
            classes = functional.cross_entropy(logits, labels, reduction="none").view(-1, 2).mean(dim=1)
            parts["class"] = mean_over(classes, batch)
        return {"class": parts["class"], "swap": self.beta * parts["swap"], "location": self.gamma * parts["location"]}

    def _swap_labels(self, labels: Tensor) -> Tensor:
        """(2B,); with classes, those of destructed images follow all those of originals."""
        destructed = torch.arange(len(labels), device=labels.device) % 2
        return labels + self.classes * destructed if self.classes else 1 - destructed

"""LIO, look into object (Zhou et al., CVPR 2020).

Images of one class share the object and not the background: a mask head learns its extent, a polar head how its cells
lie around the most salient one. Both only train the backbone and are left out at inference.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from aliprod.objectives import Batch, Context, Model, Needs, full_precision, precise, require, require_map

WEIGHT = 0.1  # of the context and of the extent loss, in the paper and the public code


def pseudo_mask(features: Tensor) -> Tensor:
    """Where each image's object is: the mean over the group's other images of the best match of each cell.

    M_a(i) = mean over b != a of max_j (X_a^T X_b)_ij / C (section 3.2). Not detached.
    (G, P+1, C, S, S), groups of one class -> (G, P+1, S, S).
    """
    maps = precise(features)
    groups, images, channels, side, _ = maps.shape
    cells = maps.flatten(3).transpose(1, 2).flatten(2)  # (G, C, (P+1) S²)
    with full_precision(cells):
        correlation = cells.transpose(1, 2) @ cells / channels
    best = correlation.view(groups, images, side * side, images, side * side).max(dim=4).values  # (G, P+1, S², P+1)
    others = 1 - torch.eye(images, dtype=best.dtype, device=best.device)
    mean = (best * others[:, None]).sum(dim=3) / (images - 1)
    return mean.view(groups, images, side, side)


def extent_loss(predicted: Tensor, pseudo: Tensor) -> Tensor:
    """Mean squared difference of the predicted and the pseudo mask, both (..., S, S); ()."""
    return functional.mse_loss(precise(predicted), precise(pseudo))


def polar_targets(anchor: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Distance and angle (N, S²) float64 of every cell as seen from the anchor cells (N,) (section 3.3).

    Distance in sides of the map; angle in turns, in 0 (excluded) to 1, 0.5 at the anchor.
    """
    cells = torch.arange(size * size, device=anchor.device)
    # subtracted as integers: the -0.0 of a negated difference would turn an angle of 1 into 0
    rows = (cells // size - anchor[:, None] // size).double() / size
    columns = (cells % size - anchor[:, None] % size).double() / size
    angle = (torch.atan2(columns, rows) / math.pi + 1) / 2
    return (rows.square() + columns.square()).sqrt(), angle


def context_loss(features: Tensor, mask: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """How badly the cells' places around the anchor are predicted: mean over N S² of (distance loss + angle loss) on
    the object's cells. features: (N, D, S, S) structure map. mask: (N, S, S) predicted extent, made binary here: above
    its mean. weight: (2, 2D), on [anchor, cell]. bias: (2,)."""
    return _context_losses(precise(features), precise(mask), precise(weight), precise(bias)).mean()


def losses(
    features: Tensor, labels: Tensor, heads: Mapping[str, Tensor], published: bool = False, detach_target: bool = True
) -> dict[str, Tensor]:
    """Class, context and extent loss of groups of one class; total = class + 0.1 context + 0.1 extent.

    Args:
        features: (G, P+1, C, S, S); the first image of a group is the main one. labels: (G,) int64.
        heads: w_class (K, C), b_class (K,) or missing, w_structure (D, C, 1, 1), b_structure (D,),
            w_mask (1, C, 1, 1), b_mask (1,), w_polar (2, 2D), b_polar (2,).
        published: the main images' mean plus the positives' mean, instead of one mean over all.
        detach_target: let no gradient into the features through the pseudo mask.
    """
    maps = _pooled(features.flatten(0, 1)).unflatten(0, features.shape[:2])
    weight, bias = precise(heads["w_class"]), heads.get("b_class")
    with full_precision(maps):
        logits = functional.linear(maps.mean(dim=(3, 4)), weight, bias if bias is None else precise(bias))
    labels = labels[:, None].expand(maps.shape[:2])
    parts = _losses(maps, _class_losses(logits, labels), heads, published, detach_target)
    return parts | {"total": parts["class"] + WEIGHT * parts["context"] + WEIGHT * parts["extent"]}


def _losses(
    maps: Tensor, classes: Tensor, heads: Mapping[str, Tensor], published: bool, detach_target: bool
) -> dict[str, Tensor]:
    """Maps (G, P+1, C, S, S) after pooling; class losses (G, P+1)."""
    rectified = maps.flatten(0, 1).relu()
    with full_precision(maps):
        predicted = functional.conv2d(rectified, precise(heads["w_mask"]), precise(heads["b_mask"]))[:, 0]
        structure = functional.conv2d(rectified, precise(heads["w_structure"]), precise(heads["b_structure"])).relu()
    target = pseudo_mask(maps.detach() if detach_target else maps)
    contexts = _context_losses(structure, predicted, precise(heads["w_polar"]), precise(heads["b_polar"]))
    return {
        "class": _over_images(classes, published),
        "context": _over_images(contexts.view(classes.shape), published),
        "extent": extent_loss(predicted, target.flatten(0, 1)),
    }


def _class_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits (G, P+1, K) and labels (G, P+1) to (G, P+1)."""
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)


def _over_images(values: Tensor, published: bool) -> Tensor:
    """(G, P+1) to (): the mean of all, or the main images' plus the positives'."""
    return values[:, 0].mean() + values[:, 1:].mean() if published else values.mean()


def _context_losses(features: Tensor, mask: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(N,): `context_loss` of each image."""
    channels, size = features.shape[1:3]
    cells = features.flatten(2)  # (N, D, S²)
    extent = (mask > mask.mean(dim=(1, 2), keepdim=True)).flatten(1).to(cells)  # (N, S²), carries no gradient
    anchor = (cells.detach().mean(dim=1) * extent).argmax(dim=1)
    salient = cells.gather(2, anchor[:, None, None].expand(-1, channels, 1))  # (N, D, 1)
    with full_precision(cells):
        polar = weight[:, :channels] @ salient + weight[:, channels:] @ cells + bias[:, None]  # (N, 2, S²)
    places = torch.arange(size * size, device=anchor.device)
    polar = polar.relu().masked_fill((places == anchor[:, None])[:, None], 0)
    distance, angle = (target.to(cells) for target in polar_targets(anchor, size))
    gap = polar[:, 1] - angle
    gap = torch.where(gap < 0, gap + 1, gap)
    errors = (polar[:, 0] - distance).square() + (gap - gap.mean(dim=1, keepdim=True)).square()
    return (errors * extent).mean(dim=1)


def _pooled(features: Tensor) -> Tensor:
    """14x14 maps (of 448 pixels) to 7x7, as the published code; 7x7 (of 224) and smaller ones as they are."""
    side = features.shape[-1]
    return precise(functional.avg_pool2d(features, 2) if side > 7 and side % 2 == 0 else features)


class Objective(nn.Module):
    """`losses` of groups of positives + 1 images of one class, flattened group-major."""

    def __init__(
        self, context: Context, *, positives: int = 3, published: bool = False, detach_target: bool = True
    ) -> None:
        super().__init__()
        require(positives >= 1, f"positives = {positives}: nothing to compare with.", "3 is the paper's.")
        require_map(context, "lio")
        self.needs = Needs(group=positives + 1, maps=True)
        self.published, self.detach_target = published, detach_target
        self.heads = nn.ParameterDict(_new_heads(context.num_features))

    def forward(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        features = model.features(batch.images)
        groups = (-1, self.needs.group)
        logits = precise(model.classify(features)).unflatten(0, groups)
        classes = _class_losses(logits, batch.labels.unflatten(0, groups))
        if batch.weights is not None:
            classes = classes * batch.weights.to(classes).unflatten(0, groups)
        maps, heads = _pooled(model.maps(features)).unflatten(0, groups), dict(self.heads.items())
        parts = _losses(maps, classes, heads, self.published, self.detach_target)
        return {"class": parts["class"], "context": WEIGHT * parts["context"], "extent": WEIGHT * parts["extent"]}


def _new_heads(channels: int) -> dict[str, Tensor]:
    """The heads of `losses` but the classifier, drawn from torch's global generator."""
    half = channels // 2
    return {
        "w_structure": nn.init.kaiming_normal_(torch.empty(half, channels, 1, 1), nonlinearity="relu"),
        "b_structure": torch.zeros(half),
        "w_mask": nn.init.normal_(torch.empty(1, channels, 1, 1), std=0.01),
        "b_mask": torch.zeros(1),
        "w_polar": nn.init.normal_(torch.empty(2, 2 * half), std=0.01),
        "b_polar": torch.full((2,), 0.5),  # half a side, half a turn: what starts below 0 may never leave its ReLU
    }

"""An image classifier: a timm backbone and a linear classifier without bias on its pooled features."""

import copy
import math
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from inspect import signature
from itertools import chain, islice
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from aliprod.errors import Refused, did_you_mean, listing
from aliprod.recipe import Needs

_PLAIN = Needs()
_AT_ONCE = 16_384  # features that are compared with a bank's: 128 MB at 2048 of them


class Classifier(nn.Module):
    """Images to class logits, by way of the backbone's unpooled features, of which objectives see a map.

    Features are pooled as the network itself does (class token, attention, mean and norm, a convolution behind the
    mean), so that its pretrained weights see what they saw. The classifier has no bias in any stage (JDAI-CV/DCL,
    models/LoadModel.py), so that a child loads its parent's head unchanged and no class prior hides in a bias after
    long-tailed training.

    Args:
        network: timm's name, with or without a weights tag.
        crop: side of the images in pixels, which position embeddings are made for; None: the network's own.
        drop_rate: dropout before the classifier. drop_path_rate: stochastic depth of the backbone.
        zero_init_last: zero the last norm scale of each residual bottleneck (where timm has not done so), without
            which deep squeeze-and-excitation networks do not learn from scratch.
        bank: so many training images vote in place of a linear classifier; 0: none.
    Raises:
        Refused: as `check_network`, or it has no stochastic depth or block to be branched.
    """

    def __init__(
        self,
        network: str,
        num_classes: int,
        needs: Needs = _PLAIN,
        *,
        crop: int | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        zero_init_last: bool = False,
        bank: int = 0,
    ) -> None:
        super().__init__()
        made = check_network(network, network, crop)
        self.network, self.num_classes = network, num_classes
        try:
            depth: dict[str, Any] = {"drop_path_rate": drop_path_rate} if drop_path_rate else {}
            self.backbone = _backbone(network, **made.options, **depth)
        except TypeError as error:
            raise Refused(f"{network} has no stochastic depth: leave drop_path_rate out.", network) from error
        own_drop_rate = getattr(self.backbone, "drop_rate", 0.0)  # some of timm's have one, on what they pool
        self.map_drop_rate = own_drop_rate if type(self.backbone).__name__ == "SENet" else 0.0
        self.backbone.drop_rate = 0.0  # type: ignore[assignment]
        for block in self.backbone.modules() if zero_init_last else ():
            last, residual = getattr(block, "bn3", None), getattr(block, "has_skip", True)
            if isinstance(last, nn.BatchNorm2d) and residual:  # a block without a way around it would be silenced
                nn.init.zeros_(last.weight)
        self.num_features, self.side = made.channels, made.side
        self.unit_weights, self.scale, self.centres = needs.unit_weights, needs.scale, needs.centres
        self.branches = nn.ModuleList()
        if needs.branches > 1:
            last = _cut_last(network, self.backbone)
            self.branches.extend(copy.deepcopy(last) for _ in range(needs.branches))
        self.dropout = nn.Dropout(drop_rate)
        self.classifier = nn.Linear(made.pooled * needs.branches, num_classes * needs.centres, bias=False)
        self.reset_classifier()
        if bank:
            self.classifier = Bank(made.pooled, bank, num_classes)

    def reset_classifier(self) -> None:
        """Draw the classifier anew from torch's global generator."""
        nn.init.normal_(self.classifier.weight, std=0.01)

    def backbone_parameters(self) -> Iterator[nn.Parameter]:
        """All but the classifier's."""
        return chain(self.backbone.parameters(), self.branches.parameters())

    def trunk(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) normalised -> what `branch` takes; the features where there is one branch."""
        maps: Tensor = self.backbone.forward_features(images)  # type: ignore[operator]
        return functional.dropout(maps, self.map_drop_rate, self.backbone.training) if self.map_drop_rate else maps

    def branch(self, trunk: Tensor, number: int) -> Tensor:
        """The features of one branch."""
        features: Tensor = self.branches[number](trunk) if self.branches else trunk
        return features

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) normalised -> what the network makes of them before it pools: (B, branches C, h, w) of a
        convolutional one, (B, tokens, C) or (B, h, w, C) of others."""
        trunk = self.trunk(images)
        return torch.cat([branch(trunk) for branch in self.branches], dim=_axis(trunk)) if self.branches else trunk

    def maps(self, features: Tensor) -> Tensor:
        """Features as a map (B, branches C, h, w), without class token and registers."""
        return _as_map(self.backbone, features)

    def pool(self, features: Tensor) -> Tensor:
        """Features, of one branch or of all, to (B, F) or (B, branches F), as the network pools them, with dropout."""
        parts = [features]
        if self.branches:
            parts = list(features.split(self.num_features, dim=_axis(features)))
        pooled = [self.backbone.forward_head(part, pre_logits=True) for part in parts]  # type: ignore[operator]
        dropped: Tensor = self.dropout(torch.cat(pooled, dim=1) if len(pooled) > 1 else pooled[0])
        return dropped

    def classify(self, features: Tensor) -> Tensor:
        """Features to (B, K) logits, in float32 whatever the autocast dtype: a bfloat16 logit of 20 is off by up to
        0.06."""
        pooled = self.pool(features).float()
        if self.scale:
            pooled = self.scale * functional.normalize(pooled)
        with torch.autocast(pooled.device.type, enabled=False):
            if self.unit_weights:
                logits = functional.linear(pooled, functional.normalize(self.classifier.weight, dim=1))
            else:
                logits = self.classifier(pooled)
        return logits.unflatten(1, (-1, self.centres)).amax(dim=2) if self.centres > 1 else logits

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(self.features(images))


@dataclass(frozen=True)
class Made:
    """What a backbone makes of an image of a size. Without ``channels`` its features are no map."""

    pooled: int  # features in front of a classifier
    options: Mapping[str, int]  # that timm builds it with for this size
    channels: int = 0  # of the map
    side: int = 0  # of the map, in cells


def check_network(network: str, where: str, crop: int | None = None) -> Made:
    """What a network makes of images of a size, or of its own; nothing is computed for that. Refused, naming ``where``
    (the key of the plan): timm does not know it (with the nearest one that it does), or it takes no such images."""
    architecture, _, tag = network.partition(".")
    if not timm.is_model(architecture):
        names = timm.list_models() + timm.list_pretrained()
        raise Refused(f'timm {timm.__version__} has no network "{network}".', where, did_you_mean(network, names))
    if tag and network not in (tags := timm.list_pretrained(f"{architecture}.*")):
        raise Refused(f'timm has no weights tagged "{network}".', where, did_you_mean(network, tags))
    own = own_size(network)
    if (made := _made(network, crop or own)) is None:
        others = sorted({own, *range(32, 513, 32)}, key=lambda size: abs(size - (crop or own)))
        fits = sorted(islice((size for size in others if _made(network, size)), 3))
        if not fits:
            raise Refused(f"{network} pools no features for a classifier.", where, "Take another network.")
        advice = f"A crop of {listing([str(size) for size in fits])} fits."
        raise Refused(f"{network} takes no images of {crop or own} x {crop or own} pixels.", where, advice)
    return made


def own_size(network: str) -> int:
    """Side of the images that a network's weights were made with, in pixels."""
    config = timm.get_pretrained_cfg(network)
    return 224 if config is None else int(config.input_size[-1])


def normalisation(network: str) -> tuple[tuple[float, ...], tuple[float, ...], str]:
    """Mean, standard deviation (of pixels in 0 to 1) and interpolation that a network's weights were made with."""
    config = timm.get_pretrained_cfg(network)
    if config is None:
        return (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bicubic"
    return tuple(config.mean), tuple(config.std), config.interpolation


def _backbone(network: str, **options: Any) -> nn.Module:
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # timm's notes on renamed networks
        return timm.create_model(network.split(".")[0], num_classes=0, **options)


@cache
def _made(network: str, crop: int) -> Made | None:
    """What a network makes of images of a size; None where that fails, in timm or in torch."""
    try:
        with torch.device("meta"), torch.inference_mode(), torch.random.fork_rng(devices=[]):
            backbone, options = _backbone(network), dict[str, int]()
            if crop != own_size(network) and "img_size" in signature(type(backbone).__init__).parameters:
                options = {"img_size": crop}
                backbone = _backbone(network, **options)
            features = backbone.eval().forward_features(torch.zeros(2, 3, crop, crop))  # type: ignore[operator]
            pooled = backbone.forward_head(features, pre_logits=True)  # type: ignore[operator]
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return None
    try:
        maps = _as_map(backbone, features)
    except Refused:
        return Made(int(pooled.shape[1]), options)
    return Made(int(pooled.shape[1]), options, int(maps.shape[1]), int(maps.shape[3]))


def _as_map(backbone: nn.Module, features: object) -> Tensor:
    """Unpooled features as a map (B, C, h, w). Refused: they have no places in them, or several scales."""
    if isinstance(features, Tensor) and features.ndim == 4:
        return features.movedim(3, 1) if getattr(backbone, "output_fmt", "NCHW") == "NHWC" else features
    if isinstance(features, Tensor) and features.ndim == 3:
        tokens = features.shape[1]
        prefix = int(getattr(backbone, "num_prefix_tokens", tokens - math.isqrt(tokens) ** 2))
        side = math.isqrt(tokens - prefix)
        if side**2 == tokens - prefix > 1:  # a class token alone has no places
            return features[:, prefix:].transpose(1, 2).reshape(len(features), -1, side, side)
    raise Refused(f"{type(backbone).__name__} makes no map of features.")


def _axis(features: Tensor) -> int:
    """Where the channels are, of the families that can be branched."""
    return 1 if features.ndim == 4 else 2


_LAST = {  # of a family of timm's, the modules after which only pooling follows: what BBN gives each branch its own of
    "ResNet": ("layer4.{last}",),
    "SENet": ("layer4.{last}",),
    "EfficientNet": ("blocks.{last}", "conv_head", "bn2"),
    "VisionTransformer": ("blocks.{last}", "norm"),
}


def _cut_last(network: str, backbone: nn.Module) -> nn.Module:
    """Take the last block out of a backbone; its parts are named after where they stood."""
    pattern = _LAST.get(type(backbone).__name__)
    if pattern is None:
        advice = f"Families that can: {', '.join(_LAST)}."
        raise Refused(f"{network} ({type(backbone).__name__}) has no last block that can be branched.", advice=advice)
    blocks = backbone.get_submodule(pattern[0].partition(".")[0])
    names = [name.format(last=len(blocks) - 1) for name in pattern]  # type: ignore[arg-type]
    last = nn.Sequential(OrderedDict((name.replace(".", "-"), backbone.get_submodule(name)) for name in names))
    for name in names:
        backbone.set_submodule(name, nn.Identity())
    return last


def branched(tensors: Mapping[str, Tensor], model: Classifier) -> dict[str, Tensor]:
    """The tensors of a plain classifier for one with branches: each branch begins as the block that it is a copy of,
    and the classifier's shares make the same logits as before.
    """
    wide = dict(tensors)
    for name in model.state_dict():
        if name.startswith("branches."):
            module, rest = name.split(".", 3)[2:]
            plain = f"backbone.{module.replace('-', '.')}.{rest}"
            wide |= {name: tensors[plain]} if plain in tensors else {}
    if (weight := tensors.get("classifier.weight")) is not None:
        branches = len(model.branches)
        wide["classifier.weight"] = torch.cat([weight / branches] * branches, dim=1)
    return wide


def votes(features: Tensor, bank: Tensor, labels: Tensor, num_classes: int, k: int, temperature: float) -> Tensor:
    """p_c, the share of the votes exp(cos / temperature) of the k most similar features that are of class c (weighted
    k-NN, Wu et al., CVPR 2018, section 3.4).

    Args:
        features: (B, F). bank: (N, F), of any dtype. labels: (N,) int64, whose features these are.
    Returns:
        (B, K), rows sum to 1.
    """
    unit, near = functional.normalize(features), features.new_empty(len(features), 0)
    owners = labels.new_empty(len(features), 0)
    for some, its in zip(bank.split(_AT_ONCE), labels.split(_AT_ONCE), strict=True):
        cosines = torch.cat([near, unit @ functional.normalize(some.to(unit.dtype)).T], dim=1)
        owners = torch.cat([owners, its.expand(len(unit), -1)], dim=1)
        near, places = cosines.topk(min(k, cosines.shape[1]), dim=1)
        owners = owners.gather(1, places)
    shares, total = (near / temperature).softmax(dim=1), unit.new_zeros(len(unit), num_classes)
    for column, share in zip(owners.split(1, dim=1), shares.split(1, dim=1), strict=True):
        total.scatter_add_(1, column, share)  # a neighbour at a time: no place twice, so the order of adding is one
    return total


class Bank(nn.Linear):
    """Training images that vote in place of a classifier: a layer whose rows are their features, (N, F) float16, as
    they were cached.

    Its logits are logarithms of `votes`: (B, F) -> (B, K), -inf for a class of which no neighbour is.
    """

    labels: Tensor
    k: Tensor
    temperature: Tensor

    def __init__(self, num_features: int, images: int, num_classes: int) -> None:
        super().__init__(num_features, images, bias=False, dtype=torch.float16)
        self.num_classes = num_classes
        self.weight.requires_grad_(False)
        self.register_buffer("labels", torch.zeros(images, dtype=torch.int64))
        self.register_buffer("k", torch.tensor(1))
        self.register_buffer("temperature", torch.tensor(1.0, dtype=torch.float64))

    def reset_parameters(self) -> None:
        """Draw nothing: `fill` follows, or weights are loaded."""

    def fill(self, blocks: Iterator[Tensor], labels: Tensor, k: int, temperature: float) -> None:
        """Remember features, block after block, and whose they are."""
        done = 0
        for block in blocks:
            self.weight[done : done + len(block)] = block
            done += len(block)
        self.labels.copy_(labels)
        self.k.fill_(k)
        self.temperature.fill_(temperature)

    def forward(self, features: Tensor) -> Tensor:
        k, temperature = int(self.k), float(self.temperature)
        return votes(features, self.weight, self.labels, self.num_classes, k, temperature).log()

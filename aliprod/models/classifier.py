"""An image classifier: a timm backbone and a linear classifier without bias on its pooled features."""

import copy
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import chain
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from aliprod.errors import Refused, did_you_mean


class Classifier(nn.Module):
    """Images to class logits, by way of a feature map that every objective can see.

    The classifier has no bias in any stage (JDAI-CV/DCL, models/LoadModel.py), so that a child loads its
    parent's head unchanged and no class prior hides in a bias after long-tailed training.

    Args:
        network: timm's name, with or without a weights tag.
        drop_rate: dropout before the classifier. drop_path_rate: stochastic depth of the backbone.
        zero_init_last: zero the last norm scale of each residual bottleneck (where timm has not done so), without
            which deep squeeze-and-excitation networks do not learn from scratch.
        branches: copies of the last block side by side (BBN); the classifier sees their features in a row.
        unit_weights: the classifier's rows count as scaled to unit length (A-softmax).
    Raises:
        Refused: timm has no such network, or it has no feature map, stochastic depth or block to be branched.
    """

    def __init__(
        self,
        network: str,
        num_classes: int,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        zero_init_last: bool = False,
        branches: int = 1,
        unit_weights: bool = False,
    ) -> None:
        super().__init__()
        check_network(network, network)
        self.network = network
        self.backbone = _backbone(network, drop_path_rate)
        for block in self.backbone.modules() if zero_init_last else ():
            last, residual = getattr(block, "bn3", None), getattr(block, "has_skip", True)
            if isinstance(last, nn.BatchNorm2d) and residual:  # a block without a way around it would be silenced
                nn.init.zeros_(last.weight)
        self.num_features = _map_channels(network)
        self.unit_weights = unit_weights
        self.branches = nn.ModuleList()
        if branches > 1:
            last = _cut_last(network, self.backbone)
            self.branches.extend(copy.deepcopy(last) for _ in range(branches))
        self.dropout = nn.Dropout(drop_rate)
        self.classifier = nn.Linear(self.num_features * branches, num_classes, bias=False)
        self.reset_classifier()

    @property
    def num_classes(self) -> int:
        return self.classifier.out_features

    def reset_classifier(self) -> None:
        """Draw the classifier anew from torch's global generator."""
        nn.init.normal_(self.classifier.weight, std=0.01)

    def backbone_parameters(self) -> Iterator[nn.Parameter]:
        """All but the classifier's."""
        return chain(self.backbone.parameters(), self.branches.parameters())

    def trunk(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) normalised -> what `branch` takes; the features where there is one branch."""
        maps: Tensor = self.backbone(images)
        return maps

    def branch(self, trunk: Tensor, number: int) -> Tensor:
        """The features (B, C, S, S) of one branch."""
        features: Tensor = self.branches[number](trunk) if self.branches else trunk
        return features

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) normalised -> (B, branches C, H/32, W/32), at that stride for nearly all of timm's networks.

        Layers of timm's that stand between its pooling and its classifier (MobileNetV3's last convolution) come before
        the pooling here: they see places, where their pretrained weights saw a mean.
        """
        maps = self.trunk(images)
        return torch.cat([branch(maps) for branch in self.branches], dim=1) if self.branches else maps

    def pool(self, features: Tensor) -> Tensor:
        """(B, C, S, S) -> (B, C), with dropout."""
        pooled: Tensor = self.dropout(features.mean(dim=(2, 3)))
        return pooled

    def classify(self, features: Tensor) -> Tensor:
        """(B, branches C, S, S) -> (B, K) logits, in float32 whatever the autocast dtype: a bfloat16 logit of 20 is
        off by up to 0.06."""
        pooled, weight = self.pool(features).float(), self.classifier.weight
        with torch.autocast(pooled.device.type, enabled=False):
            return functional.linear(pooled, functional.normalize(weight, dim=1) if self.unit_weights else weight)

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(self.features(images))


def check_network(network: str, where: str) -> None:
    """Refuse a name that timm does not know, with the nearest one that it does, and a network without a feature map.
    Refused: naming ``where`` (the key of the plan)."""
    architecture, _, tag = network.partition(".")
    if not timm.is_model(architecture):
        names = timm.list_models() + timm.list_pretrained()
        raise Refused(f'timm {timm.__version__} has no network "{network}".', where, did_you_mean(network, names))
    if tag and network not in (tags := timm.list_pretrained(f"{architecture}.*")):
        raise Refused(f'timm has no weights tagged "{network}".', where, did_you_mean(network, tags))
    if not _map_channels(network):
        what = f"{network} makes no feature map (batch, channels, height, width), as convolutional networks do."
        raise Refused(what, where, "For example resnet50, efficientnet_b3, regnety_032 or convnext_tiny makes one.")


def normalisation(network: str) -> tuple[tuple[float, ...], tuple[float, ...], str]:
    """Mean, standard deviation (of pixels in 0 to 1) and interpolation that a network's weights were made with."""
    config = timm.get_pretrained_cfg(network)
    if config is None:
        return (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bicubic"
    return tuple(config.mean), tuple(config.std), config.interpolation


def _backbone(network: str, drop_path_rate: float) -> nn.Module:
    options: dict[str, Any] = {} if not drop_path_rate else {"drop_path_rate": drop_path_rate}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # timm's notes on renamed networks
        try:
            return timm.create_model(network.split(".")[0], num_classes=0, global_pool="", **options)
        except TypeError as error:
            if not options:
                raise
            raise Refused(f"{network} has no stochastic depth: leave drop_path_rate out.", network) from error


@cache
def _map_channels(network: str) -> int:
    """C of the feature map (B, C, h, w) that a backbone makes; 0 where it makes tokens or puts channels last."""
    try:
        with torch.device("meta"), torch.inference_mode(), torch.random.fork_rng(devices=[]):
            backbone = _backbone(network, 0.0).eval()
            made = backbone(torch.zeros(1, *backbone.pretrained_cfg["input_size"]))  # type: ignore[index]
    except AssertionError:  # timm's, of networks that pool tokens and nothing else
        return 0
    return int(made.shape[1]) if made.ndim == 4 and made.shape[1] == backbone.head_hidden_size else 0


_LAST = {  # of a family of timm's, the modules after which only pooling follows: what BBN gives each branch its own of
    "ResNet": ("layer4.{last}",),
    "SENet": ("layer4.{last}",),
    "EfficientNet": ("blocks.{last}", "conv_head", "bn2"),
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

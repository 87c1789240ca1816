"""A recogniser: a timm backbone and a linear classifier without bias on its pooled features."""

import warnings
from typing import Any

import timm
import torch
from torch import Tensor, nn

from aliprod.errors import Refused, did_you_mean


class Recogniser(nn.Module):
    """Images to class logits, by way of a feature map that every objective can see.

    The classifier has no bias in any stage (JDAI-CV/DCL, models/LoadModel.py), so that a child loads its
    parent's head unchanged and no class prior hides in a bias after long-tailed training.

    Args:
        network: timm's name, with or without a weights tag.
        num_classes: K.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the backbone.
        zero_init_last: zero the last norm scale of each residual bottleneck (where timm has not done so), without
            which deep squeeze-and-excitation networks do not learn from scratch.
    Raises:
        Refused: timm has no such network, or it has no stochastic depth.
    """

    def __init__(
        self,
        network: str,
        num_classes: int,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        zero_init_last: bool = False,
    ) -> None:
        super().__init__()
        check_network(network, network)
        self.network = network
        self.backbone = _backbone(network, drop_path_rate)
        if zero_init_last:
            _zero_last_norms(self.backbone)
        self.num_features = int(self.backbone.num_features)  # type: ignore[arg-type]
        self.dropout = nn.Dropout(drop_rate)
        self.classifier = nn.Linear(self.num_features, num_classes, bias=False)
        nn.init.normal_(self.classifier.weight, std=0.01)

    @property
    def num_classes(self) -> int:
        return self.classifier.out_features

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) normalised -> (B, C, H/32, W/32)."""
        features: Tensor = self.backbone(images)
        return features

    def classify(self, features: Tensor) -> Tensor:
        """(B, C, S, S) -> (B, K) logits."""
        logits: Tensor = self.classifier(self.dropout(features.mean(dim=(2, 3))))
        return logits

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(self.features(images))


def check_network(network: str, where: str) -> None:
    """Refuse a name that timm does not know, with the nearest one that it does.

    Raises:
        Refused: naming ``where`` (the key of the plan).
    """
    if timm.is_model(network.split(".")[0]):
        tags = timm.list_pretrained(f"{network.split('.')[0]}.*")
        if "." not in network or network in tags:
            return
        raise Refused(f'timm has no weights tagged "{network}".', where, did_you_mean(network, tags))
    names = timm.list_models() + timm.list_pretrained()
    raise Refused(f'timm {timm.__version__} has no network "{network}".', where, did_you_mean(network, names))


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


def _zero_last_norms(backbone: nn.Module) -> None:
    for module in backbone.modules():
        last, residual = getattr(module, "bn3", None), getattr(module, "has_skip", True)
        if isinstance(last, nn.BatchNorm2d) and residual:  # a block without a way around it would be silenced
            torch.nn.init.zeros_(last.weight)

"""Training images that vote in place of a classifier (weighted k-NN, Wu et al., CVPR 2018, section 3.4)."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

_AT_ONCE = 16_384  # features that are compared: 128 MB at 2048 of them


def votes(features: Tensor, bank: Tensor, labels: Tensor, num_classes: int, k: int, temperature: float) -> Tensor:
    """p_c, the share of the votes exp(cos / temperature) of the k most similar features that are of class c.

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
    """A layer whose rows are features of training images, (N, F) float16, as they were cached.

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

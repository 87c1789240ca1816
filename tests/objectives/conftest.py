"""Golden vectors as tensors, and a backbone small enough to differentiate in float64."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn

from aliprod.objectives import Context, Needs

settings.register_profile("loaded", deadline=None)  # a busy machine is no fault of an example
settings.load_profile("loaded")


class Classifier(nn.Module):
    """Stride 32, as the backbones; cells see their neighbours, so that a shuffle shows; rows are independent."""

    def __init__(self, num_features: int, num_classes: int, branches: int = 1) -> None:
        super().__init__()
        patches = nn.Conv2d(3, num_features, kernel_size=32, stride=32)
        neighbours = nn.Conv2d(num_features, num_features, kernel_size=3, padding=1)
        self.backbone = nn.Sequential(patches, nn.ReLU(), neighbours, nn.ReLU())
        self.branches = nn.ModuleList(
            nn.Conv2d(num_features, num_features, 1) for _ in range(branches if branches > 1 else 0)
        )
        self.classifier = nn.Linear(num_features * branches, num_classes, bias=False)

    def trunk(self, images: Tensor) -> Tensor:
        return self.backbone(images)

    def branch(self, trunk: Tensor, number: int) -> Tensor:
        return self.branches[number](trunk)

    def features(self, images: Tensor) -> Tensor:
        maps = self.trunk(images)
        return torch.cat([branch(maps) for branch in self.branches], dim=1) if self.branches else maps

    def maps(self, features: Tensor) -> Tensor:
        return features

    def pool(self, features: Tensor) -> Tensor:
        return features.mean(dim=(2, 3))

    def classify(self, features: Tensor) -> Tensor:
        return self.classifier(self.pool(features))

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(self.features(images))


@dataclass(frozen=True)
class Batch:
    images: Tensor
    labels: Tensor
    epoch: int = 0
    step: int = 0
    seed: int = 0
    weights: Tensor | None = None
    second: "Batch | None" = None
    teacher: Tensor | None = None


@pytest.fixture(scope="session")
def golden(shared: Path) -> Callable[[str], dict[str, Tensor]]:
    def read(name: str) -> dict[str, Tensor]:
        with np.load(shared / "golden" / f"{name}.npz", allow_pickle=False) as arrays:
            return {key: torch.from_numpy(arrays[key]) for key in arrays.files}

    return read


@pytest.fixture
def context() -> Context:
    return Context(
        num_classes=5,
        num_features=8,
        crop=64,
        epochs=3,
        class_counts=torch.tensor([100, 40, 9, 3, 1]),
        ancestor=torch.tensor([[0, 0, 1, 1, 1], [0, 1, 2, 3, 4]]),
    )


@pytest.fixture
def model_for(context: Context) -> Callable[[Needs], Classifier]:
    def model_for(needs: Needs) -> Classifier:
        torch.manual_seed(0)
        return Classifier(context.num_features, context.num_classes, needs.branches)

    return model_for


@pytest.fixture
def model(model_for: Callable[[Needs], Classifier]) -> Classifier:
    return model_for(Needs())


@pytest.fixture
def batch(context: Context) -> Batch:
    images = torch.randn(8, 3, context.crop, context.crop, generator=torch.Generator().manual_seed(1))
    return Batch(images, torch.tensor([0, 0, 1, 1, 2, 2, 4, 4]), seed=7)

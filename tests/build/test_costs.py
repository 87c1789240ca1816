"""An epoch is counted as a training really takes and shows it."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aliprod.build.costs import epoch_of
from aliprod.catalogue.catalogue import Catalogue
from aliprod.data.loader import Feed, TrainBatches
from aliprod.data.training_set import training_set
from aliprod.forecast.rates import speed_up
from aliprod.models import weights
from aliprod.models.classifier import Classifier
from aliprod.recipe import Machine, Stage
from aliprod.store import commit
from aliprod.training.candidates import best_candidate, blended
from aliprod.training.ema import Average
from aliprod.training.learner import Learner, Place, Setup, set_up

NETWORK, CPU = "test_resnet.r160_in1k", torch.device("cpu")
LIO = {"name": "lio", "positives": 2, "published": False, "detach_target": True}
DCL: dict[str, Any] = {"name": "dcl", "parts": 2}
STAGES: list[dict[str, Any]] = [
    {},
    {"images": {"per_class": 3}},
    {"batch_size": 5},
    {"batch_size": 500},  # more than there are images
    {"objective": LIO},
    {"objective": LIO, "images": {"per_class": 4}, "batch_size": 6},
    {"objective": {"name": "bbn"}},
    {"sampler": "class_balanced"},
]


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


def stage_of(settings: dict[str, Any]) -> Stage:
    return Stage.model_validate({"resize": 64, "crop": 64, "batch_size": 8} | settings)


def batches_of(stage: Stage, learner: Learner, catalogue: Catalogue) -> tuple[TrainBatches, Feed]:
    feed = Feed(CPU, (0.5,) * 3, (0.5,) * 3, "bilinear")
    data = training_set(catalogue, stage)
    return TrainBatches(data, stage, feed, learner.needs.group, learner.needs.second), feed


@pytest.mark.parametrize("settings", STAGES)
def test_an_epoch_has_the_steps_that_the_loader_makes(packages: Catalogue, settings: dict[str, Any]) -> None:
    stage = stage_of(settings)
    batches, _ = batches_of(stage, Learner(stage, NETWORK, packages, Place(CPU)), packages)
    found = epoch_of(stage, packages)
    assert found.steps == batches.steps_per_epoch


@contextmanager
def looked_at() -> Iterator[list[int]]:
    """How many images classifiers are shown."""
    counts: list[int] = []

    def count(module: nn.Module, shown: tuple[Tensor, ...], _: Any) -> None:
        if isinstance(module, Classifier):
            counts.append(len(shown[0]))

    hook = nn.modules.module.register_module_forward_hook(count)
    try:
        yield counts
    finally:
        hook.remove()


@pytest.mark.parametrize("objective", [{"name": "cross_entropy"}, DCL])
@pytest.mark.parametrize("ema", [None, 0.9])
def test_behind_an_epoch_as_many_images_are_seen_as_its_scoring_shows(
    packages: Catalogue, objective: dict[str, Any], ema: float | None
) -> None:
    stage = stage_of({"objective": objective, "ema": ema})
    learner = Learner(stage, NETWORK, packages, Place(CPU))
    batches, feed = batches_of(stage, learner, packages)
    setup = Setup(learner, packages, feed, batches)
    with looked_at() as counts:
        best_candidate(setup, Average(learner.model, ema) if ema else None, epoch=0)
    assert epoch_of(stage, packages).seen == sum(counts)


@pytest.mark.parametrize("greedy", [False, True])
def test_a_soup_sees_as_many_images_as_its_making_shows(packages: Catalogue, tmp_path: Path, greedy: bool) -> None:
    config = weights.Config(NETWORK, (0.5,) * 3, (0.25,) * 3, "bilinear", 64, 64)
    classes = weights.Classes(tuple(packages.classes.tolist()), packages.names)
    for name in "ab":
        tensors = Classifier(NETWORK, 4).state_dict()
        commit.write(tmp_path / name, partial(weights.save, tensors=tensors, config=config, classes=classes))
    stage = stage_of({"soup": {"of": ("a", "b"), "greedy": greedy}})
    with looked_at() as counts:
        blended(set_up(stage, NETWORK, packages, Machine()), [tmp_path / "a", tmp_path / "b"])
    found = epoch_of(stage, packages)
    assert (found.steps, found.seen) == (0, sum(counts))


def test_eight_gpus_are_as_fast_as_the_published_ones_lie_around() -> None:
    """NVIDIA's DeepLearningExamples, A100 80GB, mixed precision: 6.72, 6.75 and 7.75."""
    assert 6.72 < speed_up(8) < 7.75
    assert speed_up(1) == 1

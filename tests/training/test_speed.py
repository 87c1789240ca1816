"""benchmark: what is measured is what trains, however few pictures there are."""

from collections.abc import Iterator
from typing import Any, get_args

import pytest
import torch

from aliprod.catalogue.catalogue import Catalogue
from aliprod.recipe import ObjectiveRecipe, Stage
from aliprod.training.speed import Part, measure, measure_prediction

STAGE = Stage(resize=40, crop=32, batch_size=16)


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("part", get_args(Part))
def test_each_part_is_measured_with_fewer_pictures_than_steps_take(packages: Catalogue, part: Part) -> None:
    found = measure(part, STAGE, "test_resnet", packages, steps=2)  # 64 of 32 pictures
    assert (found["part"], found["device"], found["steps"]) == (part, "cpu", 2)
    assert found["images_per_second"] > 0
    assert 0 <= found["data_wait_share"] <= 1
    assert found["memory_bytes"] > 100e6  # PyTorch alone


def test_a_loader_alone_waits_for_nothing_else_and_a_step_alone_for_no_loader(packages: Catalogue) -> None:
    loader, step = (measure(part, STAGE, "test_resnet", packages, steps=2) for part in ("loader", "step"))
    assert (loader["data_wait_share"], loader["limited_by"]) == (1.0, "loader")
    assert (step["data_wait_share"], step["limited_by"]) == (0.0, "step")
    both = measure("train", STAGE, "test_resnet", packages, steps=2)
    assert 0 < both["data_wait_share"] < 1


@pytest.mark.parametrize("part", get_args(Part))
@pytest.mark.parametrize(
    ("objective", "settings"),
    [
        ({"name": "lio", "positives": 3}, {}),  # groups of a class
        ({"name": "bbn"}, {}),  # a second batch
        ({"name": "dcl", "parts": 2}, {"shares": 2}),
        ({"name": "arcface"}, {"trains": "classifier", "features": "cached", "pretrained": True}),  # none are there
        ({"name": "distillation", "temperature": 2.0}, {"teachers": ("net/a", "net/b")}),  # of which there are none yet
    ],
)
def test_objectives_that_ask_for_more_than_images_are_measured_too(
    packages: Catalogue, part: Part, objective: dict[str, Any], settings: dict[str, Any]
) -> None:
    stage = STAGE.model_copy(update={"objective": ObjectiveRecipe(**objective), "crop": 64, "resize": 64, **settings})
    assert measure(part, stage, "test_resnet", packages, steps=1)["images_per_second"] > 0


def test_ten_crops_of_an_image_are_one_image_and_take_longer_than_its_centre(packages: Catalogue) -> None:
    stage = Stage(resize=72, crop=64)
    centre, ten = (
        measure_prediction(stage, "test_resnet", views, packages, batches=1) for views in ("center", "ten_crop")
    )
    assert (centre["images"], ten["images"]) == (256, 32)
    assert centre["images_per_second"] > ten["images_per_second"] > 0

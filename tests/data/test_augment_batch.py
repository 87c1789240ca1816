"""augment_batch: Pillow's bytes, from torchvision's older transforms under the same draws, and no picture's neighbours.

The tolerance is none: every view is equal to the bit.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_augment import CASES, LISTS, older_view, photograph
from test_loader import FEED, assert_equal, batches
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.autoaugment import (
    AutoAugment,
    AutoAugmentPolicy,
    RandAugment,
    TrivialAugmentWide,
    _apply_op,
)

from aliprod.catalogue.catalogue import Catalogue
from aliprod.catalogue.decode import decode
from aliprod.data.augment import Picture, train_view
from aliprod.data.augment_batch import Cut, cut, pack, views
from aliprod.recipe import Stage

CPU = torch.device("cpu")
SIDE = 32
SQUARED = Stage(augmentation=("resize",), resize=SIDE, crop=SIDE)
BATCHED = [names for names in LISTS if "aug_mix" not in names]
SPACES = {
    "auto_augment": AutoAugment(AutoAugmentPolicy.IMAGENET)._augmentation_space(10, (SIDE, SIDE)),
    "rand_augment": RandAugment()._augmentation_space(31, (SIDE, SIDE)),
    "trivial_augment": TrivialAugmentWide()._augmentation_space(31),
}
OPERATIONS = sorted({(name, operation) for name, space in SPACES.items() for operation in space})


@pytest.fixture(scope="module", autouse=True)
def one_thread(torch_as_before: None) -> None:
    """As a training has where nothing else is said: several wait for each other on a busy machine."""
    torch.set_num_threads(1)


def seen(pictures: list[Picture], stage: Stage, seeds: list[int], interpolation: str = "bicubic") -> Tensor:
    cuts = [cut(picture, stage, seed, interpolation)[0] for picture, seed in zip(pictures, seeds, strict=True)]
    return views(pack(cuts), interpolation, CPU)


def assert_views(pictures: list[Image.Image], stage: Stage, interpolation: str) -> None:
    seeds = list(range(len(pictures)))
    for seed, view in zip(seeds, seen([*pictures], stage, seeds, interpolation), strict=True):
        torch.manual_seed(seed)
        expected, box = older_view(pictures[seed], stage, interpolation)
        assert torch.equal(view, expected), (seed, interpolation)
        assert cut(pictures[seed], stage, seed, interpolation)[1].tolist() == box


@pytest.mark.parametrize(("interpolation", "number"), CASES)
def test_a_picture_is_squared_as_the_golden_one(shared: Path, interpolation: str, number: int) -> None:
    with np.load(shared / "golden" / "transforms.npz", allow_pickle=False) as golden:
        picture, (side, crop) = torch.from_numpy(golden[f"image_{number}"]), golden[f"resize_crop_{number}"].tolist()
        expected, offset = golden[f"pixels_{interpolation}_{number}"], (side - crop) // 2
    (squared,) = seen([picture], Stage(augmentation=("resize",), resize=side, crop=side), [0], interpolation)
    assert np.array_equal(squared[offset : offset + crop, offset : offset + crop].numpy(), expected)


SIZES = st.lists(st.tuples(st.integers(1, 150), st.integers(1, 150)), min_size=1, max_size=6)


@settings(max_examples=40)
@given(SIZES, st.sampled_from(["bicubic", "bilinear"]), st.integers(0, 2**32 - 1))
def test_the_hardest_edges_of_any_sizes_are_resized_as_pillow_does(
    sizes: list[tuple[int, int]], interpolation: str, seed: int
) -> None:
    draws = np.random.default_rng(seed)
    pictures = [Image.fromarray(draws.integers(0, 2, (*size, 3), np.uint8) * 255) for size in sizes]
    squared = seen([*pictures], SQUARED, [0] * len(sizes), interpolation)
    for picture, view in zip(pictures, squared, strict=True):
        expected = picture.resize((SIDE, SIDE), Image.Resampling[interpolation.upper()])
        assert np.array_equal(view.numpy(), np.array(expected))


def squares(count: int) -> list[Image.Image]:
    """Photographs, noise, few levels, and one colour."""
    draws = np.random.default_rng(0)
    few = (draws.integers(0, levels, (SIDE, SIDE, 3)) * (255 // levels) for levels in (2, 3, 255))
    made = [photograph(seed).resize((SIDE, SIDE)) for seed in range(count)]
    return [*made, *(Image.fromarray(a.astype(np.uint8)) for a in few), Image.new("RGB", (SIDE, SIDE), (7, 255, 0))]


@pytest.mark.parametrize(("space", "operation"), OPERATIONS)
def test_an_operation_at_every_magnitude_is_torchvisions_on_pillow(space: str, operation: str) -> None:
    magnitudes, signed = SPACES[space][operation]
    strengths = [float(m) for m in magnitudes.reshape(-1)]
    strengths += [-strength for strength in strengths if signed]
    every = [(picture, strength) for picture in squares(8) for strength in strengths]
    cuts = [
        Cut(torch.from_numpy(np.array(picture)).reshape(-1, 3), (SIDE, SIDE), SIDE, [(space, (operation, strength))])
        for picture, strength in every
    ]
    done = views(pack(cuts), "bicubic", CPU)
    for (picture, strength), view in zip(every, done, strict=True):
        expected = _apply_op(picture, operation, strength, InterpolationMode.NEAREST, [128, 128, 128])
        assert np.array_equal(view.numpy(), np.array(expected)), strength


@pytest.mark.parametrize("names", BATCHED, ids="-".join)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_views_are_those_of_torchvisions_older_transforms(interpolation: str, names: tuple[str, ...]) -> None:
    stage = Stage(augmentation=names, resize=40, crop=SIDE, scale=(0.2, 0.9))
    assert_views([photograph(seed) for seed in range(60)], stage, interpolation)


@pytest.mark.parametrize("names", BATCHED, ids="-".join)
def test_so_they_are_on_photographs(shared: Path, names: tuple[str, ...]) -> None:
    paths = sorted((shared / "data/grocery/train").rglob("*.jpg"))[::100]
    assert_views([decode(path) for path in paths], Stage(augmentation=names), "bicubic")


def test_what_the_loader_shows_differs_by_two_levels_where_it_resizes_by_torch_and_not_at_all_elsewhere() -> None:
    for names, most in (("random_resized_crop", "flip"), 2), (("random_resized_crop", "flip", "color_jitter"), 0):
        stage, seeds = Stage(augmentation=names, resize=40, crop=SIDE), list(range(40))
        pictures: list[Picture] = [photograph(seed) for seed in seeds]
        loaders = torch.stack([train_view(p, stage, s, "bicubic")[0] for p, s in zip(pictures, seeds, strict=True)])
        difference = (seen(pictures, stage, seeds).int() - loaders.int()).abs()
        assert difference.max() <= most
        assert difference.float().mean() <= 0.05


@pytest.mark.parametrize("size", [(SIDE * 5, 20), (400, 600)])
def test_a_picture_that_would_slow_the_batch_is_resized_by_the_loader_to_the_same_bytes(size: tuple[int, int]) -> None:
    stage = SQUARED.model_copy(update={"augmentation": ("resize", "flip", "auto_augment")})
    pictures = [photograph(seed).resize(size) for seed in range(4)]
    assert {cut(picture, stage, 0, "bicubic")[0].size for picture in pictures} == {(SIDE, SIDE)}
    assert_views(pictures, stage, "bicubic")


BESIDE = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2**32 - 1)), min_size=2, max_size=5)


@settings(max_examples=15)
@given(BESIDE, st.sampled_from(BATCHED))
def test_a_view_hangs_on_no_picture_beside_it(drawn: list[tuple[int, int]], names: tuple[str, ...]) -> None:
    stage = Stage(augmentation=names, resize=40, crop=SIDE)
    pictures: list[Picture] = [photograph(number).resize((40 + 17 * number, 110)) for number, _ in drawn]
    seeds = [seed for _, seed in drawn]
    together = seen(pictures, stage, seeds)
    for place, picture in enumerate(pictures):
        assert torch.equal(together[place], seen([picture], stage, seeds[place : place + 1])[0])


def test_loader_processes_and_shares_change_nothing_of_what_a_step_sees(packages: Catalogue) -> None:
    names = ("random_resized_crop", "flip", "rand_augment", "cutout")
    stage = Stage(resize=40, crop=SIDE, batch_size=8, augmentation=names, augment="device", shares=2)
    alone, helped = (batches(packages, stage=stage, feed=replace(FEED, processes=count)) for count in (0, 2))
    whole = list(alone.epoch(1))
    assert_equal(whole, list(helped.epoch(1)))
    by_rank = [batches(packages, stage=stage, feed=replace(FEED, rank=rank, world_size=2)) for rank in (0, 1)]
    for rank, its in enumerate(by_rank):
        assert_equal(whole[rank::2], list(its.epoch(1)))
    loaders = batches(packages, stage=stage.model_copy(update={"augment": "cpu"}))
    assert_equal(whole, list(loaders.epoch(1)))  # RandAugment follows, so loaders resize by Pillow

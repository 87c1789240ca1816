"""augment: Pillow's pixels, and torchvision's older transforms written out under the same draws."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional as F
from torchvision.transforms.autoaugment import AutoAugment, AutoAugmentPolicy, _apply_op

from aliprod.catalogue.decode import decode
from aliprod.data import augment
from aliprod.data.augment import cutout_mask, eval_view, normalise, on_device, square, train_view
from aliprod.recipe import Augmentation, Stage

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GREY = [128, 128, 128]


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, np.ndarray]:
    with np.load(shared / "golden" / "transforms.npz", allow_pickle=False) as arrays:
        return dict(arrays)


CASES = [(interpolation, number) for interpolation in ("bicubic", "bilinear") for number in (0, 1)]


@pytest.mark.parametrize(("interpolation", "number"), CASES)
def test_the_eval_view_is_pillows_to_the_bit(golden: dict[str, np.ndarray], interpolation: str, number: int) -> None:
    image = torch.from_numpy(golden[f"image_{number}"]).permute(2, 0, 1)
    view = eval_view(image, *golden[f"resize_crop_{number}"].tolist(), interpolation)
    expected = torch.from_numpy(golden[f"pixels_{interpolation}_{number}"]).permute(2, 0, 1)
    assert view.dtype == torch.uint8
    assert torch.equal(view, expected)


@pytest.mark.parametrize(("interpolation", "number"), CASES)
def test_a_squared_picture_is_pillows_to_the_bit(
    golden: dict[str, np.ndarray], interpolation: str, number: int
) -> None:
    resize, crop = golden[f"resize_crop_{number}"].tolist()
    squared = square(Image.fromarray(golden[f"image_{number}"]), resize, interpolation)
    offset = (resize - crop) // 2
    pixels = squared[:, offset : offset + crop, offset : offset + crop]
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), golden[f"pixels_{interpolation}_{number}"])
    expected = golden[f"normalised_{interpolation}_{number}"]
    np.testing.assert_allclose(normalise(pixels, MEAN, STD).numpy(), expected, rtol=1e-4, atol=1e-6)


def test_the_cutout_mask_is_the_golden_one_for_one_centre_and_for_many(golden: dict[str, np.ndarray]) -> None:
    size, side = int(golden["cutout_size"]), int(golden["cutout_side"])
    centres, expected = torch.from_numpy(golden["cutout_centre"]), torch.from_numpy(golden["cutout_mask"]).bool()
    assert torch.equal(cutout_mask(size, side, centres), expected)
    for centre, mask in zip(centres, expected, strict=True):
        assert torch.equal(cutout_mask(size, side, centre), mask)


@given(st.integers(1, 40), st.integers(1, 40), st.data())
def test_cutout_erases_the_cells_of_the_square_and_no_other(size: int, side: int, data: st.DataObject) -> None:
    row, column = data.draw(st.tuples(*[st.integers(0, size - 1)] * 2))
    expected = torch.zeros(size, size, dtype=torch.bool)
    top, left = row - side // 2, column - side // 2
    expected[max(0, top) : max(0, top + side), max(0, left) : max(0, left + side)] = True
    assert torch.equal(cutout_mask(size, side, torch.tensor([row, column])), expected)


def test_what_is_erased_is_zero_after_normalising_and_nothing_is_where_the_box_has_no_size() -> None:
    pixels = torch.randint(256, (2, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = on_device(pixels, torch.tensor([[-4, 27, 8, 8], [0, 0, 0, 0]]), MEAN, STD)
    expected = ((pixels.double() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)
    expected[0, :, :4, 27:] = 0.0  # cutout's square of 8 around (0, 31)
    torch.testing.assert_close(images, expected.float(), rtol=1e-5, atol=1e-5)
    assert images.is_contiguous(memory_format=torch.channels_last)


def photograph(seed: int) -> Image.Image:
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (7, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((90, 120), Image.Resampling.BICUBIC)


def pixels_of(seed: int) -> Tensor:
    return torch.from_numpy(np.array(photograph(seed)))


def auto_augment(image: Image.Image) -> Image.Image:
    """AutoAugment's policy by torchvision's older operations; torchvision v2's order of draws, written out."""
    its = AutoAugment(AutoAugmentPolicy.IMAGENET)
    space = its._augmentation_space(10, image.size[::-1])
    for name, probability, place in its.policies[int(torch.randint(len(its.policies), ()))]:
        if torch.rand(()) > probability:
            continue
        magnitudes, signed = space[name]
        magnitude = float(magnitudes[place]) if place is not None else 0.0
        if signed and torch.rand(()) <= 0.5:
            magnitude = -magnitude
        image = _apply_op(image, name, magnitude, F.InterpolationMode.NEAREST, GREY)
    return image


def test_auto_augment_is_that_of_torchvisions_older_operations_to_the_bit() -> None:
    alone = Stage().model_copy(update={"augmentation": ("auto_augment",)})  # a stage of a plan resizes, too
    for seed in range(300):
        torch.manual_seed(seed)
        expected, drawn_next = np.array(auto_augment(photograph(seed % 5))), torch.rand(())
        seen, _ = train_view(photograph(seed % 5), alone, seed, "bicubic")
        assert torch.rand(()) == drawn_next, seed
        assert np.array_equal(seen.numpy(), expected), seed


def older(interpolation: str, crop: int, scale: tuple[float, float]) -> dict[str, Callable[[Image.Image], Image.Image]]:
    mode = F.InterpolationMode(interpolation)
    return {
        "random_resized_crop": transforms.RandomResizedCrop(crop, scale, (3 / 4, 4 / 3), mode),
        "random_crop": transforms.RandomCrop(crop),
        "resize": transforms.Resize((crop, crop), mode),
        "rotation": transforms.RandomRotation(15, F.InterpolationMode.BILINEAR, fill=GREY),
        "flip": transforms.RandomHorizontalFlip(),
        "auto_augment": auto_augment,
        "color_jitter": seeded(transforms.ColorJitter(0.4, 0.4, 0.4)),
        "rand_augment": seeded(transforms.RandAugment(fill=GREY)),
        "trivial_augment": seeded(transforms.TrivialAugmentWide(fill=GREY)),
        "aug_mix": seeded(transforms.AugMix(fill=GREY)),
    }


def seeded(transform: Callable[[Image.Image], Image.Image]) -> Callable[[Image.Image], Image.Image]:
    """Its draws come from a seed that it draws, and those after it go on as if it had drawn nothing else."""

    def seen(image: Image.Image) -> Image.Image:
        seed = int(torch.randint(2**31, ()))
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            return transform(image)

    return seen


def erased_box(name: str, crop: int) -> list[int]:
    """Cutout's square, or the region that torchvision's RandomErasing sets to 0."""
    if name == "cutout":
        row, column = torch.randint(crop, (2,)).tolist()
        return [row - crop // 8, column - crop // 8, crop // 4, crop // 4]
    zeros = (transforms.RandomErasing()(torch.ones(1, crop, crop))[0] == 0).nonzero()
    if not len(zeros):
        return [0, 0, 0, 0]
    (top, left), (bottom, right) = zeros.min(0).values.tolist(), zeros.max(0).values.tolist()
    return [top, left, bottom - top + 1, right - left + 1]


LISTS = [
    ("random_resized_crop", "flip", "auto_augment", "cutout"),
    ("random_crop", "flip", "auto_augment"),
    ("rotation", "random_crop", "flip"),
    ("resize", "cutout", "rotation"),
    ("flip", "random_resized_crop"),
    ("random_resized_crop", "color_jitter", "rand_augment", "flip", "random_erasing"),
    ("random_crop", "trivial_augment", "random_erasing"),
    ("random_resized_crop", "flip", "aug_mix"),
]
LIST_CASES = [(interpolation, names) for interpolation in ("bicubic", "bilinear") for names in LISTS]


def test_every_augmentation_is_in_a_list_below() -> None:
    assert {name for names in LISTS for name in names} == set(get_args(Augmentation))


def older_view(image: Image.Image, stage: Stage, interpolation: str) -> tuple[Tensor, list[int]]:
    erased = [0, 0, 0, 0]
    steps = older(interpolation, stage.crop, stage.scale)
    if "random_crop" in stage.augmentation:
        image = F.resize(image, [stage.resize, stage.resize], F.InterpolationMode(interpolation))
    for name in stage.augmentation:
        if name in ("cutout", "random_erasing"):
            erased = erased_box(name, stage.crop)
        else:
            image = steps[name](image)
    return torch.from_numpy(np.array(image)), erased


def assert_equal_work(image: Image.Image, stage: Stage, interpolation: str, seed: int) -> None:
    """The tolerance of the whole pipeline: 0.05 of 255 in the mean, 2 at most."""
    pixels, erased = train_view(torch.from_numpy(np.array(image)), stage, seed, interpolation)
    assert torch.equal(train_view(image, stage, seed, interpolation)[0], pixels), "an image is not seen as its pixels"
    torch.manual_seed(seed)
    expected, expected_box = older_view(image, stage, interpolation)
    assert pixels.dtype == torch.uint8
    assert pixels.is_contiguous()
    difference = (pixels.int() - expected.int()).abs()
    assert difference.max() <= 2, seed
    assert difference.float().mean() <= 0.05, seed
    assert erased.tolist() == expected_box


@pytest.mark.parametrize(("interpolation", "names"), LIST_CASES)
def test_the_train_view_is_that_of_torchvisions_older_transforms_under_the_same_draws(
    interpolation: str, names: tuple[str, ...]
) -> None:
    stage = Stage(augmentation=names, resize=40, crop=32, scale=(0.2, 0.9))
    for seed in range(60):
        assert_equal_work(photograph(seed), stage, interpolation, seed)


@pytest.mark.parametrize(("interpolation", "names"), LIST_CASES)
def test_so_it_is_on_photographs(shared: Path, interpolation: str, names: tuple[str, ...]) -> None:
    stage = Stage(augmentation=names)
    paths = sorted((shared / "data/grocery/train").rglob("*.jpg"))[::40]
    for seed, path in enumerate(paths):
        assert_equal_work(decode(path), stage, interpolation, seed)


def test_torchs_resizing_differs_from_pillows_only_where_auto_augment_makes_more_of_a_level(shared: Path) -> None:
    """Which it does in most views, for single pixels: no view is more than 0.05 of 255 apart in the mean."""
    pillow = Stage(augmentation=("random_resized_crop", "flip", "auto_augment"))
    torchs, differences = pillow.model_copy(update={"resizing": "torch"}), []
    for seed, path in enumerate(sorted((shared / "data/grocery/train").rglob("*.jpg"))[::20]):
        picture = decode(path)
        view, near = (train_view(picture, stage, seed, "bicubic")[0] for stage in (pillow, torchs))
        torch.manual_seed(seed)
        operations = [
            step for name, step in augment._drawn(pillow, picture.height, picture.width) if name == "auto_augment"
        ]
        if {name for name, _ in operations} <= {"Invert", "Rotate", "ShearX"}:  # they move levels, and stretch none
            assert torch.equal(view, near), operations
        differences.append((view.int() - near.int()).abs().float().mean())
    assert 0 < max(differences) <= 0.05


@given(st.integers(20, 80), st.integers(20, 80), st.integers(0, 2**32 - 1))
def test_the_hardest_edges_are_resized_as_pillow_does(height: int, width: int, seed: int) -> None:
    noise = np.random.default_rng(seed).integers(0, 2, (height, width, 3), np.uint8) * 255
    stage = Stage(augmentation=("random_resized_crop",), resize=40, crop=32)
    pixels, _ = train_view(torch.from_numpy(noise), stage, seed, "bicubic")
    torch.manual_seed(seed)
    expected, _ = older_view(Image.fromarray(noise), stage, "bicubic")
    assert (pixels.int() - expected.int()).abs().max() <= 2


@pytest.mark.parametrize("names", LISTS, ids="-".join)
def test_a_view_hangs_on_its_seed_and_on_nothing_before_it(names: tuple[str, ...]) -> None:
    stage = Stage(augmentation=names, resize=40, crop=32)
    first, erased = train_view(pixels_of(0), stage, 7, "bicubic")
    torch.rand(100)
    again, erased_again = train_view(pixels_of(0), stage, 7, "bicubic")
    assert torch.equal(first, again)
    assert torch.equal(erased, erased_again)
    others = [train_view(pixels_of(0), stage, seed, "bicubic")[0] for seed in range(20)]
    assert any(not torch.equal(first, other) for other in others)


def test_cutout_centres_are_uniform_over_the_crop() -> None:
    stage = Stage(augmentation=("resize", "cutout"), resize=8, crop=8)
    image = torch.from_numpy(np.array(photograph(0).resize((8, 8))))
    centres = torch.stack([train_view(image, stage, seed, "bilinear")[1][:2] + 1 for seed in range(4000)])
    counts = torch.bincount(centres[:, 0] * 8 + centres[:, 1], minlength=64)
    assert ((counts - 4000 / 64) ** 2 / (4000 / 64)).sum() < 63 + 4 * math.sqrt(2 * 63)  # chi-square, four sigma

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import functional

from aliprod.errors import Refused
from aliprod.inference.ten_crop import boxes, crops, mean_probabilities


@pytest.fixture(scope="module")
def golden(shared):
    return np.load(shared / "golden" / "ten_crop.npz", allow_pickle=False)


def test_boxes_are_the_golden_ones(golden):
    for (height, width, crop), expected in zip(golden["height_width_crop"], golden["top_left_flip"], strict=True):
        found = boxes(int(height), int(width), int(crop))
        np.testing.assert_array_equal(found, expected)


def test_crops_are_the_golden_bytes(golden):
    image = torch.from_numpy(golden["image"]).permute(2, 0, 1)
    np.testing.assert_array_equal(crops(image, 7).permute(0, 2, 3, 1), golden["image_crops_7"])


def test_softmaxes_are_averaged_not_logits(golden):
    logits = torch.from_numpy(golden["crop_logits"])
    np.testing.assert_allclose(mean_probabilities(logits), golden["mean_of_softmax"], rtol=0, atol=1e-12)
    assert abs(mean_probabilities(logits).numpy() - golden["softmax_of_mean_logits"]).max() > 1e-3


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(0, 6), st.integers(0, 6))
def test_crops_are_torchvisions_ten_crop(crop, more_rows, more_columns):
    image = torch.arange(2 * (crop + more_rows) * (crop + more_columns)).view(2, crop + more_rows, crop + more_columns)
    assert torch.equal(crops(image, crop), torch.stack(functional.ten_crop(image, [crop])))


def test_a_batch_is_cropped_like_its_images():
    batch = torch.arange(3 * 2 * 5 * 6, dtype=torch.uint8).view(3, 2, 5, 6)
    assert torch.equal(crops(batch, 4), torch.stack([crops(image, 4) for image in batch]))


def test_probabilities_are_float32_from_half_precision_and_float64_from_float64():
    logits = torch.randn(2, 10, 5)
    assert mean_probabilities(logits.bfloat16()).dtype == torch.float32
    assert mean_probabilities(logits.double()).dtype == torch.float64
    torch.testing.assert_close(mean_probabilities(logits).sum(1), torch.ones(2))


@pytest.mark.parametrize("size", [(5, 9), (9, 5)])
def test_image_smaller_than_the_crop_is_refused(size):
    with pytest.raises(Refused, match="ten crops of 6 pixels do not fit"):
        crops(torch.zeros(3, *size), 6)

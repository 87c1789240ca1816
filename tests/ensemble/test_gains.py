"""What settings gain, with an interval for images and seeds: against closed forms, and on nothing but noise."""

import numpy as np
import pytest
import torch
from scipy import stats

from aliprod.ensemble.compare import gains
from aliprod.inference.metrics import mean_class_error

ONE_CLASS = np.zeros(400, np.int64)


def test_a_gain_is_the_difference_of_mean_errors_over_classes_and_seeds() -> None:
    random = np.random.default_rng(0)
    truth, wrong = random.integers(5, size=90), random.random((3, 4, 90)) < [[[0.5]], [[0.3]], [[0.6]]]

    def error(missed: np.ndarray) -> float:
        return float(mean_class_error(torch.tensor(truth), torch.tensor(np.where(missed, -1, truth)), 5))

    expected = [np.mean([error(missed) for missed in seeds]) for seeds in wrong]
    found = gains(wrong.astype(float), truth, 0)
    assert [one.gain for one in found] == pytest.approx([expected[0] - other for other in expected[1:]])
    assert found[0].errors == pytest.approx([error(missed) for missed in wrong[1]])


@pytest.mark.parametrize("others", [1, 2, 3])
def test_where_seeds_are_all_alike_the_interval_is_that_of_the_images(others: int) -> None:
    random = np.random.default_rng(1)
    own, other = random.random(400) < 0.4, random.random(400) < 0.3
    wrong = np.stack([np.stack([one] * 3) for one in [own, *[other] * others]]).astype(float)
    found = gains(wrong, ONE_CLASS, 0)[0]
    difference = own.astype(float) - other
    half = stats.norm.ppf(1 - 0.025 / others) * difference.std() / np.sqrt(400)
    assert found.interval == pytest.approx((found.gain - half, found.gain + half), abs=0.12 * half)


@pytest.mark.parametrize("others", [1, 3])
def test_where_images_are_all_alike_the_interval_is_students_of_the_seeds(others: int) -> None:
    wrong = np.zeros((1 + others, 4, 400))
    wrong[0, :3], wrong[1, 0], wrong[2:, 1] = 1, 1, 1
    errors, found = wrong.mean(axis=2), gains(wrong, ONE_CLASS, 0)[0]
    residual = errors - errors.mean(axis=1, keepdims=True) - errors.mean(axis=0) + errors.mean()
    degrees = 3 * others
    half = stats.t.ppf(1 - 0.025 / others, degrees) * np.sqrt(2 * (residual**2).sum() / degrees / 4)
    assert found.gain == pytest.approx(0.5)
    assert found.interval == pytest.approx((0.5 - half, 0.5 + half), abs=0.06 * half)

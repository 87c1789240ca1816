import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from aliprod.ensemble.calibrate import calibration_error, temperature


@pytest.fixture(scope="module")
def golden(shared):
    return np.load(shared / "golden" / "temperature.npz", allow_pickle=False)


def test_temperature_and_what_it_changes_are_the_golden_ones(golden):
    logits, labels = torch.from_numpy(golden["logits"]), torch.from_numpy(golden["targets"])
    found = temperature(logits, labels)
    assert found.item() == pytest.approx(golden["temperature"].item(), rel=1e-6)
    assert cross_entropy(logits, labels).item() == pytest.approx(golden["nll_before"].item(), abs=1e-9)
    assert cross_entropy(logits / found, labels).item() == pytest.approx(golden["nll_after"].item(), abs=1e-9)
    before, after = calibration_error(logits.softmax(1), labels), calibration_error((logits / found).softmax(1), labels)
    assert before.item() == pytest.approx(golden["ece15_before"].item(), abs=1e-6)
    assert after.item() == pytest.approx(golden["ece15_after"].item(), abs=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.1, 10), st.integers(0, 2**31))
def test_logits_times_a_number_have_a_temperature_times_that_number(factor, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(200, 5, generator=generator).double()
    labels = torch.multinomial((logits / 2).softmax(1), 1, generator=generator)[:, 0]  # the true temperature is 2
    base = temperature(logits, labels).item()
    assert 1 < base < 4
    assert temperature(factor * logits, labels).item() == pytest.approx(factor * base, rel=1e-9)


def test_logarithms_of_probabilities_may_hold_zeros_and_unknown_labels_do_not_count():
    probabilities = torch.tensor([[0.9, 0.1, 0.0], [0.6, 0.4, 0.0], [0.2, 0.3, 0.5], [1.0, 0.0, 0.0]])
    labels = torch.tensor([0, 1, 2, -1])
    found = temperature(probabilities.log(), labels)
    assert found.isfinite()
    assert torch.equal(found, temperature(probabilities[:3].log(), labels[:3]))


def test_always_right_is_never_too_sure():
    logits = torch.eye(3)
    assert temperature(logits, torch.arange(3)).item() == pytest.approx(np.exp(-20))
    assert temperature(-logits, torch.arange(3)).item() == pytest.approx(np.exp(20))


def test_calibration_error_by_hand():
    # bins (0.5, 0.75] with confidences 0.75, 0.6 and one hit; (0.75, 1] with 1.0 and no hit
    probabilities = torch.tensor([[0.75, 0.25], [0.6, 0.4], [1.0, 0.0]]).double()
    labels = torch.tensor([0, 1, 1])
    assert calibration_error(probabilities, labels, bins=4).item() == pytest.approx((abs(1 - 1.35) + 1.0) / 3)


@settings(deadline=None)
@given(st.integers(1, 50), st.integers(1, 20), st.integers(0, 2**31))
def test_calibration_error_lies_between_the_overall_gap_and_one(images, bins, seed):
    generator = torch.Generator().manual_seed(seed)
    probabilities = (2 * torch.randn(images, 4, generator=generator)).softmax(1)
    labels = torch.randint(4, (images,), generator=generator)
    confidence = probabilities.double().amax(1)
    gap = ((probabilities.argmax(1) == labels).double() - confidence).mean().abs()
    error = calibration_error(probabilities, labels, bins)
    assert gap - 1e-9 <= error <= 1
    assert calibration_error(probabilities, labels, 1).item() == pytest.approx(gap.item())

"""Class-balanced loss against equation 6 of the paper, summed as a geometric series."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from aliprod.objectives.class_balanced import loss, weights

COUNTS = torch.tensor([1000, 40, 7, 1])


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.9999])
def test_weights_are_inverse_to_the_effective_number_of_images(beta: float) -> None:
    effective = torch.tensor([sum(beta**power for power in range(count)) for count in COUNTS.tolist()]).double()
    expected = 1 / effective
    torch.testing.assert_close(weights(COUNTS, beta), expected * 4 / expected.sum())


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=8).filter(any), st.floats(0, 0.99999))
def test_weights_fall_with_the_images_and_have_a_mean_of_one(counts: list[int], beta: float) -> None:
    found = weights(torch.tensor(counts), beta)
    present = torch.tensor(counts) > 0
    torch.testing.assert_close(found[present].mean(), torch.tensor(1.0).double())
    assert (found[~present] == 0).all()
    ordered = found[present][torch.tensor(counts)[present].argsort()]
    assert (ordered.diff() <= 1e-9).all()


def test_beta_zero_and_equal_counts_are_cross_entropy() -> None:
    logits, labels = torch.randn(5, 4).double(), torch.tensor([0, 1, 2, 3, 3])
    expected = functional.cross_entropy(logits, labels)
    torch.testing.assert_close(loss(logits, labels, COUNTS, beta=0.0), expected)
    torch.testing.assert_close(loss(logits, labels, torch.full((4,), 9), beta=0.999), expected)


def test_its_gradient_is_the_equations() -> None:
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 3, 3])
    assert torch.autograd.gradcheck(lambda z: loss(z, labels, COUNTS), logits)
    loss(logits, labels, COUNTS).backward()
    onehot = functional.one_hot(labels, 4)
    torch.testing.assert_close(logits.grad, weights(COUNTS, 0.9999)[labels, None] * (logits.softmax(1) - onehot) / 5)

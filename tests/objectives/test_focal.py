"""Focal loss: cross entropy, weighed by how little an image is known."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from aliprod.errors import Refused
from aliprod.objectives.focal import Objective, loss


@pytest.mark.parametrize(("dtype", "rtol", "atol"), [(torch.float64, 0, 1e-10), (torch.float32, 1e-4, 1e-6)])
@pytest.mark.parametrize("gamma", ["0", "0.5", "2", "5"])
def test_values_and_gradients_are_the_golden_ones(golden, gamma, dtype, rtol, atol):
    vectors = golden("focal")
    logits = vectors["logits"].to(dtype).requires_grad_()
    value = loss(logits, vectors["targets"], float(gamma))
    value.backward()
    torch.testing.assert_close(value, vectors[f"loss_g{gamma}"].to(dtype), rtol=rtol, atol=atol)
    torch.testing.assert_close(logits.grad, vectors[f"grad_g{gamma}"].to(dtype), rtol=rtol, atol=atol)


@given(st.integers(1, 6), st.integers(2, 40), st.floats(0, 6), st.integers(0, 2**32 - 1))
def test_each_image_is_cross_entropy_times_its_missed_probability_to_gamma(images, num_classes, gamma, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(images, num_classes, dtype=torch.float64, generator=generator)
    labels = torch.randint(num_classes, (images,), generator=generator)
    miss = 1 - logits.softmax(1)[torch.arange(images), labels]
    expected = miss**gamma * cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(loss(logits, labels, gamma, reduction="none"), expected, rtol=1e-6, atol=1e-12)


@given(st.integers(2, 40), st.floats(0, 100), st.integers(0, 2**32 - 1))
def test_gamma_0_is_cross_entropy_in_value_and_gradient(num_classes, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(4, num_classes, dtype=torch.float64, generator=generator)
    labels = torch.randint(num_classes, (4,), generator=generator)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    found, expected = loss(ours, labels, 0.0), cross_entropy(theirs, labels)
    found.backward()
    expected.backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(ours.grad, theirs.grad)


@given(st.floats(0, 5), st.floats(0.01, 5), st.integers(0, 2**32 - 1))
def test_a_larger_gamma_never_costs_more(gamma, more, seed):
    logits = 4 * torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    labels = torch.tensor([0, 1, 2, 5])
    assert (loss(logits, labels, gamma + more, "none") <= loss(logits, labels, gamma, "none")).all()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_gradcheck(gamma):
    logits = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss(z, torch.tensor([0, 3, 4]), gamma), logits)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_ten_thousand_from_half_precision_stay_finite_and_float32(dtype, gamma):
    logits = (1e4 * torch.tensor([[1, -1, 0], [-1, 1, 1]])).to(dtype).requires_grad_()
    each = loss(logits, torch.tensor([0, 0]), gamma, reduction="none")
    each.sum().backward()
    assert each.dtype == torch.float32
    assert each.isfinite().all()
    assert logits.grad.isfinite().all()


def test_the_objective_is_the_loss_at_its_gamma(context, model, batch):
    parts = Objective(context, gamma=5.0)(model, batch)
    torch.testing.assert_close(parts["focal"], loss(model(batch.images), batch.labels, 5.0))


def test_a_negative_gamma_is_refused(context):
    with pytest.raises(Refused, match="gamma"):
        Objective(context, gamma=-1.0)

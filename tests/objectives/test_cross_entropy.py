"""Cross entropy and its smoothing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aliprod.errors import Refused
from aliprod.objectives.cross_entropy import Objective, loss


@pytest.mark.parametrize(("dtype", "rtol", "atol"), [(torch.float64, 0, 1e-12), (torch.float32, 1e-4, 1e-6)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_values_and_gradients_are_the_golden_ones(golden, smoothing, dtype, rtol, atol):
    vectors = golden("cross_entropy")
    logits = vectors["logits"].to(dtype).requires_grad_()
    value = loss(logits, vectors["targets"], smoothing)
    value.backward()
    torch.testing.assert_close(value, vectors[f"loss_s{smoothing}"].to(dtype), rtol=rtol, atol=atol)
    torch.testing.assert_close(logits.grad, vectors[f"grad_s{smoothing}"].to(dtype), rtol=rtol, atol=atol)


@given(st.integers(1, 6), st.integers(2, 40), st.floats(0, 0.9), st.integers(0, 2**32 - 1))
def test_it_is_the_smoothed_target_against_the_log_softmax(images, num_classes, smoothing, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(images, num_classes, dtype=torch.float64, generator=generator)
    labels = torch.randint(num_classes, (images,), generator=generator)
    target = torch.full((images, num_classes), smoothing / num_classes, dtype=torch.float64)
    target[torch.arange(images), labels] += 1 - smoothing
    expected = -(target * (logits.exp() / logits.exp().sum(1, keepdim=True)).log()).sum(1)
    torch.testing.assert_close(loss(logits, labels, smoothing, reduction="none"), expected)
    torch.testing.assert_close(loss(logits, labels, smoothing), expected.mean())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gradcheck(smoothing):
    logits = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss(z, torch.tensor([0, 3, 4]), smoothing), logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_ten_thousand_from_half_precision_stay_finite_and_float32(dtype):
    logits = (1e4 * torch.tensor([[1, -1, 0], [-1, 1, 1]])).to(dtype).requires_grad_()
    each = loss(logits, torch.tensor([0, 0]), 0.1, reduction="none")
    each.sum().backward()
    assert each.dtype == torch.float32
    assert each.isfinite().all()
    assert logits.grad.isfinite().all()


def test_an_unknown_reduction_is_refused():
    with pytest.raises(Refused, match="none"):
        loss(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), reduction="sum")


def test_the_objective_smooths_as_its_option_says(context, model, batch):
    parts = Objective(context, smoothing=0.1)(model, batch)
    assert parts.keys() == {"cross_entropy"}
    torch.testing.assert_close(parts["cross_entropy"], loss(model(batch.images), batch.labels, 0.1))


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_a_smoothing_outside_0_to_1_is_refused(context, smoothing):
    with pytest.raises(Refused, match="smoothing"):
        Objective(context, smoothing=smoothing)

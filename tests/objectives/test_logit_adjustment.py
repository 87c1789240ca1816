"""Logit adjustment: the prior is added while training and left out, or subtracted, when predicting."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from aliprod.errors import Refused
from aliprod.objectives import Context
from aliprod.objectives.logit_adjustment import Objective, adjust, loss


@pytest.mark.parametrize(("dtype", "rtol", "atol"), [(torch.float64, 0, 1e-12), (torch.float32, 1e-4, 1e-6)])
@pytest.mark.parametrize("tau", [0, 1])
def test_values_and_gradients_are_the_golden_ones(golden, tau, dtype, rtol, atol):
    vectors = golden("logit_adjustment")
    logits = vectors["logits"].to(dtype).requires_grad_()
    value = loss(logits, vectors["targets"], vectors["counts"], tau)
    value.backward()
    torch.testing.assert_close(value, vectors[f"loss_tau{tau}"].to(dtype), rtol=rtol, atol=atol)
    torch.testing.assert_close(logits.grad, vectors[f"grad_tau{tau}"].to(dtype), rtol=rtol, atol=atol)
    chosen = adjust(logits, vectors["counts"], tau).argmax(1)
    assert torch.equal(chosen, vectors[f"posthoc_argmax_tau{tau}"])


@given(st.floats(0, 3), st.integers(1, 10**6), st.integers(0, 2**32 - 1))
def test_equally_frequent_classes_leave_cross_entropy(tau, count, seed):
    logits = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    labels, counts = torch.tensor([0, 1, 2, 5]), torch.full((6,), count)
    torch.testing.assert_close(loss(logits, labels, counts, tau), cross_entropy(logits, labels))


@given(st.integers(0, 2**32 - 1), st.floats(-2, 2))
def test_adjusting_by_minus_tau_is_what_the_loss_trains_on(seed, tau):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, 6, dtype=torch.float64, generator=generator)
    counts, labels = torch.randint(1, 9000, (6,), generator=generator), torch.tensor([0, 1, 2, 5])
    torch.testing.assert_close(loss(logits, labels, counts, tau), cross_entropy(adjust(logits, counts, -tau), labels))


def test_a_class_without_images_is_neither_forbidden_nor_always_predicted():
    logits, counts = torch.zeros(1, 3), torch.tensor([0, 1, 1])
    assert loss(logits, torch.tensor([0]), counts).isfinite()
    assert adjust(logits, counts).isfinite().all()


def test_gradcheck():
    logits = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    counts = torch.tensor([5, 1, 80, 9])
    assert torch.autograd.gradcheck(lambda z: loss(z, torch.tensor([0, 3, 2]), counts), logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_ten_thousand_from_half_precision_stay_finite_and_float32(dtype):
    logits = (1e4 * torch.tensor([[1, -1, 0], [-1, 1, 1]])).to(dtype).requires_grad_()
    each = loss(logits, torch.tensor([0, 0]), torch.tensor([1, 5, 8000]), reduction="none")
    each.sum().backward()
    assert each.dtype == torch.float32
    assert each.isfinite().all()
    assert logits.grad.isfinite().all()


def test_the_objective_uses_the_catalogues_counts_and_keeps_them_out_of_checkpoints(context, model, batch):
    objective = Objective(context, tau=0.5)
    expected = loss(model(batch.images), batch.labels, context.class_counts, 0.5)
    torch.testing.assert_close(objective(model, batch)["logit_adjustment"], expected)
    assert not objective.state_dict()


def test_it_is_refused_where_the_counts_are_unknown():
    with pytest.raises(Refused, match="counts"):
        Objective(Context(num_classes=5, num_features=8, crop=64, epochs=3))

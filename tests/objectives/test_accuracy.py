"""The accuracy loss against equation 1, 60-digit arithmetic and its own gradient."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import one_hot

from aliprod.objectives.accuracy import Objective, loss


@pytest.mark.parametrize(("dtype", "rtol", "atol"), [(torch.float64, 0, 1e-12), (torch.float32, 1e-4, 1e-6)])
def test_values_and_gradient_are_the_golden_ones(golden, dtype, rtol, atol):
    vectors = golden("accuracy_loss")
    logits = vectors["logits"].to(dtype).requires_grad_()
    value = loss(logits, vectors["targets"])
    value.backward()
    each = loss(logits, vectors["targets"], reduction="none")
    for found, expected in ((value, "loss"), (each, "per_sample"), (logits.grad, "grad")):
        torch.testing.assert_close(found, vectors[expected].to(dtype), rtol=rtol, atol=atol)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_a_nearly_certain_prediction_keeps_its_tiny_error(golden, dtype, rtol):
    vectors = golden("accuracy_loss")
    logits = vectors["extreme_logits"].to(dtype).requires_grad_()
    each = loss(logits, vectors["extreme_targets"], reduction="none")
    each.mean().backward()
    torch.testing.assert_close(each, vectors["extreme_per_sample"].to(dtype), rtol=rtol, atol=0)
    torch.testing.assert_close(logits.grad, vectors["extreme_grad"].to(dtype), rtol=0, atol=1e-7)


@given(st.floats(0, 39), st.sampled_from([2, 10, 1000, 50_030]))
def test_in_float32_the_error_of_a_sure_prediction_is_right_down_to_1e_17(margin, num_classes):
    ahead = torch.tensor(margin + math.log(num_classes - 1)).item()  # as float32 holds it
    logits = torch.zeros(1, num_classes).index_fill(1, torch.tensor([1]), ahead)
    error = 1 / (1 + math.exp(ahead) / (num_classes - 1))
    assert loss(logits, torch.tensor([1])).item() == pytest.approx(error, rel=1e-5, abs=0)


@given(st.integers(1, 8), st.integers(2, 50), st.integers(0, 2**32 - 1))
def test_it_is_the_reports_equation_written_out(images, num_classes, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 10 * torch.randn(images, num_classes, generator=generator)
    labels = torch.randint(num_classes, (images,), generator=generator)
    y, truth = logits.softmax(1), one_hot(labels, num_classes)
    hit, miss = (truth * y).sum(1), (truth * (1 - y)).sum(1)
    torch.testing.assert_close(loss(logits, labels), 1 - (hit / (hit + miss)).mean())


@given(st.integers(2, 30), st.floats(0.1, 30), st.integers(0, 2**32 - 1))
def test_the_gradient_sums_to_zero_over_classes(num_classes, scale, seed):
    logits = scale * torch.randn(4, num_classes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    logits.requires_grad_()
    loss(logits, torch.zeros(4, dtype=torch.int64)).backward()
    torch.testing.assert_close(logits.grad.sum(1), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-15)


def test_two_equal_logits_and_no_other_class_give_exactly_one_half():
    logits = torch.tensor([[3.0, 3.0, -torch.inf, -torch.inf]], requires_grad=True)
    value = loss(logits, torch.tensor([1]))
    value.backward()
    assert value.item() == 0.5
    assert logits.grad.tolist() == [[0.25, -0.25, 0, 0]]


def test_a_single_class_cannot_be_missed():
    logits = torch.tensor([[2.0]], requires_grad=True)
    value = loss(logits, torch.tensor([0]))
    value.backward()
    assert value.item() == 0
    assert logits.grad.item() == 0


def test_gradcheck():
    logits = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss(z, torch.tensor([0, 3, 4])), logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_ten_thousand_from_half_precision_stay_finite_and_float32(dtype):
    logits = (1e4 * torch.tensor([[1, -1, 0], [-1, 1, 1], [-1, -1, -1]])).to(dtype).requires_grad_()
    each = loss(logits, torch.tensor([0, 0, 0]), reduction="none")
    each.sum().backward()
    assert each.dtype == torch.float32
    torch.testing.assert_close(each, torch.tensor([0, 1, 2 / 3]))
    assert logits.grad.isfinite().all()


def test_the_objective_is_the_loss_of_the_models_logits(context, model, batch):
    parts = Objective(context)(model, batch)
    assert parts.keys() == {"accuracy"}
    torch.testing.assert_close(parts["accuracy"], loss(model(batch.images), batch.labels))

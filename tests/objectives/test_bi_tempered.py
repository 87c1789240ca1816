"""The bi-tempered loss: a tempered softmax that sums to one, and a gradient that is the paper's formula."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from aliprod.errors import Refused
from aliprod.objectives.bi_tempered import Objective, loss, probabilities


@pytest.mark.parametrize(("dtype", "rtol", "atol"), [(torch.float64, 0, 1e-9), (torch.float32, 1e-4, 1e-5)])
@pytest.mark.parametrize(("solution", "iterations"), [("iter5", 5), ("converged", None)])
@pytest.mark.parametrize("case", range(5))
def test_values_and_gradients_are_the_golden_ones(golden, case, solution, iterations, dtype, rtol, atol):
    vectors = golden("bi_tempered")
    t1, t2, smoothing = vectors[f"c{case}_t1_t2_smoothing"].tolist()
    logits = vectors["logits"].to(dtype).requires_grad_()
    each = loss(logits, vectors["targets"], t1, t2, smoothing, iterations, reduction="none")
    each.sum().backward()
    found = {"probabilities": probabilities(logits.detach(), t2, iterations), "loss": each, "grad_sum": logits.grad}
    for name, value in found.items():
        expected = vectors[f"c{case}_{solution}_{name}"].to(dtype)
        torch.testing.assert_close(value, expected, rtol=rtol, atol=atol)


@settings(max_examples=50)
@given(
    st.sampled_from([2, 10, 1000, 50_030]),
    st.sampled_from([1.0, 1.001, 1.05, 1.2, 2.0, 4.0]),
    st.floats(0, 100),
    st.integers(0, 2**32 - 1),
)
def test_probabilities_sum_to_one_at_any_number_of_classes_and_temper(num_classes, t2, scale, seed):
    logits = scale * torch.randn(2, num_classes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    one = torch.ones(2, dtype=torch.float64)
    torch.testing.assert_close(probabilities(logits, t2).sum(1), one, rtol=0, atol=1e-9)
    torch.testing.assert_close(probabilities(logits.float(), t2).sum(1), one.float(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("t2", [1.0, 1.001, 1.05, 1.2, 2.0, 4.0, 8.0])
@pytest.mark.parametrize("scale", [0.0, 1e-5, 1.0, 10.0, 1e4])
def test_in_float32_50030_classes_sum_to_one_within_3e_6(t2, scale):
    logits = scale * torch.randn(4, 50_030, generator=torch.Generator().manual_seed(0))
    sums = probabilities(logits, t2).double().sum(1)  # added in float64: the error is the probabilities'
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=3e-6)


def test_the_published_five_iterations_are_a_tenth_off_where_ours_are_not():
    logits = 8 * torch.randn(4, 50_030, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    published, ours = ((probabilities(logits, 1.2, steps).sum(1) - 1).abs().max().item() for steps in (5, None))
    assert published > 0.1
    assert ours < 1e-12


@pytest.mark.parametrize(("num_classes", "dtype", "most"), [
    (50_030, torch.float32, 8.0), (1000, torch.float32, 12.6), (2, torch.float32, 126.0), (50_030, torch.float64, 65.4),
])  # fmt: skip
def test_the_largest_t2_that_a_dtype_holds_is_right_and_a_larger_one_refused(num_classes, dtype, most):
    logits = torch.randn(2, num_classes, dtype=dtype, generator=torch.Generator().manual_seed(0))
    sums = probabilities(logits, most).double().sum(1)
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=3e-6)
    with pytest.raises(Refused, match=f"At most {most};"):
        probabilities(logits, most + 0.2)


@given(st.floats(1.01, 4), st.floats(-1e4, 1e4), st.integers(0, 2**32 - 1))
def test_a_shift_of_all_logits_changes_nothing(t2, shift, seed):
    logits = 4 * torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(probabilities(logits + shift, t2), probabilities(logits, t2), rtol=1e-9, atol=1e-11)


@given(st.floats(0.0, 0.4), st.integers(0, 2**32 - 1))
def test_both_tempers_1_are_cross_entropy_with_smoothing_over_the_other_classes(smoothing, seed):
    logits = 4 * torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    labels = torch.tensor([0, 4, 2])
    entropy = -sum(n * y * math.log(y) for n, y in ((1, 1 - smoothing), (4, smoothing / 4)) if y)
    # torch spreads over all 5 classes: the share of each of the other 4 is smoothing/4 here and s/5 there
    expected = cross_entropy(logits, labels, label_smoothing=smoothing * 5 / 4) - entropy
    torch.testing.assert_close(loss(logits, labels, 1.0, 1.0, smoothing), expected)


@given(st.floats(0.1, 0.95), st.floats(1, 4), st.integers(0, 2**32 - 1))
def test_one_outlier_costs_no_more_than_the_bound(t1, t2, seed):
    logits = 1e4 * torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    each = loss(logits, torch.tensor([0, 1, 2, 5]), t1, t2, reduction="none")
    # at p_t = 0 and all of p elsewhere: 1/(1-t1) for the true class, and the two powers cancel
    assert (each >= -1e-12).all()
    assert (each <= 1 / (1 - t1) + 1e-9).all()


@pytest.mark.parametrize("tempers", [(0.8, 1.2), (0.2, 4.0), (1.0, 1.0), (0.7, 1.0), (1.0, 1.5)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gradcheck(tempers, smoothing):
    logits = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss(z, torch.tensor([0, 3, 4]), *tempers, smoothing), logits)


@pytest.mark.parametrize("tempers", [(0.8, 1.2), (1.0, 1.0), (0.7, 1.0), (1.0, 1.5)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_ten_thousand_from_half_precision_stay_finite_and_float32(dtype, tempers):
    logits = (1e4 * torch.tensor([[1, -1, 0], [-1, 1, 1]])).to(dtype).requires_grad_()
    each = loss(logits, torch.tensor([0, 0]), *tempers, 0.1, reduction="none")
    each.sum().backward()
    assert each.dtype == torch.float32
    assert each.isfinite().all()
    assert logits.grad.isfinite().all()


def test_the_objective_iterates_to_the_limit(context, model, batch):
    parts = Objective(context, t1=0.7, t2=1.3, smoothing=0.1)(model, batch)
    torch.testing.assert_close(parts["bi_tempered"], loss(model(batch.images), batch.labels, 0.7, 1.3, 0.1))


def test_tempers_on_the_wrong_side_of_1_are_refused(context):
    with pytest.raises(Refused, match="enclose 1"):
        Objective(context, t1=1.2, t2=0.8)
    with pytest.raises(Refused, match="t2"):
        probabilities(torch.zeros(1, 2), 0.8)
    with pytest.raises(Refused, match="t1"):
        loss(torch.zeros(1, 2), torch.tensor([0]), 1.2, 1.5)


def test_a_t2_that_float32_cannot_hold_for_so_many_classes_is_refused_before_any_step(context):
    with pytest.raises(Refused, match=r"t2 = 8\.2 is too large for 50,030 classes in torch\.float32\.\s+At most 8\.0"):
        Objective(replace(context, num_classes=50_030), t2=8.2)
    Objective(replace(context, num_classes=50_030), t2=8.0)
    Objective(context, t2=8.2)

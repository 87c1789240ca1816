"""Hierarchical losses: what a level's probability is, and what each loss makes of it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from aliprod.errors import Refused
from aliprod.objectives import Context
from aliprod.objectives.hierarchy import Objective, level_probabilities, marginal_loss, win_loss, win_weights


@pytest.mark.parametrize(("dtype", "rtol", "atol"), [(torch.float64, 0, 1e-10), (torch.float32, 1e-4, 1e-6)])
def test_values_and_gradients_are_the_golden_ones(golden, dtype, rtol, atol):
    vectors = golden("hierarchy")
    labels, ancestor, weights = vectors["targets"], vectors["ancestor"], vectors["win_weights"]
    found = level_probabilities(vectors["logits"].to(dtype), labels, ancestor)
    torch.testing.assert_close(found, vectors["level_probability"].to(dtype), rtol=rtol, atol=atol)
    found = win_loss(vectors["logits"].to(dtype), labels, ancestor, weights, reduction="none")
    torch.testing.assert_close(1 - found, vectors["win"].to(dtype), rtol=rtol, atol=atol)
    for name, loss, argument in (
        ("marginal", marginal_loss, vectors["beta"].item()),
        ("win", win_loss, weights),
    ):
        logits = vectors["logits"].clone().to(dtype).requires_grad_()
        value = loss(logits, labels, ancestor, argument)
        value.backward()
        torch.testing.assert_close(value, vectors[f"loss_{name}"].to(dtype), rtol=rtol, atol=atol)
        torch.testing.assert_close(logits.grad, vectors[f"grad_{name}"].to(dtype), rtol=rtol, atol=atol)


def test_the_weights_are_the_golden_ones(golden):
    torch.testing.assert_close(win_weights(3), golden("hierarchy")["win_weights"], rtol=0, atol=0)


@given(st.integers(1, 30))
def test_the_weights_sum_to_one(levels):
    assert win_weights(levels).sum().item() == 1


@given(st.integers(2, 20), st.integers(0, 2**32 - 1))
def test_a_finer_level_is_never_more_probable(num_classes, seed):
    generator = torch.Generator().manual_seed(seed)
    leaves = torch.arange(num_classes)
    ancestor = torch.stack([leaves // 8, leaves // 4, leaves // 2, leaves])
    logits = 3 * torch.randn(5, num_classes, dtype=torch.float64, generator=generator)
    labels = torch.randint(num_classes, (5,), generator=generator)
    found = level_probabilities(logits, labels, ancestor)
    assert (found.diff(dim=0) <= 1e-12).all()
    torch.testing.assert_close(found[-1], logits.softmax(1)[torch.arange(5), labels])


def test_without_upper_levels_it_is_cross_entropy():
    logits, labels = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 5])
    torch.testing.assert_close(marginal_loss(logits, labels, torch.arange(6)[None], 0.5), cross_entropy(logits, labels))


@given(st.integers(2, 20), st.integers(0, 2**32 - 1))
def test_beta_0_is_cross_entropy_whatever_the_tree(num_classes, seed):
    generator = torch.Generator().manual_seed(seed)
    ancestor = torch.stack([torch.randint(4, (num_classes,), generator=generator), torch.arange(num_classes)])
    logits = 3 * torch.randn(5, num_classes, dtype=torch.float64, generator=generator)
    labels = torch.randint(num_classes, (5,), generator=generator)
    torch.testing.assert_close(marginal_loss(logits, labels, ancestor, 0.0), cross_entropy(logits, labels))


def test_a_level_that_all_classes_share_costs_nothing_and_pulls_nowhere():
    rooted = torch.stack([torch.zeros(6, dtype=torch.int64), torch.arange(6)])
    logits = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.tensor([0, 1, 2, 5])
    extra = marginal_loss(logits, labels, rooted, 100.0) - marginal_loss(logits, labels, rooted, 0.0)
    extra.backward()
    assert extra.item() == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(logits.grad, torch.zeros_like(logits), rtol=0, atol=1e-12)


@pytest.mark.parametrize("loss", [lambda *a: marginal_loss(*a, 0.5), lambda *a: win_loss(*a, win_weights(2))])
def test_gradcheck(loss, context):
    logits = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss(z, torch.tensor([0, 3, 4]), context.ancestor), logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", [lambda *a: marginal_loss(*a, 0.5), lambda *a: win_loss(*a, win_weights(2))])
def test_logits_of_ten_thousand_from_half_precision_stay_finite_and_float32(loss, dtype, context):
    logits = (1e4 * torch.tensor([[1, -1, 0, 1, -1], [-1, 1, 1, -1, -1]])).to(dtype).requires_grad_()
    value = loss(logits, torch.tensor([1, 4]), context.ancestor)
    value.backward()
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert logits.grad.isfinite().all()


def test_the_objective_is_the_loss_over_the_catalogues_tree(context, model, batch):
    logits, labels = model(batch.images), batch.labels
    marginal = Objective(context, beta=0.2)(model, batch)["hierarchy"]
    torch.testing.assert_close(marginal, marginal_loss(logits, labels, context.ancestor, 0.2))
    win = Objective(context, kind="win")(model, batch)["hierarchy"]
    torch.testing.assert_close(win, win_loss(logits, labels, context.ancestor, torch.tensor([0.5, 0.5])))


def test_what_does_not_fit_is_refused_with_the_cure(context):
    with pytest.raises(Refused, match=r"product_tree\.json"):
        Objective(Context(num_classes=5, num_features=8, crop=64, epochs=3))

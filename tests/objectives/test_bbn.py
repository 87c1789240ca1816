"""BBN: the weight that moves between its branches, their mixed logits, and the reversed sampler."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from aliprod.objectives.bbn import alpha, logits, loss, reversed_probability


@pytest.mark.parametrize(("dtype", "rtol", "atol"), [(torch.float64, 0, 1e-12), (torch.float32, 1e-4, 1e-6)])
def test_every_epoch_is_the_golden_one(golden, dtype, rtol, atol):
    vectors = golden("bbn")
    inputs = [vectors[name].to(dtype) for name in ("feature_uniform", "feature_reversed", "weight", "bias")]
    epochs = int(vectors["total_epochs"])
    for epoch in range(1, epochs + 1):
        share = alpha(epoch, epochs)
        mixed = logits(*inputs, share)
        value = loss(mixed, vectors["targets_uniform"], vectors["targets_reversed"], share)
        assert share == pytest.approx(vectors["alpha"][epoch - 1].item(), abs=1e-12)
        torch.testing.assert_close(mixed, vectors["logits"][epoch - 1].to(dtype), rtol=rtol, atol=atol)
        torch.testing.assert_close(value, vectors["loss"][epoch - 1].to(dtype), rtol=rtol, atol=atol)
    found = logits(*inputs, 0.5)
    torch.testing.assert_close(found, vectors["inference_logits"].to(dtype), rtol=rtol, atol=atol)


def test_the_reversed_sampler_is_the_golden_one(golden):
    vectors = golden("bbn")
    found = reversed_probability(vectors["counts"])
    torch.testing.assert_close(found, vectors["reversed_probability"], rtol=0, atol=1e-12)


@given(st.lists(st.integers(1, 9000), min_size=1, max_size=30))
def test_each_class_is_drawn_in_inverse_proportion_to_its_images(counts):
    found = reversed_probability(torch.tensor(counts))
    assert found.sum().item() == pytest.approx(1)
    torch.testing.assert_close(found * torch.tensor(counts), (found[0] * counts[0]).expand(len(counts)))


def test_a_class_without_images_is_never_drawn():
    assert reversed_probability(torch.tensor([0, 2, 2])).tolist() == [0, 0.5, 0.5]


@given(st.integers(1, 300))
def test_training_starts_on_the_conventional_branch_and_moves_towards_the_other(epochs):
    shares = [alpha(epoch, epochs) for epoch in range(1, epochs + 1)]
    assert shares[0] == 1
    assert all(0 < later < earlier for earlier, later in pairwise(shares))


def test_gradcheck():
    z = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss(z, torch.tensor([0, 3, 4]), torch.tensor([1, 3, 2]), 0.3), z)


def test_gradcheck_of_the_mixed_logits():
    generator = torch.Generator().manual_seed(0)
    shapes = (3, 4), (3, 4), (5, 8), (5,)
    inputs = [torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]
    assert torch.autograd.gradcheck(lambda *x: logits(*x, 0.3), inputs)


@given(st.integers(1, 300))
def test_the_share_is_the_papers_parabola_and_stays_between_0_and_1(epochs):
    for epoch in range(1, epochs + 1):
        assert 0 < alpha(epoch, epochs) <= 1
        assert (1 - alpha(epoch, epochs)) * epochs**2 == pytest.approx((epoch - 1) ** 2)


@pytest.mark.parametrize(("share", "idle"), [(1.0, 1), (0.0, 0)])
def test_at_either_end_the_other_branch_neither_counts_nor_learns(share, idle):
    generator = torch.Generator().manual_seed(0)
    branches = [torch.randn(3, 4, generator=generator).requires_grad_() for _ in range(2)]
    weight, labels = torch.randn(5, 8, generator=generator), [torch.tensor([0, 3, 4]), torch.tensor([1, 3, 2])]
    z = logits(*branches, weight, torch.zeros(5), share)
    value = loss(z, *labels, share)
    value.backward()
    torch.testing.assert_close(value, cross_entropy(z, labels[1 - idle]))
    assert not branches[idle].grad.any()
    assert branches[1 - idle].grad.any()


def test_one_value_per_image_is_the_weighted_pair_of_cross_entropies():
    z = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    conventional, reversed_ = torch.tensor([0, 3, 4]), torch.tensor([1, 3, 2])
    expected = 0.3 * cross_entropy(z, conventional, reduction="none") + 0.7 * cross_entropy(
        z, reversed_, reduction="none"
    )
    torch.testing.assert_close(loss(z, conventional, reversed_, 0.3, reduction="none"), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_ten_thousand_from_half_precision_stay_finite_and_float32(dtype):
    z = (1e4 * torch.tensor([[1, -1, 0], [-1, 1, 1]])).to(dtype).requires_grad_()
    value = loss(z, torch.tensor([0, 0]), torch.tensor([1, 1]), 0.5)
    value.backward()
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert z.grad.isfinite().all()

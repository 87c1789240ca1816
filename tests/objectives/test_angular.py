"""A-softmax: the margin's angle function, its blend, and no NaN where acos would make one."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from aliprod.objectives.angular import blend, logits


@pytest.mark.parametrize(("dtype", "rtol", "atol"), [(torch.float64, 0, 1e-6), (torch.float32, 1e-4, 1e-5)])
@pytest.mark.parametrize("iteration", [1, 100, 4000])
@pytest.mark.parametrize("margin", [1, 2, 3, 4])
def test_logits_and_loss_are_the_golden_ones(golden, margin, iteration, dtype, rtol, atol):
    vectors, case = golden("a_softmax"), f"m{margin}_it{iteration}"
    share = blend(iteration)
    assert share == pytest.approx(vectors[f"lambda_it{iteration}"].item())
    found = logits(vectors["features"].to(dtype), vectors["weight"].to(dtype), vectors["targets"], margin, share)
    torch.testing.assert_close(found, vectors[f"logits_{case}"].to(dtype), rtol=rtol, atol=atol)
    expected = vectors[f"loss_{case}"].to(dtype)
    torch.testing.assert_close(cross_entropy(found, vectors["targets"]), expected, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("iteration", [1, 100, 4000])
def test_gradients_are_the_golden_ones_and_finite_at_the_angles_0_and_pi(golden, iteration):
    vectors = golden("a_softmax")
    features = vectors["features"].requires_grad_()
    cross_entropy(
        logits(features, vectors["weight"], vectors["targets"], 4, blend(iteration)), vectors["targets"]
    ).backward()
    expected = vectors[f"grad_features_m4_it{iteration}"]
    undefined = expected.isnan().any(1)
    assert undefined.tolist() == [True, True] + [False] * 6
    assert features.grad.isfinite().all()
    torch.testing.assert_close(features.grad[~undefined], expected[~undefined], rtol=0, atol=1e-6)


@given(st.integers(1, 5), st.floats(0.01, 3.13))
def test_without_blending_the_target_is_the_papers_phi(margin, angle):
    features = torch.tensor([[2 * math.cos(angle), 2 * math.sin(angle)]], dtype=torch.float64)
    found = logits(features, torch.eye(2, dtype=torch.float64), torch.tensor([0]), margin, 0.0)
    k = math.floor(angle * margin / math.pi)
    assert found[0, 0].item() == pytest.approx(2 * ((-1) ** k * math.cos(margin * angle) - 2 * k), abs=1e-9)
    assert found[0, 1].item() == pytest.approx(2 * math.sin(angle))


@given(st.integers(1, 5), st.floats(0.1, 100))
def test_phi_falls_with_the_angle(margin, share):
    angles = torch.linspace(0, math.pi, 100, dtype=torch.float64)
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    found = logits(features, torch.eye(2, dtype=torch.float64), torch.zeros(100, dtype=torch.int64), margin, share)
    assert (found[:, 0].diff() < 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("margin", [1, 2, 3, 4, 5])
def test_at_the_angles_0_and_pi_values_are_phi_and_every_gradient_is_finite(margin, dtype):
    features = torch.tensor([[3.0, 0, 0], [-3.0, 0, 0]], dtype=dtype, requires_grad=True)
    weight = (2 * torch.eye(3, dtype=dtype)).requires_grad_()
    found = logits(features, weight, torch.tensor([0, 0]), margin, 0.0)
    cross_entropy(found, torch.tensor([0, 0])).backward()
    assert found[:, 0].tolist() == [3, 3 * (1 - 2 * margin)]  # phi(0) = 1, phi(pi) = 1 - 2m
    assert features.grad.isfinite().all()
    assert weight.grad.isfinite().all()


def test_features_of_length_0_have_a_finite_gradient():
    features = torch.zeros(2, 3, requires_grad=True)
    cross_entropy(logits(features, torch.eye(3), torch.tensor([0, 2]), 4, 5.0), torch.tensor([0, 2])).backward()
    assert features.grad.isfinite().all()


def test_gradcheck():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(4, 3, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(3, 5, dtype=torch.float64, generator=generator).requires_grad_()
    labels = torch.tensor([0, 4, 1, 1])
    assert torch.autograd.gradcheck(lambda x, w: logits(x, w, labels, 4, 5.0), (features, weight))


def test_under_autocast_the_logits_are_those_of_float32():
    generator = torch.Generator().manual_seed(0)
    features, weight = torch.randn(4, 3, generator=generator), torch.randn(3, 5, generator=generator)
    expected = logits(features, weight, torch.tensor([0, 4, 1, 1]), 4, 5.0)
    with torch.autocast("cpu", torch.bfloat16):
        found = logits(features, weight, torch.tensor([0, 4, 1, 1]), 4, 5.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)

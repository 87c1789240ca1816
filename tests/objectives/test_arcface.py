"""ArcFace: the margin is an angle, and no gradient is infinite where an arc cosine's would be."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity

from aliprod.errors import Refused
from aliprod.models.classifier import Classifier
from aliprod.objectives import build
from aliprod.objectives.arcface import logits


def plane(angle: float) -> torch.Tensor:
    return 3 * torch.tensor([[math.cos(angle), math.sin(angle)]], dtype=torch.float64)


@given(st.floats(0.001, math.pi - 0.001), st.floats(0, 1.5), st.floats(1, 64))
def test_the_true_class_is_turned_away_by_the_margin(angle, margin, scale):
    found = logits(plane(angle), torch.eye(2, dtype=torch.float64), torch.tensor([0]), margin, scale)[0]
    turned = math.cos(angle + margin) if angle + margin < math.pi else math.cos(angle) - margin * math.sin(margin)
    assert found.tolist() == pytest.approx([scale * turned, scale * math.sin(angle)], abs=1e-4)


@given(st.floats(0.05, 1.5))
def test_the_target_falls_with_the_angle(margin):
    angles = torch.linspace(0.01, math.pi - 0.01, 200, dtype=torch.float64)
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    found = logits(features, torch.eye(2, dtype=torch.float64), torch.zeros(200, dtype=torch.int64), margin)
    assert (found[:, 0].diff() < 0).all()


@pytest.mark.parametrize("angle", [0.0, math.pi])
def test_every_gradient_is_finite_at_the_angles_0_and_pi(angle):
    features = plane(angle).float().requires_grad_()
    logits(features, torch.eye(2), torch.tensor([0])).sum().backward()
    assert features.grad.isfinite().all()


def test_at_inference_logits_are_scaled_cosines(context):
    torch.manual_seed(0)
    needs = build("arcface", {}, context).needs
    model = Classifier("test_resnet", 7, needs).eval()
    features = torch.randn(3, model.num_features, 2, 2)
    cosines = cosine_similarity(features.mean(dim=(2, 3))[:, None], model.classifier.weight[None], dim=2)
    torch.testing.assert_close(model.classify(features), needs.scale * cosines)
    none = logits(features.mean(dim=(2, 3)), model.classifier.weight.T, torch.zeros(3, dtype=torch.int64), margin=0.0)
    torch.testing.assert_close(model.classify(features), none, rtol=1e-4, atol=1e-4)


def test_a_margin_that_is_no_angle_is_refused(context):
    with pytest.raises(Refused, match="margin = 3"):
        build("arcface", {"margin": 3.0}, context)


def test_of_several_centres_the_nearest_counts_in_training_and_at_inference(context):
    torch.manual_seed(0)
    needs = build("arcface", {"centres": 3}, context).needs
    model = Classifier("test_resnet", 7, needs).eval()
    assert model.num_classes == 7
    features, labels = torch.randn(5, model.num_features, 2, 2), torch.tensor([0, 1, 2, 6, 6])
    cosines = cosine_similarity(features.mean(dim=(2, 3))[:, None], model.classifier.weight[None], dim=2)
    nearest = torch.stack([cosines[:, 3 * k : 3 * k + 3].max(dim=1).values for k in range(7)], dim=1)
    torch.testing.assert_close(model.classify(features), 30 * nearest)
    found = logits(features.mean(dim=(2, 3)), model.classifier.weight.T, labels, 0.2, 30.0, 3)
    margined = nearest.scatter(1, labels[:, None], (nearest.gather(1, labels[:, None]).acos() + 0.2).cos())
    torch.testing.assert_close(found, 30 * margined, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("centres", [0, 17])
def test_centres_that_no_class_has_are_refused(context, centres):
    with pytest.raises(Refused, match=f"centres = {centres}"):
        build("arcface", {"centres": centres}, context)

"""Half precision: every loss is finite, with a finite gradient, and what float64 makes of the same numbers."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy as torchs_cross_entropy

from aliprod.objectives import (
    accuracy,
    angular,
    arcface,
    bbn,
    bi_tempered,
    build,
    class_balanced,
    cross_entropy,
    dcl,
    distillation,
    focal,
    hierarchy,
    lio,
    logit_adjustment,
)
from aliprod.recipe import options

OBJECTIVES = options.names()
HALVES = [torch.bfloat16, torch.float16]
LABELS, OTHERS = torch.tensor([0, 39, 7, 7, 20, 1]), torch.tensor([39, 39, 0, 8, 2, 1])
COUNTS = torch.arange(1, 41) ** 2
ANCESTOR = torch.stack([torch.arange(40) // 20, torch.arange(40) // 5, torch.arange(40)])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


LOGITS = normal(6, 40)
TEACHER = 5 * normal(6, 40, seed=1)
OF_LOGITS: dict[str, Callable[[Tensor], Tensor]] = {
    "accuracy": lambda z: accuracy.loss(z, LABELS, "none"),
    "cross_entropy": lambda z: cross_entropy.loss(z, LABELS, 0.0, "none"),
    "cross_entropy smoothed": lambda z: cross_entropy.loss(z, LABELS, 0.1, "none"),
    "focal 0": lambda z: focal.loss(z, LABELS, 0.0, "none"),
    "focal 0.5": lambda z: focal.loss(z, LABELS, 0.5, "none"),
    "focal 2": lambda z: focal.loss(z, LABELS, 2.0, "none"),
    "class_balanced": lambda z: class_balanced.loss(z, LABELS, COUNTS, 0.999, "none"),
    "logit_adjustment": lambda z: logit_adjustment.loss(z, LABELS, COUNTS, 1.0, "none"),
    "bi_tempered": lambda z: bi_tempered.loss(z, LABELS, 0.8, 1.2, reduction="none"),
    "bi_tempered smoothed": lambda z: bi_tempered.loss(z, LABELS, 0.2, 4.0, 0.1, reduction="none"),
    "hierarchy marginal": lambda z: hierarchy.marginal_loss(z, LABELS, ANCESTOR, 0.5, "none"),
    "hierarchy win": lambda z: hierarchy.win_loss(z, LABELS, ANCESTOR, hierarchy.win_weights(3), "none"),
    "distillation": lambda z: distillation.loss(z, TEACHER, LABELS, 2.0, 0.7, "none"),
    "bbn": lambda z: bbn.loss(z, LABELS, OTHERS, 0.3, "none"),
    "dcl": lambda z: dcl.losses(z, z[:, :2], z.tanh(), LABELS, OTHERS % 2, torch.zeros(6, 40))["class"],
}
CASES = pytest.mark.parametrize("name", OF_LOGITS)


def answers(loss: Callable[[Tensor], Tensor], inputs: Tensor, autocast: bool = False) -> tuple[Tensor, Tensor]:
    """Values, and the gradient of their sum."""
    leaf = inputs.detach().clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        values = loss(leaf)
    values.sum().backward()
    return values.detach(), leaf.grad


def assert_as_float64(loss: Callable[[Tensor], Tensor], inputs: Tensor, rtol: float, atol: float) -> None:
    """Values within rtol and atol; gradients, which are handed on in the inputs' dtype, within its rounding too."""
    values, gradient = answers(loss, inputs)
    expected, expected_gradient = answers(loss, inputs.double())
    assert values.dtype == torch.float32
    assert gradient.dtype == inputs.dtype
    assert values.isfinite().all()
    assert gradient.isfinite().all()
    torch.testing.assert_close(values.double(), expected, rtol=rtol, atol=atol)
    rounding = torch.finfo(inputs.dtype).eps
    size = expected_gradient.abs().max().item()
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=rounding + rtol, atol=rounding * size + atol)


@CASES
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4])
def test_half_precision_logits_up_to_ten_thousand_cost_what_they_cost_in_float64(name, dtype, scale):
    logits = (scale * LOGITS).clamp(-1e4, 1e4).to(dtype)
    spacing = torch.finfo(torch.float32).eps * scale  # of a logit with a prior added to it
    assert_as_float64(OF_LOGITS[name], logits, rtol=1e-5, atol=1e-6 + spacing)


@CASES
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("right", [True, False])
def test_logits_that_are_all_at_both_ends_cost_what_they_cost_in_float64(name, dtype, right):
    logits = torch.full((6, 40), -1e4)
    logits[torch.arange(6), LABELS if right else (LABELS + 1) % 40] = 1e4
    assert_as_float64(OF_LOGITS[name], logits.to(dtype), rtol=1e-5, atol=1e-6)


@CASES
def test_autocast_changes_no_loss(name):
    logits = (100 * LOGITS).to(torch.bfloat16)
    expected, expected_gradient = answers(OF_LOGITS[name], logits)
    found, gradient = answers(OF_LOGITS[name], logits, autocast=True)
    assert torch.equal(found, expected)
    assert torch.equal(gradient, expected_gradient)


# Losses of features


@dataclass(frozen=True)
class OfFeatures:
    """A loss of features; its heads' weights are float32, or float64 for float64 features."""

    loss: Callable[[Tensor, Callable[..., Tensor]], Tensor]
    shape: tuple[int, ...]

    def __call__(self, features: Tensor) -> Tensor:
        dtype = torch.promote_types(features.dtype, torch.float32)
        return self.loss(features, lambda *shape: normal(*shape, seed=sum(shape)).float().to(dtype))


def angular_loss(features: Tensor, weight: Callable[..., Tensor]) -> Tensor:
    logits = angular.logits(features, weight(8, 40), LABELS, 4, 5.0)
    return torchs_cross_entropy(logits, LABELS, reduction="none")


def arcface_loss(features: Tensor, weight: Callable[..., Tensor]) -> Tensor:
    return torchs_cross_entropy(arcface.logits(features, weight(8, 40), LABELS), LABELS, reduction="none")


def bbn_logits_loss(features: Tensor, weight: Callable[..., Tensor]) -> Tensor:
    logits = bbn.logits(features, features.flip(1), weight(40, 16), weight(40), 0.3)
    return bbn.loss(logits, LABELS, OTHERS, 0.3, "none")


def dcl_loss(features: Tensor, weight: Callable[..., Tensor]) -> Tensor:
    found = dcl.heads(features, weight(40, 8), weight(2, 8), weight(1, 8, 1, 1), weight(1))
    targets = dcl.location_targets(torch.arange(49).view(7, 7)).expand(6, -1)
    return torch.stack(list(dcl.losses(*found, LABELS, OTHERS % 2, targets).values()))


def lio_loss(features: Tensor, weight: Callable[..., Tensor]) -> Tensor:
    heads = {
        "w_class": weight(40, 8), "w_structure": weight(4, 8, 1, 1), "b_structure": weight(4),
        "w_mask": weight(1, 8, 1, 1), "b_mask": weight(1), "w_polar": weight(2, 8), "b_polar": weight(2),
    }  # fmt: skip
    parts = lio.losses(features, LABELS[:2], heads)
    return torch.stack([parts["class"], parts["context"], parts["extent"]])


OF_FEATURES = {
    "angular": OfFeatures(angular_loss, (6, 8)),
    "arcface": OfFeatures(arcface_loss, (6, 8)),
    "bbn": OfFeatures(bbn_logits_loss, (6, 8)),
    "dcl": OfFeatures(dcl_loss, (6, 8, 7, 7)),
    "lio": OfFeatures(lio_loss, (2, 3, 8, 7, 7)),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_loss_of_an_objective_is_a_case_here(name):
    module = import_module(f"aliprod.objectives.{name}")
    cases = {case.split()[0] for case in (*OF_LOGITS, *OF_FEATURES)}
    assert name in cases or not any(hasattr(module, loss) for loss in ("loss", "losses", "logits"))


@pytest.mark.parametrize("name", OF_FEATURES)
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.bfloat16, 1.0), (torch.bfloat16, 1e4), (torch.float16, 1.0), (torch.float16, 10.0)],
)
def test_half_precision_features_cost_what_they_cost_in_float64(name, dtype, scale):
    """Of float16 only up to about 30: LIO's loss grows with the fourth power of the features, and its gradient is
    handed on in float16, whose largest number is 65,504 (the scaler skips such a step)."""
    case = OF_FEATURES[name]
    features = (scale * normal(*case.shape)).clamp(-1e4, 1e4).to(dtype)
    # products are sums of 8 terms in float32: 1e-6 of the features
    assert_as_float64(case, features, rtol=1e-4, atol=2e-6 * scale)


@pytest.mark.parametrize(("name", "shape"), [("dcl", (6, 8, 14, 14)), ("lio", (2, 3, 8, 14, 14))])
@pytest.mark.parametrize("dtype", HALVES)
def test_maps_of_448_pixels_are_averaged_in_their_own_dtype_and_cost_the_same_within_its_rounding(name, shape, dtype):
    features, rounding = normal(*shape).to(dtype), torch.finfo(dtype).eps
    assert_as_float64(OF_FEATURES[name], features, rtol=rounding, atol=rounding / 10)


@pytest.mark.parametrize("name", [name for name in OF_FEATURES if name != "lio"])
def test_float16_features_of_ten_thousand_are_finite_with_finite_gradients(name):
    case = OF_FEATURES[name]
    features = (1e4 * normal(*case.shape)).clamp(-1e4, 1e4).half()
    values, gradient = answers(case, features)
    assert values.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", OF_FEATURES)
def test_autocast_changes_no_loss_of_features(name):
    features = normal(*OF_FEATURES[name].shape).to(torch.bfloat16)
    expected, expected_gradient = answers(OF_FEATURES[name], features)
    found, gradient = answers(OF_FEATURES[name], features, autocast=True)
    assert torch.equal(found, expected)
    assert torch.equal(gradient, expected_gradient)


# Objectives


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("dtype", HALVES)
def test_an_objective_under_autocast_is_finite_where_the_model_says_ten_thousand(
    name, dtype, context, model_for, batch
):
    objective = build(name, {"dcl": {"parts": 2}, "lio": {"positives": 1}}.get(name, {}), context)
    model = model_for(options.needs(name, {}))
    with torch.no_grad():
        model.classifier.weight *= 1e4 / model(batch.images).abs().max()
    batch = replace(batch, second=batch, teacher=torch.eye(5)[batch.labels])
    with torch.autocast("cpu", dtype):
        parts = objective(model, batch)
    sum(parts.values()).backward()
    assert all(part.dtype == torch.float32 and part.isfinite() for part in parts.values())
    assert all(p.grad.isfinite().all() for p in (*model.parameters(), *objective.parameters()))

"""What holds of every loss of logits, whatever its equation."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from aliprod.objectives import (
    accuracy,
    bbn,
    bi_tempered,
    class_balanced,
    cross_entropy,
    distillation,
    focal,
    hierarchy,
    logit_adjustment,
)

Loss = Callable[[Tensor, Tensor], Tensor]  # logits (B, K), labels (B,) -> (B,)


def of_equal_classes(classes: int) -> dict[str, Loss]:
    """Every loss, with settings that treat the classes alike."""
    one_level, counts = torch.arange(classes)[None], torch.full((classes,), 7)
    teacher = torch.zeros(classes, dtype=torch.float64)
    return {
        "accuracy": lambda z, y: accuracy.loss(z, y, "none"),
        "bbn": lambda z, y: bbn.loss(z, y, y, 0.3, "none"),
        "bi_tempered": lambda z, y: bi_tempered.loss(z, y, 0.8, 1.2, reduction="none"),
        "class_balanced": lambda z, y: class_balanced.loss(z, y, counts, 0.99, "none"),
        "cross_entropy": lambda z, y: cross_entropy.loss(z, y, 0.1, "none"),
        "distillation": lambda z, y: distillation.loss(z, teacher.expand_as(z), y, 2.0, 0.7, "none"),
        "focal": lambda z, y: focal.loss(z, y, 2.0, "none"),
        "hierarchy marginal": lambda z, y: hierarchy.marginal_loss(z, y, one_level, 0.5, "none"),
        "hierarchy win": lambda z, y: hierarchy.win_loss(z, y, one_level, hierarchy.win_weights(1), "none"),
        "logit_adjustment": lambda z, y: logit_adjustment.loss(z, y, counts, 1.0, "none"),
    }


NAMES = pytest.mark.parametrize("name", of_equal_classes(1))
SEEDS = st.integers(0, 2**32 - 1)


def batch(classes: int, seed: int, images: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(images, classes, dtype=torch.float64, generator=generator)
    return logits, torch.randint(classes, (images,), generator=generator)


def gradient(loss: Loss, logits: Tensor, labels: Tensor) -> Tensor:
    leaf = logits.clone().requires_grad_()
    loss(leaf, labels).sum().backward()
    return leaf.grad


@NAMES
@given(st.integers(2, 30), st.floats(-50, 50), SEEDS)
def test_a_shift_of_all_logits_costs_nothing_so_the_gradient_sums_to_zero(name, classes, shift, seed):
    loss, (logits, labels) = of_equal_classes(classes)[name], batch(classes, seed)
    torch.testing.assert_close(loss(logits + shift, labels), loss(logits, labels), rtol=1e-9, atol=1e-9)
    sums = gradient(loss, logits, labels).sum(1)
    torch.testing.assert_close(sums, torch.zeros_like(sums), rtol=0, atol=1e-12)


@NAMES
@given(st.integers(2, 30), SEEDS)
def test_no_class_is_dearer_for_its_place(name, classes, seed):
    loss, (logits, labels) = of_equal_classes(classes)[name], batch(classes, seed)
    order = torch.randperm(classes, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(loss(logits[:, order], order.argsort()[labels]), loss(logits, labels))


@NAMES
@given(st.integers(2, 30), SEEDS)
def test_of_equal_logits_every_wrong_class_has_the_same_gradient_and_the_right_one_the_rest(name, classes, seed):
    _, labels = batch(classes, seed)
    found = gradient(of_equal_classes(classes)[name], torch.zeros(4, classes, dtype=torch.float64), labels)
    right = found.gather(1, labels[:, None])
    wrong = -right / (classes - 1)
    torch.testing.assert_close(found, wrong.expand_as(found).scatter(1, labels[:, None], right))
    assert (right < 0).all()


@NAMES
def test_a_single_class_costs_nothing_and_pulls_nowhere(name):
    logits, labels = torch.tensor([[3.0], [-2.0]], dtype=torch.float64), torch.tensor([0, 0])
    loss = of_equal_classes(1)[name]
    assert loss(logits, labels).tolist() == [0, 0]
    assert gradient(loss, logits, labels).tolist() == [[0], [0]]


@NAMES
@given(st.integers(2, 30), SEEDS)
def test_no_loss_is_negative_and_a_better_logit_of_the_right_class_costs_less(name, classes, seed):
    loss, (logits, labels) = of_equal_classes(classes)[name], batch(classes, seed)
    if name in ("cross_entropy", "distillation"):  # a soft target is overshot by a sure prediction
        logits = logits.scatter(1, labels[:, None], logits.amin(1, keepdim=True) - 1)
    better = logits.scatter_add(1, labels[:, None], torch.full((4, 1), 0.1, dtype=torch.float64))
    assert (loss(logits, labels) >= 0).all()
    assert (loss(better, labels) < loss(logits, labels)).all()


@given(st.integers(2, 30), SEEDS)
def test_bounded_losses_stay_in_their_bounds(classes, seed):
    logits, labels = batch(classes, seed)
    tree = torch.stack([torch.arange(classes) // 3, torch.arange(classes)])
    bounded = {
        1.0: [accuracy.loss(100 * logits, labels, "none"),
              hierarchy.win_loss(100 * logits, labels, tree, hierarchy.win_weights(2), "none")],
        5.0: [bi_tempered.loss(100 * logits, labels, 0.8, 1.2, reduction="none")],
    }  # fmt: skip
    for bound, losses in bounded.items():
        for values in losses:
            assert (values >= 0).all()
            assert (values <= bound + 1e-12).all()


@given(st.integers(2, 30), SEEDS, st.floats(0, 1))
def test_cross_entropy_of_equal_logits_is_the_log_of_the_number_of_classes(classes, seed, smoothing):
    _, labels = batch(classes, seed)
    found = cross_entropy.loss(torch.full((4, classes), 3.0, dtype=torch.float64), labels, smoothing)
    assert found.item() == pytest.approx(math.log(classes))

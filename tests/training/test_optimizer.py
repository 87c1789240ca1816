"""optimizer: the golden schedule, and steps written out."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from aliprod.catalogue.catalogue import Catalogue
from aliprod.errors import Refused
from aliprod.recipe import LearningRate, Machine, OptimizerRecipe, Stage
from aliprod.training.learner import Learner, Place
from aliprod.training.loop import train
from aliprod.training.optimizer import Optimizer, cosine_lr_at, layer_scales, lr_at, one_cycle_lr_at

CPU = Place(torch.device("cpu"))
NETWORK = "test_resnet"


def test_the_learning_rate_of_every_step_is_the_golden_one(shared: Path) -> None:
    with np.load(shared / "golden" / "schedule.npz", allow_pickle=False) as golden:
        names = ("base_lr", "steps_per_epoch", "warmup_epochs", "milestones", "gamma")
        base_lr, steps_per_epoch, warmup_epochs, milestones, gamma = (golden[name].tolist() for name in names)
        expected = golden["lr_per_step"]
    rates = [lr_at(step, base_lr, steps_per_epoch, warmup_epochs, milestones, gamma) for step in range(len(expected))]
    np.testing.assert_allclose(rates, expected, rtol=0, atol=1e-12)


@given(st.integers(0, 200), st.integers(1, 50), st.floats(0, 3), st.floats(1e-4, 1))
def test_a_warm_up_of_any_part_of_an_epoch_never_passes_the_base_rate(
    step: int, steps: int, warmup: float, base_lr: float
) -> None:
    rate = lr_at(step, base_lr, steps, warmup, [], 0.1)
    assert rate == pytest.approx(min(base_lr, base_lr * (step + 1) / max(1e-9, warmup * steps)))


@given(st.integers(1, 50), st.integers(1, 30), st.floats(0, 3), st.floats(1e-4, 1))
def test_a_cosine_starts_at_the_base_rate_falls_and_would_end_at_zero(
    steps: int, epochs: int, warmup: float, base_lr: float
) -> None:
    warmup = min(warmup, epochs / 2)
    rates = [cosine_lr_at(step, base_lr, steps, warmup, epochs) for step in range(steps * epochs)]
    after = rates[math.ceil(warmup * steps) :]
    assert all(0 < rate <= base_lr * (1 + 1e-12) for rate in rates)
    assert all(later < earlier for earlier, later in pairwise(after))
    assert rates[: math.ceil(warmup * steps)] == sorted(rates[: math.ceil(warmup * steps)])
    assert cosine_lr_at(steps * epochs, base_lr, steps, warmup, epochs) == pytest.approx(0, abs=1e-12)


@given(st.integers(2, 50), st.integers(1, 30), st.floats(0.1, 0.9), st.floats(1e-4, 1))
def test_one_cycle_is_torchs(steps: int, epochs: int, part: float, base_lr: float) -> None:
    total, parameter = steps * epochs, torch.nn.Parameter(torch.zeros(()))
    warmup = max(2, min(total - 1, round(part * total)))
    if total < 3:
        return
    kernel = torch.optim.SGD([parameter], lr=1.0)
    its = torch.optim.lr_scheduler.OneCycleLR(kernel, base_lr, total_steps=total, pct_start=warmup / total)
    for step in range(total):
        assert one_cycle_lr_at(step, base_lr, total, warmup) == pytest.approx(its.get_last_lr()[0], rel=1e-6)
        kernel.step()
        if step < total - 1:
            its.step()


@pytest.mark.parametrize("schedule", ["steps", "cosine", "one_cycle"])
def test_a_warm_up_in_steps_is_that_in_epochs(packages: Catalogue, schedule: str) -> None:
    learner, _ = built(packages)
    by_epochs, by_steps = (
        Optimizer(learner, Stage(lr=LearningRate(schedule=schedule, **warmup), epochs=10), steps_per_epoch=4)
        for warmup in ({"warmup_epochs": 3.0}, {"warmup_steps": 12})
    )
    rates = [by_epochs.lr_of("heads", step) for step in range(40)]
    assert rates == pytest.approx([by_steps.lr_of("heads", step) for step in range(40)])
    assert rates[0] < rates[1] < rates[11]


def built(
    packages: Catalogue, precision: str = "float32", network: str = NETWORK, **recipe: Any
) -> tuple[Learner, Optimizer]:
    rates = LearningRate(backbone=0.1, heads=0.5)
    stage = Stage(lr=rates, optimizer=OptimizerRecipe(**recipe), crop=32, precision=precision)
    learner = Learner(stage, network, packages, CPU)
    return learner, Optimizer(learner, stage, steps_per_epoch=4)


def move(optimizer: Optimizer, loss: Tensor, step: int) -> None:
    optimizer.backward(loss)
    optimizer.update(step)


def copied(learner: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in learner.named_parameters()}


def rate_of(name: str) -> float:
    return 0.5 if "classifier" in name else 0.1


def test_only_weights_decay_each_at_the_rate_of_its_part(packages: Catalogue) -> None:
    learner, optimizer = built(packages, weight_decay=0.01, clip_norm=None)
    before = copied(learner)
    move(optimizer, sum(p.sum() for p in learner.parameters()) * 0.0, 0)
    kinds = set()
    for name, parameter in learner.named_parameters():
        decays = parameter.ndim > 1  # convolutions and the classifier; norm scales and biases have one axis
        factor = 1 - rate_of(name) * 0.01 if decays else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor, rtol=1e-6, atol=1e-9)
        kinds.add((decays, rate_of(name)))
    assert kinds == {(True, 0.1), (False, 0.1), (True, 0.5)}


def test_two_steps_are_sgd_with_momentum_written_out(packages: Catalogue) -> None:
    learner, optimizer = built(packages, momentum=0.9, weight_decay=0.0, clip_norm=None)
    before = copied(learner)
    for step, gradient in enumerate((1.0, -2.0)):
        move(optimizer, sum(p.sum() for p in learner.parameters()) * gradient, step)
    moved = 1.0 + (0.9 * 1.0 - 2.0)  # m <- 0.9 m + g, w <- w - lr m
    for name, parameter in learner.named_parameters():
        expected = before[name] - rate_of(name) * moved
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("clip_norm", [5.0, 0.1, None])
def test_a_large_gradient_keeps_its_direction_and_is_cut_to_the_norm(
    packages: Catalogue, clip_norm: float | None
) -> None:
    learner, optimizer = built(packages, weight_decay=0.0, clip_norm=clip_norm)
    before = copied(learner)
    count = sum(p.numel() for p in learner.parameters())
    move(optimizer, sum(p.sum() for p in learner.parameters()) * 3.0, 0)
    norm = 3.0 * math.sqrt(count)
    each = 3.0 * (1.0 if clip_norm is None else min(1.0, clip_norm / norm))
    for name, parameter in learner.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] - rate_of(name) * each, rtol=1e-4, atol=1e-6)


def test_sam_descends_by_the_gradient_of_weights_moved_uphill(packages: Catalogue) -> None:
    """Of |w|^2: e = r 2w / |2w|, and the gradient there is 2 (w + e) (Foret et al. 2021, equations 2 and 3)."""
    learner, optimizer = built(packages, momentum=0.0, weight_decay=0.0, clip_norm=None)
    before = copied(learner)
    norm = torch.cat([weight.flatten() for weight in before.values()]).norm()
    optimizer.backward(sum(p.square().sum() for p in learner.parameters()))
    kept = optimizer.climb(0.5)
    for name, parameter in learner.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] * (1 + 0.5 / norm))
    optimizer.backward(sum(p.square().sum() for p in learner.parameters()))
    optimizer.descend(kept)
    assert all(torch.equal(parameter, before[name]) for name, parameter in learner.named_parameters())
    optimizer.update(0)
    for name, parameter in learner.named_parameters():
        gradient = 2 * before[name] * (1 + 0.5 / norm)
        torch.testing.assert_close(parameter.detach(), before[name] - rate_of(name) * gradient, rtol=1e-4, atol=1e-6)


def test_sam_leaves_the_weights_where_a_gradient_is_not_finite(packages: Catalogue) -> None:
    learner, optimizer = built(packages)
    before = copied(learner)
    optimizer.backward(sum(p.sum() for p in learner.parameters()) * math.inf)
    optimizer.climb(0.5)
    assert all(torch.equal(parameter, before[name]) for name, parameter in learner.named_parameters())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("good_steps", [0, 2])
def test_a_bad_step_and_all_after_it_leave_every_bit_of_the_weights(
    packages: Catalogue, bad: float, good_steps: int
) -> None:
    learner, optimizer = built(packages)
    for step in range(good_steps):
        move(optimizer, sum(p.square().sum() for p in learner.parameters()), step)
    assert optimizer.first_bad_step() is None
    before = copied(learner)
    move(optimizer, sum(p.sum() for p in learner.parameters()) + bad, good_steps)  # its gradient alone is finite
    move(optimizer, sum(p.square().sum() for p in learner.parameters()), good_steps + 1)
    for name, parameter in learner.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert optimizer.first_bad_step() == good_steps


def test_a_gradient_that_is_not_finite_under_a_finite_loss_is_noticed(packages: Catalogue) -> None:
    learner, optimizer = built(packages)
    before = copied(learner)
    weight = learner.model.classifier.weight
    move(optimizer, (weight * 0.0).abs().sqrt().sum(), 7)  # the derivative of a root at zero
    assert torch.equal(weight, before["model.classifier.weight"])
    assert optimizer.first_bad_step() == 7


def test_momentum_comes_back_to_the_bit(packages: Catalogue) -> None:
    (learner, optimizer), (other, its_optimizer) = built(packages), built(packages)
    move(optimizer, sum(p.square().sum() for p in learner.parameters()), 0)
    other.load_state_dict(learner.state_dict())
    its_optimizer.load_state(optimizer.state())
    for trained, moved in ((learner, optimizer), (other, its_optimizer)):
        move(moved, sum(p.square().sum() for p in trained.parameters()), 1)
    for mine, its in zip(learner.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, its)


def test_a_float16_job_lives_through_an_overflow_and_its_scale_comes_back(packages: Catalogue) -> None:
    (learner, optimizer), (_, other) = built(packages, "float16"), built(packages, "float16")
    before = copied(learner)
    move(optimizer, learner.model.classifier.weight.sum() * 3e38, 0)  # overflows with the first scale of 65,536
    assert all(torch.equal(p, before[name]) for name, p in learner.named_parameters())
    assert optimizer.first_bad_step() is None
    move(optimizer, learner.model.classifier.weight.sum(), 1)
    assert not torch.equal(learner.model.classifier.weight, before["model.classifier.weight"])
    other.load_state(optimizer.state())
    assert {name: value.tolist() for name, value in other.state().items() if "scaler" in name} == {
        "scaler.scale": 32768.0,
        "scaler._growth_tracker": 1,
    }


def test_a_float16_job_whose_losses_stay_bad_is_noticed(packages: Catalogue) -> None:
    learner, optimizer = built(packages, "float16")
    before = copied(learner)
    for step in range(17):
        assert optimizer.first_bad_step() is None
        move(optimizer, learner.model.classifier.weight.sum() * math.nan, step)
    assert optimizer.first_bad_step() == 16
    assert all(torch.equal(p, before[name]) for name, p in learner.named_parameters())


# By the field's names: the steps of torch and timm themselves


OTHERS = {
    "adamw": (torch.optim.AdamW, {"betas": (0.8, 0.99)}),
    "lamb": (timm.optim.Lamb, {"max_grad_norm": None}),
    "lion": (timm.optim.Lion, {"betas": (0.9, 0.95)}),
    "muon": (timm.optim.Muon, {"momentum": 0.9}),
}


def loss_of(learner: nn.Module, step: int) -> Tensor:
    return sum((p * (step + 1)).cos().sum() for p in learner.parameters())


@pytest.mark.parametrize("name", OTHERS)
def test_three_steps_are_those_of_the_optimizer_itself(packages: Catalogue, name: str) -> None:
    kind, options = OTHERS[name]
    said = {key: value for key, value in options.items() if key in ("betas", "momentum")}
    (learner, optimizer), (other, _) = (built(packages, name=name, clip_norm=None, **said) for _ in range(2))
    heads = set(other.head_parameters())
    groups = [
        {"params": [p], "lr": 0.5 if p in heads else 0.1, "weight_decay": 0.05 if p.ndim > 1 else 0.0}
        | ({"use_fallback": p in heads} if name == "muon" else {})
        for p in other.parameters()
    ]
    theirs = kind(groups, **options)
    for step in range(3):
        move(optimizer, loss_of(learner, step), step)
        theirs.zero_grad()
        loss_of(other, step).backward()
        theirs.step()
    for (weight, mine), its in zip(learner.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6, msg=weight)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_any_optimizer_comes_back_to_the_bit_and_never_takes_a_bad_step(
    packages: Catalogue, name: str, precision: str
) -> None:
    (learner, optimizer), (other, its_optimizer) = (built(packages, precision, name=name) for _ in range(2))
    for step in range(2):
        move(optimizer, loss_of(learner, step), step)
    other.load_state_dict(learner.state_dict())
    its_optimizer.load_state({key: value.clone() for key, value in optimizer.state().items()})
    for trained, moved in ((learner, optimizer), (other, its_optimizer)):
        move(moved, loss_of(trained, 2), 2)
    assert all(torch.equal(mine, its) for mine, its in zip(learner.parameters(), other.parameters(), strict=True))
    mine, its = optimizer.state(), its_optimizer.state()
    assert mine.keys() == its.keys()
    assert all(torch.equal(mine[key], its[key]) for key in mine)
    before = copied(learner)
    move(optimizer, loss_of(learner, 3) * math.nan, 3)
    assert all(torch.equal(p, before[name]) for name, p in learner.named_parameters())
    assert optimizer.first_bad_step() == (3 if precision == "float32" else None)


@pytest.mark.parametrize("network", ["test_vit", "test_vit2", "test_resnet", "test_convnext", "test_efficientnet"])
def test_rates_fall_from_layer_to_layer_as_timm_groups_them(packages: Catalogue, network: str) -> None:
    model = timm.create_model(network, num_classes=4)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    spared = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    groups = param_groups_layer_decay(model, 0.05, spared, layer_decay=0.6)
    theirs = {names[id(p)]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    learner, optimizer = built(packages, network=network, name="adamw", layer_decay=0.6)
    own = {id(parameter): name for name, parameter in learner.named_parameters()}
    head = model.pretrained_cfg["classifier"]
    for group in optimizer.groups:
        for parameter in group["params"]:
            name = own[id(parameter)].removeprefix("model.backbone.").replace("model.classifier", head)
            scale, decay = theirs.pop(name)
            assert group["lr_scale"] == pytest.approx(scale)
            assert group["weight_decay"] == decay
    assert list(theirs) == [f"{head}.bias"]
    move(optimizer, loss_of(learner, 0), 0)
    assert {group["lr"] for group in optimizer.groups if group["part"] == "heads"} == {0.5}
    assert min(group["lr"] for group in optimizer.groups) < 0.1 * 0.6


def test_a_network_without_layers_that_timm_knows_is_refused_layer_decay() -> None:
    with pytest.raises(Refused, match="Sequential names no layers: leave layer_decay out"):
        layer_scales(nn.Sequential(nn.Linear(2, 2)), 0.5)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_transformer_resumed_in_mid_epoch_ends_with_the_same_bytes(
    packages: Catalogue, stage: Stage, name: str, tmp_path: Path
) -> None:
    """With shares, averaged weights, clipping and layer decay."""
    said = {"epochs": 2, "shares": 2, "optimizer": {"name": name, "layer_decay": 0.7}}
    stage = Stage.model_validate(stage.model_dump() | said | {"lr": {"backbone": 1e-3, "heads": 1e-3}})
    events = train(stage, "test_vit", packages, machine=Machine(save_every_steps=3))
    found = [next(events)]
    assert found[0].state.step == 3
    found[0].snapshot()(tmp_path)
    found += events
    *_, last = train(stage, "test_vit", packages, resume=tmp_path)
    assert last.last is not None
    assert found[-1].last is not None
    assert last.last.tensors.keys() == found[-1].last.tensors.keys()
    assert all(torch.equal(mine, found[-1].last.tensors[key]) for key, mine in last.last.tensors.items())

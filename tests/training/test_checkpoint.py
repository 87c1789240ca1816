"""checkpoint: the newest undamaged state is found, and the state is all of it."""

import logging
import random
from pathlib import Path

import pytest
import torch

from aliprod.catalogue.catalogue import Catalogue
from aliprod.recipe import Stage
from aliprod.store import commit
from aliprod.training import checkpoint
from aliprod.training.candidates import Candidate
from aliprod.training.checkpoint import TrainingState
from aliprod.training.ema import Average
from aliprod.training.learner import Learner, Place
from aliprod.training.optimizer import Optimizer


def move(optimizer: Optimizer, loss: torch.Tensor, step: int) -> None:
    optimizer.backward(loss)
    optimizer.update(step)


def committed(folder: Path, *steps: int) -> None:
    for step in steps:
        commit.write(
            checkpoint.place_of(folder, TrainingState(step=step)),
            lambda staging: (staging / "a").write_bytes(b"abc") and None,
        )


def test_the_newest_is_the_one_of_most_steps(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "none") is None
    committed(tmp_path, 9, 100, 10)
    assert checkpoint.newest(tmp_path) == tmp_path / "step-0000000100"


def test_a_damaged_one_is_set_aside_with_one_warning_and_the_one_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    committed(tmp_path, 3, 6, 9)
    (tmp_path / "step-0000000009" / "a").write_bytes(b"abd")
    (tmp_path / "step-0000000006" / "manifest.json").unlink()
    for _ in range(2):
        assert checkpoint.newest(tmp_path) == tmp_path / "step-0000000003"
    assert sorted(path.name for path in tmp_path.glob("*.bad")) == ["step-0000000006.bad", "step-0000000009.bad"]
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2
    assert "step-0000000009 is damaged (a): set aside" in warnings[0]


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    committed(tmp_path, 3, 6, 9, 12)
    checkpoint.prune(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-0000000009", "step-0000000012"]


def test_model_momentum_average_best_weights_and_counters_come_back(packages: Catalogue, tmp_path: Path) -> None:
    stage = Stage(crop=32, ema=0.9, objective={"name": "lio"}, batch_size=8)
    learner, optimizer, average = parts(stage, packages)
    move(optimizer, sum(p.square().sum() for p in learner.parameters()), 0)
    average.update(learner.model, 1)
    best = Candidate(1, "averaged", 0.25, {"weight": torch.tensor([1.5])})
    state = TrainingState(2, 9, 1, {"class": 1.2345678806304932}, best)
    taken = checkpoint.snapshot(state, learner, optimizer, average)
    taken(tmp_path)

    other, its_optimizer, its_average = parts(stage, packages)
    assert checkpoint.restore(tmp_path, other, its_optimizer, its_average) == state
    assert equal(other.state_dict(), learner.state_dict())
    assert equal(its_optimizer.state(), optimizer.state())
    assert equal(its_average.state(other.model), average.state(learner.model))
    assert not equal(average.state(learner.model), dict(learner.model.state_dict()))


def parts(stage: Stage, packages: Catalogue) -> tuple[Learner, Optimizer, Average]:
    learner = Learner(stage, "test_resnet", packages, Place(torch.device("cpu")))
    return learner, Optimizer(learner, stage, 4), Average(learner.model, 0.9)


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_snapshot_keeps_its_moment_while_training_goes_on(packages: Catalogue, tmp_path: Path) -> None:
    learner, optimizer, average = parts(Stage(crop=32, ema=0.9, batch_size=8), packages)
    move(optimizer, sum(p.square().sum() for p in learner.parameters()), 0)
    before, momentum = ({k: t.clone() for k, t in s.items()} for s in (learner.state_dict(), optimizer.state()))
    taken = checkpoint.snapshot(TrainingState(step=1), learner, optimizer, average)
    move(optimizer, sum(p.square().sum() for p in learner.parameters()), 1)
    average.update(learner.model, 2)
    taken(tmp_path)
    other, its_optimizer, its_average = parts(Stage(crop=32, ema=0.9, batch_size=8), packages)
    checkpoint.restore(tmp_path, other, its_optimizer, its_average)
    assert equal(other.state_dict(), before)
    assert equal(its_optimizer.state(), momentum)
    assert not equal(its_average.state(other.model), average.state(learner.model))


def damaged(content: bytes, draw: random.Random) -> bytes:
    """A flipped bit, a lost end, or a piece of it twice."""
    at, end = (draw.randrange(len(content)) for _ in range(2))
    match draw.choice(["flip", "truncate", "splice"]):
        case "flip":
            return content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]
        case "truncate":
            return content[:at]
        case _:
            return content[:at] + content[end : end + draw.randint(1, 4096)] + content[at:]


def test_of_200_damaged_newest_checkpoints_none_is_used(
    packages: Catalogue, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    learner, optimizer, average = parts(Stage(crop=32, ema=0.9, batch_size=8), packages)
    for step in (3, 6):
        taken = checkpoint.snapshot(TrainingState(step=step), learner, optimizer, average)
        checkpoint.write(checkpoint.place_of(tmp_path, TrainingState(step=step)), taken, {"key": "0123"})
    older, newest = (tmp_path / f"step-000000000{step}" for step in (3, 6))
    files = {path.name: path.read_bytes() for path in newest.iterdir()}
    assert checkpoint.newest(tmp_path) == newest
    for seed in range(200):
        draw = random.Random(seed)
        name = draw.choice(sorted(files))
        (newest / name).write_bytes(damaged(files[name], draw))
        assert checkpoint.newest(tmp_path) == older, (seed, name)
        (tmp_path / f"{newest.name}.bad").rename(newest)
        (newest / name).write_bytes(files[name])
    assert len(caplog.records) == 200
    assert checkpoint.newest(tmp_path) == newest

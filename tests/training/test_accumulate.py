"""Steps in parts and over ranks: the same gradient, however it is put together."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from job_process import Death, ended, seen_by, start, train
from safetensors.torch import load_file
from test_job import NETWORK, result, work_in

from aliprod.catalogue.catalogue import Catalogue
from aliprod.data.loader import TrainBatch
from aliprod.recipe import Stage
from aliprod.training.training_job import TrainingJob

WITHOUT_BATCH_NORM = "test_efficientnet_gn"


@given(groups=st.integers(1, 12), group=st.integers(1, 4), count=st.integers(1, 9))
def test_the_parts_of_a_batch_are_whole_groups_and_together_the_batch(groups: int, group: int, count: int) -> None:
    rows = torch.arange(groups * group)
    batch = TrainBatch(rows[:, None] + torch.zeros(1, 3), rows // group, rows, epoch=1, step=7, seed=5)
    parts = batch.split(count, group)
    for name in ("images", "labels", "rows"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
    assert 1 <= len(parts) <= count
    assert all(len(part.rows) % group == 0 for part in parts)
    assert len({part.seed for part in parts}) == len(parts)
    assert {(part.epoch, part.step) for part in parts} == {(1, 7)}


def of_ranks(work: TrainingJob, catalogue: Path, ranks: int) -> dict[str, torch.Tensor]:
    processes = [start(work, catalogue, rank=rank, world_size=ranks) for rank in range(ranks)]
    assert [ended(process) for process in processes] == [0] * ranks
    return load_file(work.folder / "weights" / "model.safetensors")


def with_settings(stage: Stage, **settings: object) -> Stage:
    return Stage.model_validate(stage.model_dump() | {"ema": None, "epochs": 1, **settings})


@pytest.fixture(scope="module")
def at_once(packages: Catalogue, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    stage = Stage(resize=40, crop=32, batch_size=16, precision="float32")
    return of_ranks(work_in(tmp_path_factory.mktemp("whole"), stage, WITHOUT_BATCH_NORM), packages.root, 1)


@pytest.mark.parametrize(("ranks", "accumulate"), [(1, 4), (1, 3), (2, 2)])
def test_a_step_in_parts_is_the_step_at_once_up_to_rounding(
    packages: Catalogue, at_once: dict[str, torch.Tensor], tmp_path: Path, ranks: int, accumulate: int
) -> None:
    stage = Stage(resize=40, crop=32, batch_size=16, precision="float32", accumulate=accumulate)
    weights = of_ranks(work_in(tmp_path, stage, WITHOUT_BATCH_NORM), packages.root, ranks)
    for name, tensor in at_once.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-6)


def test_gradients_that_are_exchanged_in_bfloat16_are_near_and_the_same_on_all_ranks(
    packages: Catalogue, at_once: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    stage = Stage(resize=40, crop=32, batch_size=16, precision="float32", gradients="bfloat16")
    work = work_in(tmp_path, stage, WITHOUT_BATCH_NORM)
    weights = of_ranks(work, packages.root, 2)
    assert [seen["weights"] for seen in seen_by(work, 0)] == [seen["weights"] for seen in seen_by(work, 1)]
    exact = of_ranks(
        replace(work, folder=tmp_path / "exact" / "job", stage=stage.model_copy(update={"gradients": "float32"})),
        packages.root,
        2,
    )
    differences = [(weights[name] - tensor).abs().max().item() for name, tensor in exact.items()]
    assert 0 < max(differences) < 0.01


def test_a_job_in_parts_that_is_killed_ends_with_the_same_bytes(
    packages: Catalogue, stage: Stage, tmp_path: Path
) -> None:
    one, two = (work_in(tmp_path / name, with_settings(stage, accumulate=2, drop_rate=0.2), NETWORK) for name in "ab")
    assert train(one, packages.root) == 0
    assert train(two, packages.root, Death("os.mkdir", "/.weights.")) < 0
    assert train(two, packages.root) == 0
    assert result(one) == result(two)

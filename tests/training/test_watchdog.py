"""watchdog: a process that hangs ends with all its stacks, and started again ends with the bytes of another."""

from dataclasses import replace
from pathlib import Path

import pytest
from job_process import ended, log_of, start
from test_job import NETWORK, result

from aliprod.catalogue.catalogue import Catalogue
from aliprod.recipe import Machine, Stage, TrainingJob


def work_that_hangs(folder: Path, stage: Stage, once: Path, ranks: int) -> TrainingJob:
    objective = {"name": "own.stuck", "step": 6, "rank": ranks - 1, "once": str(once)}
    stage = Stage.model_validate(stage.model_dump() | {"objective": objective, "shares": ranks})
    machine = Machine(save_every_steps=3, watchdog_seconds=2.0)
    return TrainingJob("net/stage", "0123", NETWORK, stage, folder / "job", machine=machine)


def codes(work: TrainingJob, catalogue: Path, ranks: int) -> list[int]:
    work.folder.with_suffix(".meeting").unlink(missing_ok=True)  # a killed rank leaves it, and nobody meets there
    processes = [start(work, catalogue, rank=rank, world_size=ranks) for rank in range(ranks)]
    return [ended(process) for process in processes]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_that_hangs_ends_every_rank_with_its_stacks_and_costs_no_bytes(
    packages: Catalogue, stage: Stage, tmp_path: Path, ranks: int
) -> None:
    work = work_that_hangs(tmp_path / "hung", stage, tmp_path / "once", ranks)
    assert codes(work, packages.root, ranks) == [1] * ranks
    for rank in range(ranks):
        told = (work.folder.parent / f"stderr-{rank}.txt").read_text()
        assert "Timeout (0:00:02)!" in told
        assert "loop.py" in told
    assert "in forward" in told  # the last rank is the one that hangs
    assert "own/stuck.py" in told
    work = replace(work, machine=Machine(save_every_steps=3))
    assert codes(work, packages.root, ranks) == [0] * ranks
    assert "goes on from" in log_of(work)
    undisturbed = replace(work, folder=tmp_path / "undisturbed" / "job")
    assert codes(undisturbed, packages.root, ranks) == [0] * ranks
    assert result(work) == result(undisturbed)

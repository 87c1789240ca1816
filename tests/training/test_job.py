"""job: killed processes end with the bytes of undisturbed ones."""

import json
import os
import random
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from job_process import Death, ended, log_of, seen_by, start, train

from aliprod.catalogue.catalogue import Catalogue
from aliprod.errors import StorageFull
from aliprod.models import weights
from aliprod.recipe import Machine, Stage, TrainingJob
from aliprod.store import commit, epochs
from aliprod.store.layout import PACE
from aliprod.training.job import run
from aliprod.training.learner import set_up

NETWORK = "test_resnet.r160_in1k"


def work_in(folder: Path, stage: Stage, network: str = NETWORK) -> TrainingJob:
    return TrainingJob("net/stage", "0123", network, stage, folder / "job", machine=Machine(save_every_steps=3))


def result(work: TrainingJob) -> dict[str, str]:
    """sha256 of the weights that a finished job has left."""
    kept = [folder for folder in (work.folder / "weights", work.folder / "last") if folder.exists()]
    return {folder.name: commit.sha256(folder / "model.safetensors") for folder in kept}


def told(work: TrainingJob) -> list[dict[str, float]]:
    """metrics.jsonl, without what hangs on the clock."""
    lines = (work.folder / "metrics.jsonl").read_text().splitlines()
    clock = ("time_ms", "speed/")
    return [{key: v for key, v in json.loads(line).items() if not key.startswith(clock)} for line in lines]


@pytest.fixture(scope="module")
def undisturbed(packages: Catalogue, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, TrainingJob]:
    """A finished job with averaged weights, and one without."""
    works = {}
    for averaged in (True, False):
        works[averaged] = work_in(tmp_path_factory.mktemp("undisturbed"), stage_with(averaged))
        assert train(works[averaged], packages.root) == 0
    return works


def stage_with(averaged: bool) -> Stage:
    return Stage(
        resize=40,
        crop=32,
        batch_size=8,
        epochs=3,
        augmentation=("random_resized_crop", "flip", "auto_augment", "cutout"),
        drop_rate=0.2,
        ema=0.9 if averaged else None,
    )


def test_each_line_tells_the_device_and_the_number_of_ranks(undisturbed: dict[bool, TrainingJob]) -> None:
    lines = [json.loads(line) for line in (undisturbed[True].folder / "metrics.jsonl").read_text().splitlines()]
    place = (commit.read(undisturbed[True].folder / "weights") or {})["environment"]
    assert [(line["device"], line["speed/ranks"]) for line in lines] == [(place["device"], 1)] * 3


def test_a_job_tells_its_pace_before_its_first_epoch_has_ended_until_it_is_finished(
    packages: Catalogue, tmp_path: Path
) -> None:
    work = work_in(tmp_path, stage_with(averaged=False))
    progress = run(work, packages)
    first = next(progress)
    assert (first.state.step, first.last) == (3, None), "in mid-epoch"
    pace = epochs.pace(work.folder)
    assert pace is not None
    assert (pace["step"], pace["ranks"], pace["device"]) == (2, 1, first.place.environment()["device"])
    assert pace["images_per_second"] > 0
    assert list(progress)
    assert epochs.pace(work.folder) is None


def test_a_training_goes_on_while_its_pace_cannot_be_written(
    packages: Catalogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, move = threading.Event(), os.replace

    def stuck(source: Path, target: Path) -> None:
        if Path(target).name == PACE:
            assert answers.wait(60)
        move(source, target)

    monkeypatch.setattr(os, "replace", stuck)
    work = work_in(tmp_path, stage_with(averaged=False))
    progress = run(work, packages)
    assert [next(progress).state.step for _ in range(3)] == [3, 4, 6]
    assert epochs.pace(work.folder) is None
    answers.set()
    assert list(progress)
    assert not (work.folder / "resume").exists()


# 8 pictures a step, 24 after an epoch; checkpoints after steps 3, 4, 6, 8 and 9.
DEATHS = {
    "before the first checkpoint": Death("open", ".jpg", 5),
    "in mid-epoch, after a checkpoint": Death("open", ".jpg", 30),
    "while it validates": Death("open", ".jpg", 4 * 8 + 10),
    "between an epoch's line and its checkpoint": Death("os.mkdir", "/.step-0000000004."),
    "with a checkpoint that is not committed": Death("os.rename", "/.step-0000000006."),
    "while an old checkpoint is removed": Death("shutil.rmtree", "/step-0000000003"),
    "between the last checkpoint and the weights": Death("os.mkdir", "/.weights."),
    "with weights that are not committed": Death("os.rename", "/.weights."),
    "with weights and its checkpoints": Death("shutil.rmtree", "/resume"),
}


@pytest.mark.parametrize("death", DEATHS.values(), ids=DEATHS.keys())
def test_a_job_that_is_killed_and_started_again_ends_with_the_same_bytes(
    packages: Catalogue, undisturbed: dict[bool, TrainingJob], tmp_path: Path, death: Death
) -> None:
    work = work_in(tmp_path, stage_with(averaged=True))
    assert train(work, packages.root, death) == -signal.SIGKILL
    going_on = any((work.folder / "resume").glob("step-*/manifest.json")) and not (work.folder / "weights").exists()
    assert train(work, packages.root) == 0
    assert ("goes on from" in log_of(work)) == going_on
    assert not (work.folder / "resume").exists()
    assert not list(work.folder.rglob("*.partial"))
    assert result(work) == result(undisturbed[True])
    assert told(work) == told(undisturbed[True])


def test_a_job_without_averaged_weights_that_is_killed_again_and_again_ends_with_the_same_bytes(
    packages: Catalogue, undisturbed: dict[bool, TrainingJob], tmp_path: Path
) -> None:
    work = work_in(tmp_path, stage_with(averaged=False))
    codes = []
    while not codes or codes[-1]:
        codes.append(train(work, packages.root, Death("os.rename", "/.step-", 2)))  # each commits one checkpoint
        assert len(codes) < 10
    assert codes[:-1] == [-signal.SIGKILL] * (len(codes) - 1)
    assert len(codes) == 5
    assert result(work) == result(undisturbed[False])
    assert told(work) == told(undisturbed[False])


def test_a_job_of_two_branches_that_is_killed_ends_with_the_same_bytes(packages: Catalogue, tmp_path: Path) -> None:
    """It draws from two samplers, and its loss moves from one to the other over the epochs."""
    stage = Stage.model_validate(stage_with(averaged=True).model_dump() | {"objective": {"name": "bbn"}})
    whole, killed = (work_in(tmp_path / name, stage) for name in ("whole", "killed"))
    assert train(whole, packages.root) == 0
    in_the_second_epoch = Death("open", ".jpg", 2 * 32 + 24 + 40)  # two pictures a place, then val
    assert train(killed, packages.root, in_the_second_epoch) == -signal.SIGKILL
    assert train(killed, packages.root) == 0
    assert "goes on from" in log_of(killed)
    assert result(killed) == result(whole)
    assert told(killed) == told(whole)
    assert weights.describe(killed.folder / "weights")[0].branches == 2


@pytest.mark.parametrize("seed", range(4))
def test_a_job_that_is_killed_at_random_moments_ends_with_the_same_bytes(
    packages: Catalogue, undisturbed: dict[bool, TrainingJob], tmp_path: Path, seed: int
) -> None:
    work, draw = work_in(tmp_path, stage_with(averaged=True)), random.Random(seed)
    codes = [train(work, packages.root, Death("open", "", draw.randrange(1, 150))) for _ in range(2)]
    assert codes[0] == -signal.SIGKILL
    assert train(work, packages.root) == 0
    assert result(work) == result(undisturbed[True])
    assert told(work) == told(undisturbed[True])


def test_a_storage_path_that_takes_no_checkpoint_ends_the_job_with_one_sentence(
    packages: Catalogue, tmp_path: Path
) -> None:
    work = work_in(tmp_path, stage_with(averaged=False))
    work.folder.mkdir()
    (work.folder / "resume").write_text("a file where a folder should be")
    assert train(work, packages.root) == StorageFull.status
    assert "resume/step-0000000003: cannot be written: " in log_of(work)
    assert "Traceback" not in log_of(work)
    (work.folder / "resume").unlink()
    assert train(work, packages.root) == 0


def test_averaging_changes_what_is_kept_and_nothing_of_the_training(undisturbed: dict[bool, TrainingJob]) -> None:
    assert result(undisturbed[True])["weights"] != result(undisturbed[False])["weights"]
    averaged, plain = told(undisturbed[True]), told(undisturbed[False])
    for key in ("train/loss", "val/top1_error"):
        assert [line[key] for line in averaged] == [line[key] for line in plain]


def test_a_flipped_bit_in_the_newest_checkpoint_costs_an_interval_and_no_bytes(
    packages: Catalogue, undisturbed: dict[bool, TrainingJob], tmp_path: Path
) -> None:
    work = work_in(tmp_path, stage_with(averaged=True))
    assert train(work, packages.root, Death("os.rename", "/.step-0000000008.")) == -signal.SIGKILL
    newest = work.folder / "resume/step-0000000006/learner.safetensors"
    content = bytearray(newest.read_bytes())
    content[-100] ^= 1
    newest.write_bytes(content)
    assert train(work, packages.root) == 0
    warnings = [line for line in log_of(work).splitlines() if line.startswith("WARNING")]
    assert len(warnings) == 1
    assert "step-0000000006 is damaged (learner.safetensors)" in warnings[0]
    assert f"goes on from {work.folder}/resume/step-0000000004" in log_of(work)
    assert result(work) == result(undisturbed[True])


def test_a_finished_job_is_not_trained_again(packages: Catalogue, undisturbed: dict[bool, TrainingJob]) -> None:
    work = undisturbed[True]
    before = changes(work)
    assert train(work, packages.root, Death("open", ".jpg")) == 0  # it would die at the first picture
    assert changes(work) == before


def test_epochs_that_end_soon_after_a_checkpoint_go_without_one(packages: Catalogue, tmp_path: Path) -> None:
    stage = stage_with(averaged=False)
    for often, expected in ((0.0, [4, 8]), (3600.0, [])):
        work = replace(work_in(tmp_path / str(often), stage), machine=Machine(save_seconds=often))
        assert train(work, packages.root, Death("os.mkdir", "/.weights.")) == -signal.SIGKILL
        assert [int(path.name.removeprefix("step-")) for path in steps(work)] == expected
        assert train(work, packages.root) == 0
    assert result(replace(work, folder=tmp_path / "0.0" / "job")) == result(work)


def steps(work: TrainingJob) -> list[Path]:
    return sorted((work.folder / "resume").glob("step-*"))


def changes(work: TrainingJob) -> dict[Path, int]:
    """When each file that the job itself has written was last changed."""
    files = (
        path
        for path in work.folder.rglob("*")
        if path.is_file() and not path.name.startswith(("log", "rank", "stderr"))
    )
    return {path: path.stat().st_mtime_ns for path in files}


def test_what_a_finished_job_leaves_is_whole_and_says_where_it_comes_from(undisturbed: dict[bool, TrainingJob]) -> None:
    work = undisturbed[True]
    assert commit.verify(work.folder / "weights") == []
    assert not (work.folder / "resume").exists()
    record = commit.read(work.folder / "weights")
    assert record is not None
    assert (record["job"], record["key"], record["epochs"], record["steps"]) == ("net/stage", "0123", 3, 12)
    assert record["top1_error"] == min(
        min(line["val/top1_error"], line["val/top1_error_averaged"]) for line in told(work)
    )
    config, classes = weights.describe(work.folder / "weights")
    assert (config.epoch, config.kind) == (record["best_epoch"], record["kind"])
    assert classes.ids == (0, 1, 2, 3)
    assert [line["epoch"] for line in told(work)] == [0, 1, 2]


def of_two_ranks(work: TrainingJob, catalogue: Path, *deaths: Death | None) -> list[int]:
    ranks = [start(work, catalogue, death, rank, 2) for rank, death in enumerate(deaths or (None, None))]
    return [ended(process) for process in ranks]


@pytest.fixture(scope="module")
def of_two(packages: Catalogue, tmp_path_factory: pytest.TempPathFactory) -> TrainingJob:
    lr = {"backbone": 0.05, "heads": 0.1}
    stage = stage_with(averaged=True).model_dump() | {"epochs": 8, "augmentation": ("resize",), "lr": lr, "shares": 2}
    work = work_in(tmp_path_factory.mktemp("ranks"), Stage.model_validate(stage), "test_efficientnet")
    assert of_two_ranks(work, packages.root) == [0, 0]
    return work


def test_two_ranks_hold_the_same_weights_and_buffers(of_two: TrainingJob) -> None:
    first, second = seen_by(of_two, 0), seen_by(of_two, 1)
    assert len(first) == 8
    assert [seen["weights"] for seen in first] == [seen["weights"] for seen in second]
    assert {seen["threads"] for seen in first + second} == {1}


def test_the_errors_of_two_ranks_are_those_of_one_rank_with_the_same_weights(
    packages: Catalogue, of_two: TrainingJob
) -> None:
    record = commit.read(of_two.folder / "weights")
    setup = set_up(of_two.stage, of_two.network, packages, Machine())
    setup.learner.model.load_state_dict(weights.read(of_two.folder / "weights"))
    errors = setup.top1_errors()
    assert record is not None
    assert errors["val/top1_error"] == record["top1_error"]
    assert record["top1_error"] < 0.6  # more than one of four classes is named


def test_two_ranks_learn_what_one_does_where_no_norm_layer_mixes_images(packages: Catalogue, tmp_path: Path) -> None:
    stage = stage_with(averaged=False).model_copy(update={"drop_rate": 0.0, "epochs": 1})
    one, two = (work_in(tmp_path / name, stage, "test_efficientnet_gn") for name in ("one", "two"))
    two = replace(two, stage=stage.model_copy(update={"shares": 2}))
    assert train(one, packages.root) == 0
    assert of_two_ranks(two, packages.root) == [0, 0]
    state, other = (weights.load(work.folder / "weights")[0].state_dict() for work in (one, two))
    for name, tensor in state.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-6)


def test_where_one_ranks_loss_is_not_finite_all_stop_and_name_that_ranks_images(
    packages: Catalogue, tmp_path: Path
) -> None:
    stage = stage_with(averaged=False).model_dump() | {"objective": {"name": "own.spoilt", "step": 5, "rank": 1}}
    work = work_in(tmp_path, Stage.model_validate(stage | {"shares": 2}))
    assert of_two_ranks(work, packages.root) == [1, 1]
    complaint = [line for line in log_of(work).splitlines() if "Images:" in line or "not finite" in line]
    assert complaint == [line for line in log_of(work, 1).splitlines() if "Images:" in line or "not finite" in line]
    assert "not finite in epoch 2, step 5 (class nan; lr 0.01)" in complaint[0]
    assert len(complaint[1].split("Images:")[1].split(",")) == 4  # of the 8 images of the step

"""What a person reads of a plan on its way: from events, and from the storage path alone."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aliprod.build.events import Changed, Ended, Reported, Said
from aliprod.plan.jobs import Job, jobs_of
from aliprod.plan.load import load
from aliprod.plan.open import Opened
from aliprod.plan.places import Places, resolve
from aliprod.plan.schema import Plan
from aliprod.report import status
from aliprod.store import commit

PLAN = """\
format = 1
name = "shop"
catalogue = { path = "pictures" }
backbones = { net = "resnet18.a1_in1k" }
stages = { full = { epochs = 4 }, accuracy = { start = "full", epochs = 2 } }
jobs = { net = ["full", "accuracy"] }
ensemble = { members = ["net/accuracy"] }
"""


class Shop:
    """A plan of two jobs in a storage path."""

    def __init__(self, folder: Path) -> None:
        (folder / "plan.toml").write_text(PLAN)
        self.plan: Plan = load(folder / "plan.toml")
        self.places: Places = resolve(self.plan, folder / "runs", None, None)
        self.jobs: dict[str, Job] = jobs_of(self.plan, "0" * 64)

    @property
    def opened(self) -> Opened:
        return Opened(self.plan, PLAN, self.places, None, self.jobs)

    def folder(self, name: str) -> Path:
        return self.opened.job_folder(name)

    def told(self, pid: int, host: str = os.uname().nodename, **states: str) -> None:
        file = self.places.of(self.plan) / "state.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        jobs = {f"net/{name}": state for name, state in states.items()}
        file.write_text(json.dumps({"host": host, "pid": pid, "jobs": jobs}))

    def epoch(self, name: str, epoch: int, seconds: float, error: float = 0.5) -> None:
        line = {"epoch": epoch, "time_ms": round(1000 * seconds), "val/top1_error": error}
        self.folder(name).mkdir(parents=True, exist_ok=True)
        with (self.folder(name) / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line | {"speed/images_per_second": 80.0}) + "\n")

    def finish(self, name: str, error: float | None) -> None:
        commit.write(self.folder(name) / "weights", lambda new: (new / "model").touch(), {"top1_error": error})

    def states(self) -> dict[str, dict[str, Any]]:
        return {row["name"]: row for row in status.states(self.opened)}


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


@pytest.fixture(scope="module")
def gone() -> int:
    """The number of a process that has ended."""
    with subprocess.Popen(["true"]) as process:
        process.wait()
    return process.pid


def test_nothing_is_known_of_jobs_that_have_not_begun(shop: Shop) -> None:
    row = shop.states()["net/full"]
    assert row == {
        "name": "net/full",
        "key": shop.jobs["net/full"].key,
        "state": "waiting",
        "epoch": 0,
        "epochs": 4,
        "top1_error": None,
        "images_per_second": None,
        "eta_seconds": None,
        "gain": None,
    }


def test_a_running_job_shows_its_epochs_and_the_time_that_they_leave(shop: Shop) -> None:
    shop.told(os.getpid(), full="running")
    shop.epoch("net/full", 0, seconds=100, error=0.75)
    assert shop.states()["net/full"]["eta_seconds"] is None, "one epoch does not say how long an epoch lasts"
    shop.epoch("net/full", 1, seconds=110, error=0.25)
    row = shop.states()["net/full"]
    assert (row["state"], row["epoch"], row["top1_error"], row["images_per_second"]) == ("running", 2, 0.25, 80.0)
    assert row["eta_seconds"] == pytest.approx((4 - 2) * 10)


@pytest.mark.parametrize("told", ["waiting", "running", "failed", "not_run", "finished", None])
def test_a_job_whose_weights_are_committed_is_finished_whatever_was_told(shop: Shop, told: str | None) -> None:
    if told:
        shop.told(os.getpid(), full=told)
    shop.finish("net/full", 0.125)
    row = shop.states()["net/full"]
    assert (row["state"], row["top1_error"], row["eta_seconds"]) == ("finished", 0.125, 0.0)


def test_a_job_that_was_finished_before_the_run_is_reused(shop: Shop) -> None:
    shop.finish("net/full", None)
    shop.told(os.getpid(), full="reused", accuracy="running")
    assert [row["state"] for row in shop.states().values()] == ["reused", "running"]
    assert shop.states()["net/full"]["top1_error"] is None, "there was nothing to validate with"


@pytest.mark.parametrize(("before", "after"), [(0.25, 0.125), (0.125, 0.25), (0.5, 0.5)])
def test_the_gain_is_the_error_less_that_of_the_job_it_starts_from(shop: Shop, before: float, after: float) -> None:
    shop.finish("net/full", before)
    shop.finish("net/accuracy", after)
    assert shop.states()["net/accuracy"]["gain"] == after - before
    assert shop.states()["net/full"]["gain"] is None, "it starts from nothing"


def test_there_is_no_gain_before_both_jobs_have_ended_with_an_error(shop: Shop) -> None:
    shop.epoch("net/full", 0, seconds=100, error=0.5)
    shop.epoch("net/accuracy", 0, seconds=100, error=0.25)
    assert shop.states()["net/accuracy"]["gain"] is None
    shop.finish("net/accuracy", 0.25)
    assert shop.states()["net/accuracy"]["gain"] is None
    shop.finish("net/full", None)
    assert shop.states()["net/accuracy"]["gain"] is None, "there was nothing to validate with"


@pytest.mark.parametrize("told", ["finished", "reused"])
def test_a_job_that_was_told_finished_and_has_no_weights_waits_again(shop: Shop, told: str) -> None:
    shop.told(os.getpid(), full=told)
    assert shop.states()["net/full"]["state"] == "waiting"


def test_a_driver_that_is_gone_runs_nothing(shop: Shop, gone: int) -> None:
    shop.told(gone, full="failed", accuracy="running")
    assert [row["state"] for row in shop.states().values()] == ["failed", "waiting"]


def test_a_driver_on_another_machine_is_taken_at_its_word(shop: Shop, gone: int) -> None:
    shop.told(gone, host="another machine", full="reused", accuracy="running")
    assert shop.states()["net/accuracy"]["state"] == "running"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}', '{"pid": 1, "jobs": 3}', "null"])
def test_a_damaged_file_of_states_tells_nothing(shop: Shop, text: str) -> None:
    shop.told(1)
    (shop.places.of(shop.plan) / "state.json").write_text(text)
    assert {row["state"] for row in shop.states().values()} == {"waiting"}


def test_jobs_without_keys_wait(shop: Shop) -> None:
    shop.jobs = jobs_of(shop.plan, None)
    assert [(row["key"], row["state"]) for row in shop.states().values()] == [(None, "waiting")] * 2


# Lines


def test_a_line_names_the_job_and_what_came_of_it() -> None:
    record = {"seconds": 61.4, "top1_error": 0.125, "best_epoch": 2}
    finished = status.line(Changed("net/full", "finished", record=record), 0)
    assert finished.split(maxsplit=1)[1] == f"{'net/full':<26} finished in 61 s, top-1 error 12.50% after epoch 3"
    failed = status.line(Changed("net/full", "failed", "ValueError: no"), 0)
    assert failed.endswith("failed: ValueError: no")
    assert status.line(Changed("net/full", "not_run", "net/full failed"), 0).endswith("not run: net/full failed")
    unscored = status.line(Changed("net/full", "finished", record=record | {"top1_error": None}), 0)
    assert unscored.endswith("finished in 61 s")


def test_an_epoch_is_counted_from_one_for_people() -> None:
    line = {"epoch": 0, "train/loss": 1.25, "val/top1_error": 0.5, "speed/images_per_second": 99.6}
    assert status.line(Reported("net/full", line), 0).endswith("epoch 1: loss 1.2500, top-1 error 50.00%, 100 images/s")
    unscored = {"epoch": 1, "train/loss": 1.25, "speed/images_per_second": 99.6}
    assert status.line(Reported("net/full", unscored), 0).endswith("epoch 2: loss 1.2500, 100 images/s")


def test_what_was_said_is_told_and_the_end_is_not_a_line() -> None:
    assert status.line(Said("MLflow is away."), 0).endswith("MLflow is away.")
    assert status.line(Ended({}), 0) == ""


# Tables

cells = st.none() | st.integers(-999, 999) | st.text("abc äß-", max_size=12).map(str.strip)


@given(st.integers(1, 4).flatmap(lambda width: st.lists(st.lists(cells, min_size=width, max_size=width), min_size=1)))
def test_the_columns_of_a_table_begin_at_the_same_place_in_every_line(rows: list[list[object]]) -> None:
    header = [f"column {number}" for number in range(len(rows[0]))]
    first, rule, *lines = status.table(rows, header).split("\n")
    starts = [place for place in range(len(rule)) if rule[place] == "-" and (place == 0 or rule[place - 1] == " ")]
    ends = [*(start - 2 for start in starts[1:]), len(rule)]
    assert len(lines) == len(rows)
    for row, line in zip([header, *rows], [first, *lines], strict=True):
        found = [line.ljust(len(rule))[start:end].strip() for start, end in zip(starts, ends, strict=True)]
        assert found == ["" if value is None else str(value) for value in row]


def test_a_table_of_the_outcome_shows_the_mean_of_the_members_and_the_ensemble() -> None:
    members = {"net/full": {"top1_error": 0.2, "version": 3}, "net/accuracy": {"top1_error": 0.1, "version": None}}
    ensemble = {"members": members, "top1_error": 0.05, "split": "val"}
    lines = status.outcome_table({"ensemble": ensemble}).splitlines()
    assert lines[0].split() == ["member", "top-1", "error", "on", "val,", "%", "version"]
    assert [line.split() for line in lines[2:]] == [
        ["net/full", "20.00", "3"],
        ["net/accuracy", "10.00"],
        ["mean", "of", "the", "members", "15.00"],
        ["ensemble", "5.00"],
    ]


def test_a_table_of_an_outcome_without_labels_shows_no_errors() -> None:
    ensemble = {"members": {"net/full": {"top1_error": None, "version": 1}}, "top1_error": None, "split": None}
    lines = status.outcome_table({"ensemble": ensemble}).splitlines()
    assert [line.split() for line in lines[2:]] == [["net/full", "1"], ["ensemble"]]

"""What a person reads of a plan on its way: from events, and from the storage path alone."""

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aliprod.build.events import Changed, Ended, Reported, Said, Task
from aliprod.build.state import told
from aliprod.plan.jobs import Job, jobs_of
from aliprod.plan.load import load
from aliprod.plan.open import Opened
from aliprod.plan.places import Places, resolve
from aliprod.plan.schema import Plan
from aliprod.report import status
from aliprod.store import commit, epochs, lease

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

    def told(self, pid: int, tasks: Sequence[Task] = (), signed: tuple[str, str] = ("", ""), **states: str) -> None:
        """As a driver leaves it, whose jobs did not end well for a reason each."""
        file = self.places.of(self.plan) / "state.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        jobs = {f"net/{name}": state for name, state in states.items()}
        reasons = {name: f"why {state}" for name, state in jobs.items() if state in ("waiting", "failed", "not_run")}
        said = {"states": jobs, "reasons": reasons, "tasks": [asdict(task) for task in tasks], "nodes": []}
        file.write_text(json.dumps(lease.sign() | {"pid": pid} | dict([signed]) | said))

    def epoch(self, name: str, epoch: int, seconds: float, error: float = 0.5) -> None:
        line = {"epoch": epoch, "time_ms": round(1000 * seconds), "val/top1_error": error}
        self.folder(name).mkdir(parents=True, exist_ok=True)
        with (self.folder(name) / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line | {"speed/images_per_second": 80.0}) + "\n")

    def finish(self, name: str, error: float | None) -> None:
        commit.write(self.folder(name) / "weights", lambda new: (new / "model").touch(), {"top1_error": error})

    def states(self) -> dict[str, dict[str, Any]]:
        return {row["name"]: row for row in status.states(self.opened, told(self.opened), {"net/full": 20.0})}


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
        "reason": None,
        "world_size": None,
        "epoch": 0,
        "epochs": 4,
        "floor": False,
        "top1_error": None,
        "kind": None,
        "images_per_second": None,
        "eta_seconds": 20.0,
        "gain": None,
    }
    assert shop.states()["net/accuracy"]["eta_seconds"] is None
    assert shop.states()["net/accuracy"]["reason"] == "net/full"


def test_a_running_job_shows_its_ranks_its_epochs_and_its_pace(shop: Shop) -> None:
    shop.told(os.getpid(), tasks=[Task("net/full", "training", "net/full", ("a", "a", "b", "b"), 0.0)], full="running")
    shop.epoch("net/full", 0, seconds=100, error=0.75)
    shop.epoch("net/full", 1, seconds=110, error=0.25)
    row = shop.states()["net/full"]
    assert (row["state"], row["epoch"], row["top1_error"], row["images_per_second"]) == ("running", 2, 0.25, 80.0)
    assert (row["world_size"], row["reason"]) == (4, None)
    (shop.folder("net/full") / "resume").mkdir()
    (shop.folder("net/full") / "resume" / "pace.json").write_text(json.dumps({"step": 3, "images_per_second": 90.5}))
    assert shop.states()["net/full"]["images_per_second"] == 90.5


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
    shop.told(gone, tasks=[Task("hashes", "hashes", None, ("a",), 0.0)], full="waiting", accuracy="running")
    assert [row["state"] for row in shop.states().values()] == ["waiting", "waiting"]
    assert [row["reason"] for row in shop.states().values()] == [None, "net/full"]
    assert told(shop.opened).running == []


def test_why_jobs_failed_is_known_when_their_driver_is_gone(shop: Shop, gone: int) -> None:
    shop.told(gone, full="failed", accuracy="not_run")
    rows = list(shop.states().values())
    assert [(row["state"], row["reason"]) for row in rows] == [("failed", "why failed"), ("not_run", "why not_run")]
    assert "why not_run" in status.states_table(rows)
    rows = [row | {"reason": "It broke.\n  Mend it."} for row in rows]
    text = status.text({"jobs": rows, "tasks": [], "eta_seconds": None})
    assert text.endswith("\nnet/full failed: It broke.\n  Mend it.")


def test_what_a_job_waits_for_is_what_its_driver_says(shop: Shop) -> None:
    shop.told(os.getpid(), full="waiting", accuracy="waiting")
    assert shop.states()["net/full"]["reason"] == "why waiting"


def test_tasks_that_are_no_trainings_are_told_while_they_are_made(shop: Shop) -> None:
    tasks = [
        Task("net/full", "training", "net/full", ("a",), 100.0),
        Task("net/full test", "prediction", "net/full", ("a",), 100.0),
        Task("hashes", "hashes", None, ("a",), 40.0, 90.0),
    ]
    shop.told(os.getpid(), tasks=tasks, full="running")
    rows = status.tasks(told(shop.opened), now=110.0)
    assert rows == [{"name": "net/full test", "kind": "prediction", "job": "net/full", "seconds": 10.0}]
    text = status.text({"jobs": list(shop.states().values()), "tasks": rows, "eta_seconds": 90.0})
    assert text.splitlines()[-2:] == ["net/full test: prediction for 10 s", "About 1 min 30 s left."]


def test_a_driver_on_another_machine_is_taken_at_its_word(shop: Shop, gone: int) -> None:
    shop.told(gone, signed=("machine", "another"), full="reused", accuracy="running")
    assert shop.states()["net/accuracy"]["state"] == "running"


def test_what_was_said_of_other_settings_of_a_job_is_not_said_of_these(shop: Shop) -> None:
    keys = {name: job.key for name, job in shop.jobs.items()}
    shop.told(os.getpid(), full="failed", accuracy="not_run")
    file = shop.places.of(shop.plan) / "state.json"
    said = json.loads(file.read_text())
    file.write_text(json.dumps(said | {"keys": keys}))
    assert [row["state"] for row in shop.states().values()] == ["failed", "not_run"]
    file.write_text(json.dumps(said | {"keys": keys | {"net/full": "of other settings"}}))
    rows = shop.states()
    assert (rows["net/full"]["state"], rows["net/full"]["reason"]) == ("waiting", None)
    shop.finish("net/accuracy", 0.5)  # since then
    assert (shop.states()["net/accuracy"]["state"], shop.states()["net/accuracy"]["reason"]) == ("finished", None)


def test_a_process_with_the_number_of_a_driver_that_is_gone_is_another(shop: Shop) -> None:
    shop.told(os.getpid(), accuracy="running")
    assert shop.states()["net/accuracy"]["state"] == "running"
    shop.told(os.getpid(), signed=("started", "1"), accuracy="running")
    assert shop.states()["net/accuracy"]["state"] == "waiting"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"pid": 1}', '{"pid": 1, "states": 3}', '{"jobs": {}}', '{"keys": 3}', "null"]
)
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
    finished = status.line(Changed("net/full", "finished", record=record, seconds=71.0))
    told = f"{'net/full':<26} finished after 1 min 11 s, top-1 error 12.50% of epoch 3"
    assert finished.split(maxsplit=1)[1] == told, "from when it was said to run"
    failed = status.line(Changed("net/full", "failed", "ValueError: no"))
    assert failed.endswith("failed: ValueError: no")
    assert status.line(Changed("net/full", "not_run", "net/full failed")).endswith("not run: net/full failed")
    unscored = status.line(Changed("net/full", "finished", record=record | {"top1_error": None}, seconds=9.0))
    assert unscored.endswith("finished after 9 s")
    assert status.line(Changed("net/full", "running", world_size=4)).endswith(
        "net/full                   running on 4 ranks"
    )


def test_an_error_is_of_the_weights_that_are_picked_and_says_which(shop: Shop) -> None:
    line = {"epoch": 0, "train/loss": 1.0, "val/top1_error": 0.4792, "val/top1_error_raw_restated": 0.3958}
    named = "top-1 error 39.58% (norm statistics taken anew)"
    assert f"epoch 1: loss 1.0000, {named}, " in status.line(Reported("net/full", line))
    record = {"seconds": 1.0, "top1_error": 0.3958, "best_epoch": 0, "kind": "raw_restated"}
    assert status.line(Changed("net/full", "finished", record=record, seconds=9.0)).endswith(f"{named} of epoch 1")
    (shop.folder("net/full")).mkdir(parents=True)
    (shop.folder("net/full") / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    running = status.states(shop.opened, told(shop.opened), {})
    assert (running[0]["top1_error"], running[0]["kind"]) == (0.3958, "raw_restated")
    row = status.states_table(running).splitlines()[2]
    assert row.endswith("norm statistics taken anew")
    assert "39.58" in row
    equal = line | {"val/top1_error_averaged": 0.3958}
    assert epochs.error(equal) == (0.3958, "averaged"), "of equals the later one, as training picks"
    assert epochs.error({"epoch": 0}) == (None, "raw")


def test_a_line_tells_when_a_task_begins_and_ends() -> None:
    task = Task("net/full test", "soft_labels", "net/full", ("a",), 100.0)
    assert status.line(task).endswith("net/full test              soft labels begins")
    assert status.line(replace(task, until=165.0)).endswith("soft labels ended after 1 min 05 s")


def test_an_epoch_is_counted_from_one_for_people() -> None:
    line = {"epoch": 0, "train/loss": 1.25, "val/top1_error": 0.5, "speed/images_per_second": 99.6}
    assert status.line(Reported("net/full", line)).endswith("epoch 1: loss 1.2500, top-1 error 50.00%, 100 images/s")
    unscored = {"epoch": 1, "train/loss": 1.25, "speed/images_per_second": 99.6}
    assert status.line(Reported("net/full", unscored)).endswith("epoch 2: loss 1.2500, 100 images/s")


def test_nothing_is_less_than_nothing() -> None:
    assert status.gain({"gain": -1e-6, "gain_interval": [-4e-5, 1e-6]}) == "+0.00 points (+0.00 to +0.00)"
    assert status.gain({"gain": -1e-4, "gain_interval": [-1, 6e-5]}) == "-0.01 points (-100.00 to +0.01)"


def test_what_was_said_is_told_and_the_end_is_not_a_line() -> None:
    assert status.line(Said("MLflow is away.")).endswith("MLflow is away.")
    assert status.line(Ended({})) == ""


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


def test_a_table_of_the_outcome_shows_the_members_the_best_first_and_the_ensemble() -> None:
    members = {"net/full": {"top1_error": 0.2, "version": 3}, "net/accuracy": {"top1_error": 0.1, "version": None}}
    ensemble = {"members": members, "top1_error": 0.05, "split": "val"}
    lines = status.outcome_table({"ensemble": ensemble}).splitlines()
    assert lines[0].split() == ["member", "top-1", "error", "on", "val,", "%", "version"]
    assert [line.split() for line in lines[2:]] == [
        ["net/accuracy", "10.00"],
        ["net/full", "20.00", "3"],
        ["ensemble", "5.00"],
    ]


def test_a_table_of_an_outcome_without_labels_shows_no_errors() -> None:
    ensemble = {"members": {"net/full": {"top1_error": None, "version": 1}}, "top1_error": None, "split": None}
    lines = status.outcome_table({"ensemble": ensemble}).splitlines()
    assert [line.split() for line in lines[2:]] == [["net/full", "1"], ["ensemble"]]


def compared(combine: str = "sum", smallest: tuple[str, ...] = ("net/a", "net/b")) -> dict[str, Any]:
    def told(error: float) -> dict[str, Any]:
        return {"top1_error": error, "interval": [0.01, 0.25], "gain": error - 0.05, "gain_interval": [-0.01, 0.12]}

    return {
        "split": "val" if combine == "sum" else "test",
        "views": "ten_crop",
        "combine": combine,
        "best": {"member": "net/a", "split": "val", "views": "center"},
        "images": 1234,
        "ensemble": told(0.05),
        "members": {"net/a": told(0.1), "net/b": told(0.2)},
        "sum": told(0.06),
        "smallest": told(0.055) | {"members": list(smallest), "standard_error": 0.006},
    }


def test_the_headline_compares_with_the_best_member_and_says_how_it_was_chosen() -> None:
    first, fewer = status.headline({"comparison": compared()})
    assert first.startswith("The ensemble of 2: top-1 error 5.00% (1.00 to 25.00) on val, ten crops, 1,234 images;")
    assert "net/a by val, centre crop, 10.00%" in first
    assert first.endswith("Gain: +5.00 points (-1.00 to +12.00).")
    assert fewer == "No fewer members come within one standard error of the whole."
    assert status.headline({"comparison": None}) == status.headline({}) == []


def test_the_headline_and_the_table_name_the_floor() -> None:
    found = compared()
    floors = {"net/probe": found["members"]["net/b"] | {"top1_error": 0.35}, "other/probe": found["members"]["net/b"]}
    ensemble = {"members": {}, "top1_error": 0.05, "split": "test", "comparison": found | {"floors": floors}}
    _, floor, _ = status.headline(ensemble)
    assert floor.startswith("The floor, frozen features (other/probe): 20.00% (1.00 to 25.00). Gain: +15.00 points")
    lines = [line.split() for line in status.outcome_table({"ensemble": ensemble}).splitlines()]
    assert lines[-3:] == [["ensemble", "5.00"], ["net/probe", "(floor)", "35.00"], ["other/probe", "(floor)", "20.00"]]


def test_the_headline_says_what_weights_gain_on_the_sum_and_which_members_are_not_needed() -> None:
    _, plain, fewer = status.headline({"comparison": compared("greedy", ("net/b",))})
    assert plain.endswith("Gain of greedy, fitted on val: +1.00 points (-1.00 to +12.00).")
    assert fewer.startswith(
        "Without net/a: 5.50% (1.00 to 25.00) cross-fitted, within one standard error (0.60 points)"
    )
    assert fewer.endswith("1 of 2 predictions fewer.")


def test_the_headline_names_the_members_that_are_enough_where_they_are_few() -> None:
    found = compared("sum", ("net/b",))
    found["members"]["net/c"] = found["members"]["net/a"]
    assert status.headline({"comparison": found})[-1].startswith("With net/b alone: ")

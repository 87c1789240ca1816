"""The state of a run: what a change of a target means for its job, events, the file that `aliprod status` reads."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aliprod.build.events import Changed, Event, Reported, Standing, Task
from aliprod.build.graph import targets
from aliprod.build.room import Node
from aliprod.build.schedule import Change
from aliprod.build.state import RunState, told
from aliprod.build.target import Resources
from aliprod.catalogue import sources
from aliprod.plan.jobs import jobs_of
from aliprod.plan.load import load
from aliprod.plan.open import Opened
from aliprod.plan.places import resolve
from aliprod.store import commit
from aliprod.synth.synth import synthesise

PLAN = """\
format = 1
name = "shop"
catalogue = { path = "photos" }
backbones = { net = "test_resnet.r160_in1k" }
stages = { full = { epochs = 2 }, accuracy = { start = "full" } }
jobs = { net = ["full", "accuracy"] }
ensemble = { members = ["net/accuracy"] }
"""


@pytest.fixture
def opened(tmp_path: Path) -> Opened:
    (tmp_path / "plan.toml").write_text(PLAN)
    synthesise(tmp_path / "photos", classes=2, images=10, seed=0)
    plan, catalogue = load(tmp_path / "plan.toml"), sources.read(tmp_path / "photos")
    places = resolve(plan, tmp_path / "runs", None, None)
    return Opened(plan, PLAN, places, catalogue, jobs_of(plan, catalogue.fingerprint))


@pytest.fixture
def state(opened: Opened) -> RunState:
    return RunState(opened)


def apply(state: RunState, name: str, *change: Any) -> list[Event]:
    return list(state.apply(targets(state.opened, gpu=False)[name], Change(name, *change)))


def reported(state: RunState) -> list[Event]:
    return [event for event in state.reports() if isinstance(event, Reported)]


def finish(opened: Opened, record: dict[str, Any]) -> None:
    """Commit weights, as a job's training would."""

    def fill(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"weights")
        (folder / "config.json").write_text(json.dumps({"epoch": record["best_epoch"], "top1_error": None}))

    commit.write(opened.job_folder("net/full") / "weights", fill, record)


def epoch(opened: Opened, number: int, end: str = "\n") -> dict[str, float]:
    """Append an epoch to a job's metrics, as its training would."""
    line = {"epoch": number, "time_ms": 1_700_000_000_000 + number, "val/top1_error": 0.5}
    file = opened.job_folder("net/full") / "metrics.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as lines:
        lines.write(json.dumps(line) + end)
    return line


def stated(opened: Opened) -> dict[str, str]:
    return dict(json.loads((opened.folder / "state.json").read_text())["states"])


def test_a_job_is_waiting_running_finished(state: RunState, opened: Opened) -> None:
    assert list(state.reuse()) == []
    assert stated(opened) == {"net/full": "waiting", "net/accuracy": "waiting"}
    assert [event.state for event in apply(state, "net/full", "started")] == ["running"]
    record = {"top1_error": 0.5, "best_epoch": 0, "seconds": 1.0}
    finish(opened, record)
    [finished] = apply(state, "net/full", "done")
    assert isinstance(finished, Changed)
    assert (finished.state, finished.record, finished.seconds is not None) == ("finished", record, True)
    assert stated(opened) == {"net/full": "finished", "net/accuracy": "waiting"}
    assert state.jobs_in("finished") == ["net/full"]
    assert "| net/full | finished | 50.00% | 1 |" in state.table()


def test_a_failure_names_its_cause_and_what_it_keeps_from_running(state: RunState, opened: Opened) -> None:
    apply(state, "net/full", "started")
    [failed] = apply(state, "net/full", "failed", "ValueError: no")
    [lost] = apply(state, "net/accuracy", "dropped", "net/full")
    assert (failed.state, failed.detail) == ("failed", "ValueError: no")
    assert (lost.state, lost.detail) == ("not_run", "net/full failed")
    assert stated(opened) == {"net/full": "failed", "net/accuracy": "not_run"}
    assert told(opened).reasons == {"net/full": "ValueError: no", "net/accuracy": "net/full failed"}
    assert "| net/full | failed: ValueError: no |" in state.table()
    assert "| net/accuracy | not run: net/full failed |" in state.table()


def test_a_run_that_trains_nothing_keeps_what_has_failed_and_why(state: RunState, opened: Opened) -> None:
    apply(state, "net/full", "started")
    apply(state, "net/full", "failed", "ValueError: no")
    apply(state, "net/accuracy", "dropped", "net/full")
    before = told(opened)
    assert list(RunState(opened, before).reuse()) == []
    assert (told(opened).states, told(opened).reasons) == (before.states, before.reasons)
    list(RunState(opened).reuse())
    assert (told(opened).states["net/full"], told(opened).reasons) == ("waiting", {"net/accuracy": "net/full"})
    finish(opened, {"top1_error": 0.5, "best_epoch": 0, "seconds": 1.0})
    assert RunState(opened, before).jobs_in("reused") == ["net/full"]


def test_a_waiting_job_says_what_for_until_it_runs(state: RunState, opened: Opened) -> None:
    list(state.reuse())
    assert told(opened).reasons == {"net/accuracy": "net/full"}
    assert "| net/accuracy | waiting for net/full |" in state.table()
    finish(opened, {"top1_error": 0.5, "best_epoch": 0, "seconds": 1.0})
    apply(state, "net/full", "started")
    apply(state, "net/full", "done")
    apply(state, "net/accuracy", "started")
    assert told(opened).reasons == {}


def test_what_a_job_waits_for_is_what_the_scheduler_says_and_no_event(state: RunState, opened: Opened) -> None:
    assert apply(state, "net/full", "waiting", "waiting for 2 GPUs") == []
    assert told(opened).reasons["net/full"] == "2 GPUs"
    assert "| net/full | waiting for 2 GPUs |" in state.table()


def test_a_paused_job_waits_and_its_task_is_gone(state: RunState) -> None:
    apply(state, "net/full", "started", "", ("a",))
    [paused] = apply(state, "net/full", "paused")
    assert (paused.state, paused.detail) == ("waiting", "other ranks, to go on with them")
    assert state.standing().tasks == ()


def test_a_job_may_be_paused_before_it_has_begun(state: RunState) -> None:
    [paused] = apply(state, "net/full", "paused")
    assert paused.state == "waiting"


def test_how_a_run_stands_is_told_once_a_second_and_is_what_its_file_says(state: RunState, opened: Opened) -> None:
    state.nodes = (Node("a", Resources(2, 0)),)
    apply(state, "net/full", "started", "", ("a", "a"))
    found = [event for _ in range(50) for event in state.reports()]
    assert found == [state.standing()], "fifty looks take no second"
    assert isinstance(found[0], Standing)
    assert told(opened) == found[0]
    assert [(task.name, task.world_size) for task in found[0].tasks] == [("net/full", 2)]


def test_a_prediction_is_a_task_and_its_failure_is_its_jobs(state: RunState) -> None:
    [begun] = apply(state, "net/accuracy test", "started", "", ("a",))
    assert isinstance(begun, Task)
    assert (begun.name, begun.kind, begun.job, begun.until) == (
        "net/accuracy test",
        "prediction",
        "net/accuracy",
        None,
    )
    assert state.standing().running == [begun]
    [ended] = apply(state, "net/accuracy test", "done")
    assert ended == replace(begun, until=ended.until)
    assert ended.until >= begun.since
    assert state.standing().running == []
    assert apply(state, "net/accuracy test", "dropped", "net/full") == []
    assert state.states["net/accuracy"] == "waiting"
    apply(state, "net/accuracy test", "started")
    [_, failed] = apply(state, "net/accuracy test", "failed", "it holds NaN")
    assert (failed.job, failed.state, failed.detail) == ("net/accuracy", "failed", "test: it holds NaN")


def test_every_epoch_of_this_run_is_reported_once_and_whole(opened: Opened, state: RunState) -> None:
    epoch(opened, 0)
    state = RunState(opened)  # of a later driver: what lies there was reported by an earlier one
    assert reported(state) == [], "it does not run yet"
    apply(state, "net/full", "started")
    line = epoch(opened, 1, end="")
    assert reported(state) == [], "half a line"
    with (opened.job_folder("net/full") / "metrics.jsonl").open("a") as lines:
        lines.write("\n{torn\n")
    assert reported(state) == [Reported("net/full", line)]
    assert reported(state) == []


def test_what_was_finished_before_is_reused_from_the_first_look_on(opened: Opened) -> None:
    record = {"top1_error": None, "best_epoch": 1, "seconds": 1.0}
    finish(opened, record)
    state = RunState(opened)
    assert state.states == {"net/full": "reused", "net/accuracy": "waiting"}, "MLflow may be shown this at once"
    assert list(state.reuse()) == [Changed("net/full", "reused", "", record)]
    assert stated(opened) == {"net/full": "reused", "net/accuracy": "waiting"}


def test_an_ensemble_that_fails_fails_the_plan(state: RunState) -> None:
    apply(state, "ensemble", "started")
    assert [event.name for event in apply(state, "ensemble", "failed", "it holds NaN")] == ["ensemble"]
    assert state.failure == "it holds NaN"
    assert state.jobs_in("failed") == []


def test_a_job_that_another_driver_has_made_meanwhile_is_reused(opened: Opened, state: RunState) -> None:
    apply(state, "net/full", "waiting", "waiting for a host")
    assert state.standing().reasons["net/full"] == "a host"
    finish(opened, {"best_epoch": 1, "top1_error": 0.5})
    assert [event.state for event in apply(state, "net/full", "started") if isinstance(event, Changed)] == ["reused"]
    assert apply(state, "net/full", "done") == []
    assert state.jobs_in("reused") == ["net/full"]


def test_what_another_driver_finishes_before_anything_is_begun_here_is_reused_once(
    opened: Opened, state: RunState
) -> None:
    finish(opened, {"best_epoch": 1, "top1_error": 0.5})
    assert [(event.job, event.state) for event in state.reuse("waiting") if isinstance(event, Changed)] == [
        ("net/full", "reused")
    ]
    assert state.states["net/full"] == "reused"
    assert list(state.reuse("waiting")) == []


def test_attempts_that_ended_are_kept_by_this_run_and_the_next(state: RunState, opened: Opened) -> None:
    for change in ("started", "paused", "started", "failed"):
        apply(state, "net/full", change, "", ("a", "b") if change == "started" else ())
    assert [(task.world_size, task.until is not None) for task in told(opened).past] == [(2, True)]
    again = RunState(opened)
    apply(again, "net/full", "started", "", ("a",))
    standing = told(opened)
    assert [task.world_size for task in standing.past] == [2, 2]
    assert [(task.world_size, task.until) for task in standing.tasks] == [(1, None)]

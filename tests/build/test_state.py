"""The state of a run: what a change of a target means for its job, events, the file that `aliprod status` reads."""

import json
from pathlib import Path
from typing import Any

import pytest

from aliprod.build.events import Changed, Event, Reported
from aliprod.build.graph import targets
from aliprod.build.schedule import Change
from aliprod.build.state import RunState
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
    return dict(json.loads((opened.folder / "state.json").read_text())["jobs"])


def test_a_job_is_waiting_running_finished(state: RunState, opened: Opened) -> None:
    assert list(state.reuse()) == []
    assert stated(opened) == {"net/full": "waiting", "net/accuracy": "waiting"}
    assert [event.state for event in apply(state, "net/full", "started")] == ["running"]
    record = {"top1_error": 0.5, "best_epoch": 0, "seconds": 1.0}
    finish(opened, record)
    [finished] = apply(state, "net/full", "done")
    assert finished == Changed("net/full", "finished", "", record)
    assert stated(opened) == {"net/full": "finished", "net/accuracy": "waiting"}
    assert state.jobs_in("finished") == ["net/full"]
    assert "| net/full | finished | 50.00% | 0 |" in state.table()


def test_a_failure_names_its_cause_and_what_it_keeps_from_running(state: RunState, opened: Opened) -> None:
    apply(state, "net/full", "started")
    [failed] = apply(state, "net/full", "failed", "ValueError: no")
    [lost] = apply(state, "net/accuracy", "dropped", "net/full")
    assert (failed.state, failed.detail) == ("failed", "ValueError: no")
    assert (lost.state, lost.detail) == ("not_run", "net/full failed")
    assert stated(opened) == {"net/full": "failed", "net/accuracy": "not_run"}


def test_a_prediction_shows_when_it_fails_and_only_then(state: RunState) -> None:
    assert [*apply(state, "net/accuracy test", "started"), *apply(state, "net/accuracy test", "done")] == []
    assert (apply(state, "net/accuracy test", "dropped", "net/full")) == []
    assert state.states["net/accuracy"] == "waiting"
    [failed] = apply(state, "net/accuracy test", "failed", "it holds NaN")
    assert (failed.job, failed.state, failed.detail) == ("net/accuracy", "failed", "test: it holds NaN")


def test_every_epoch_of_this_run_is_reported_once_and_whole(opened: Opened, state: RunState) -> None:
    epoch(opened, 0)
    state = RunState(opened)  # of a later driver: what lies there was reported by an earlier one
    assert list(state.reports()) == [], "it does not run yet"
    apply(state, "net/full", "started")
    line = epoch(opened, 1, end="")
    assert list(state.reports()) == [], "half a line"
    with (opened.job_folder("net/full") / "metrics.jsonl").open("a") as lines:
        lines.write("\n{torn\n")
    assert list(state.reports()) == [Reported("net/full", line)]
    assert list(state.reports()) == []


def test_what_was_finished_before_is_reused(opened: Opened, state: RunState) -> None:
    record = {"top1_error": None, "best_epoch": 1, "seconds": 1.0}
    finish(opened, record)
    assert list(state.reuse()) == [Changed("net/full", "reused", "", record)]
    assert stated(opened) == {"net/full": "reused", "net/accuracy": "waiting"}


def test_an_ensemble_that_fails_fails_the_plan(state: RunState) -> None:
    assert apply(state, "ensemble", "failed", "it holds NaN") == []
    assert state.failure == "it holds NaN"
    assert state.jobs_in("failed") == []


def test_a_job_that_another_driver_has_made_meanwhile_is_reused(opened: Opened, state: RunState) -> None:
    [told] = apply(state, "net/full", "waiting", "for a host")
    assert told == Changed("net/full", "waiting", "for a host", {})
    finish(opened, {"best_epoch": 1, "top1_error": 0.5})
    assert [event.state for event in apply(state, "net/full", "started") if isinstance(event, Changed)] == ["reused"]
    assert apply(state, "net/full", "done") == []
    assert state.jobs_in("reused") == ["net/full"]

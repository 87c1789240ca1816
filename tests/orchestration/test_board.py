"""What becomes of a task's change: the job's state, events, the file that `aliprod status` reads."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aliprod.catalogue import sources
from aliprod.orchestration.board import Board
from aliprod.orchestration.prepare import Prepared
from aliprod.orchestration.scheduler import Change
from aliprod.plan import graph
from aliprod.plan.events import Changed, Reported
from aliprod.plan.load import load
from aliprod.plan.open import Request
from aliprod.plan.places import resolve
from aliprod.store import commit
from aliprod.synth.synth import synthesise
from aliprod.tracking.sync import Tracking

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
def prepared(tmp_path: Path) -> Prepared:
    (tmp_path / "plan.toml").write_text(PLAN)
    synthesise(tmp_path / "photos", classes=2, images=10, seed=0)
    plan = load(tmp_path / "plan.toml")
    catalogue = sources.read(tmp_path / "photos")
    jobs = graph.jobs(plan, catalogue.fingerprint)
    request = Request(plan, PLAN, resolve(plan, tmp_path / "runs", None, None))
    return Prepared(request, catalogue, jobs, tuple(jobs))


@pytest.fixture(scope="module")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A database after its migrations, which take seconds."""
    folder = tmp_path_factory.mktemp("migrated")
    Tracking.connect(f"sqlite:///{folder / 'mlflow.db'}", "other", folder / "mlartifacts")
    return (folder / "mlflow.db").read_bytes()


@pytest.fixture
def board(prepared: Prepared, migrated: bytes) -> Iterator[Board]:
    places, said = prepared.places, list[str]()
    places.storage.mkdir()
    (places.storage / "mlflow.db").write_bytes(migrated)
    tracking = Tracking.connect(places.tracking_uri, "shop", places.artifacts, said.append)
    yield Board(prepared, tracking)
    assert tracking.flush(60) == said == [], "MLflow was sent all of it"


def finish(prepared: Prepared, record: dict[str, Any]) -> None:
    """Commit weights, as a job's training would."""

    def fill(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"weights")
        (folder / "config.json").write_text(json.dumps({"epoch": record["best_epoch"], "top1_error": None}))

    commit.write(prepared.job_folder("net/full") / "weights", fill, record)


def epoch(prepared: Prepared, number: int, end: str = "\n") -> dict[str, float]:
    """Append an epoch to a job's metrics, as its training would."""
    line = {"epoch": number, "time_ms": 1_700_000_000_000 + number, "val/top1_error": 0.5}
    file = prepared.job_folder("net/full") / "metrics.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as lines:
        lines.write(json.dumps(line) + end)
    return line


def told(prepared: Prepared) -> dict[str, str]:
    return dict(json.loads((prepared.folder / "state.json").read_text())["jobs"])


def test_a_job_is_waiting_running_finished(board: Board, prepared: Prepared) -> None:
    assert list(board.reuse()) == []
    assert told(prepared) == {"net/full": "waiting", "net/accuracy": "waiting"}
    assert [event.state for event in board.tell(Change("net/full", "started"))] == ["running"]
    record = {"top1_error": 0.5, "best_epoch": 0, "seconds": 1.0}
    finish(prepared, record)
    [finished] = board.tell(Change("net/full", "done"))
    assert finished == Changed("net/full", "finished", "", record)
    assert told(prepared) == {"net/full": "finished", "net/accuracy": "waiting"}
    assert board.jobs_in("finished") == ["net/full"]
    assert "| net/full | finished | 50.00% | 0 |" in board.table()


def test_a_failure_names_its_cause_and_what_it_keeps_from_running(board: Board, prepared: Prepared) -> None:
    list(board.tell(Change("net/full", "started")))
    [failed] = board.tell(Change("net/full", "failed", "ValueError: no"))
    [lost] = board.tell(Change("net/accuracy", "dropped", "net/full"))
    assert (failed.state, failed.detail) == ("failed", "ValueError: no")
    assert (lost.state, lost.detail) == ("not_run", "net/full failed")
    assert told(prepared) == {"net/full": "failed", "net/accuracy": "not_run"}


def test_a_prediction_shows_when_it_fails_and_only_then(board: Board) -> None:
    assert [*board.tell(Change("net/accuracy test", "started")), *board.tell(Change("net/accuracy test", "done"))] == []
    assert list(board.tell(Change("net/accuracy test", "dropped", "net/full"))) == []
    assert board.states["net/accuracy"] == "waiting"
    [failed] = board.tell(Change("net/accuracy test", "failed", "it holds NaN"))
    assert (failed.job, failed.state, failed.detail) == ("net/accuracy", "failed", "test: it holds NaN")


def test_every_epoch_of_this_run_is_reported_once_and_whole(prepared: Prepared, board: Board) -> None:
    epoch(prepared, 0)
    board = Board(prepared, board.tracking)  # a later driver: what lies there was told by an earlier one
    assert list(board.reports()) == [], "it does not run yet"
    list(board.tell(Change("net/full", "started")))
    line = epoch(prepared, 1, end="")
    assert list(board.reports()) == [], "half a line"
    with (prepared.job_folder("net/full") / "metrics.jsonl").open("a") as lines:
        lines.write("\n{torn\n")
    assert list(board.reports()) == [Reported("net/full", line)]
    assert list(board.reports()) == []


def test_what_was_finished_before_is_reused(prepared: Prepared, board: Board) -> None:
    record = {"top1_error": None, "best_epoch": 1, "seconds": 1.0}
    finish(prepared, record)
    later = Prepared(prepared.request, prepared.catalogue, prepared.jobs, ("net/accuracy",))
    [reused] = Board(later, board.tracking).reuse()
    assert reused == Changed("net/full", "reused", "", record)
    assert told(prepared) == {"net/full": "reused", "net/accuracy": "waiting"}

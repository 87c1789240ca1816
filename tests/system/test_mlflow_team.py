"""MLflow as a team has it, with PostgreSQL, passwords and artifacts in a bucket, while much goes wrong: all is counted.

Beside it, since that mostly waits, a SQLite that another process keeps locked.
"""

import json
import os
import shutil
import signal
import sqlite3
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from services import PROGRAMS, Postgres, Proxy

from aliprod.build.events import JobState
from aliprod.errors import Unreachable
from aliprod.plan.jobs import Job
from aliprod.recipe import Stage
from aliprod.store import commit
from aliprod.store.bucket import opened
from aliprod.store.layout import job_place
from aliprod.tracking.runs import JobProgress, PlanProgress
from aliprod.tracking.server import connect
from aliprod.tracking.sync import Tracking
from tests.conftest import s3_environment

if PROGRAMS is None:
    pytest.skip("needs PostgreSQL: Debian's package postgresql", allow_module_level=True)

import psycopg

ROOT = Path(__file__).resolve().parents[2]
PASSWORD = "correct-horse-battery"
ARTIFACTS = f"s3://team/{uuid.uuid4().hex}"
OUTAGE = float(os.environ.get("ALIPROD_OUTAGE_SECONDS", "0"))  # that each fault goes on, once it was noticed
FAULTS, EACH = 5, 10  # and how many epochs are trained before them, and while each lasts
METRICS = ("train/class", "train/loss", "val/top1_error")
POINTS = """SELECT kind.value, point.key, point.step FROM metrics point
    JOIN tags kind ON kind.run_uuid = point.run_uuid AND kind.key = 'aliprod.kind' WHERE kind.value <> 'plan'"""
COUNTED = {
    "runs": "SELECT count(*) FROM runs",
    "versions": "SELECT count(*) FROM model_versions",
    "files": "SELECT count(*) FROM logged_models WHERE lifecycle_stage = 'active'",
}


@dataclass
class Training:
    """A job that leaves one epoch after the other in a storage path, and a driver that shows them."""

    storage: Path
    tracking: Tracking
    epochs: int = 0
    slowest: float = 0.0  # call, in seconds

    def train(self, epochs: int, state: JobState = "running") -> None:
        job = Job("b/full", "b", "resnet50.tv_in1k", "full", Stage(), (), None, (), (), True, {"digit": "a"})
        folder = self.storage / job_place(job.name, str(job.key))
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "metrics.jsonl").open("a") as log:
            for epoch in range(self.epochs, self.epochs + epochs):
                values = dict.fromkeys(METRICS, 1 / (1 + epoch))
                log.write(json.dumps({"epoch": epoch, "time_ms": 1_700_000_000_000 + epoch} | values) + "\n")
        self.epochs += epochs
        if state == "finished":
            commit.write(folder / "weights", self._fill, {})
        began = time.monotonic()
        shown = (JobProgress(job, folder, state),)
        self.tracking.show(PlanProgress('name = "shop"\n', "0" * 64, "RUNNING", "| job |\n|---|\n", shown))
        self.slowest = max(self.slowest, time.monotonic() - began)

    def _fill(self, folder: Path) -> None:
        (folder / "model.safetensors").write_text("weights")
        (folder / "config.json").write_text(json.dumps({"epoch": self.epochs - 1, "top1_error": 0.5}))
        (folder / "classes.json").write_text("{}")


@dataclass
class Story:
    """What a driver said and did not send, and what its database holds afterwards."""

    lines: list[str]
    unsent: list[str]
    slowest: float
    lost: int
    points: Counter[tuple[str, str, int]]
    counted: dict[str, int]


@pytest.fixture(scope="module")
def stories(
    servers: Any, s3: str, free_ports: Callable[[int], list[int]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Story]]:
    ports, folder = free_ports(3), Path(tempfile.mkdtemp(prefix="pg-"))
    store = {"PGHOST": "127.0.0.1", "PGPORT": str(ports[0]), "PGUSER": "mlflow"}
    secrets = {"MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD, "MLFLOW_FLASK_SERVER_SECRET_KEY": "session"}
    environment = store | secrets | {"MLFLOW_AUTH_CONFIG_PATH": str(ROOT / "docker" / "mlflow.ini")}
    environment |= s3_environment(s3)
    basic = ("--app-name", "basic-auth", "--artifacts-destination", ARTIFACTS)
    server = servers(tmp_path_factory.mktemp("team"), ports[1], "postgresql+psycopg:///mlflow", basic, environment)
    with ExitStack() as ending:
        postgres = Postgres(folder, ports[0])
        ending.callback(shutil.rmtree, folder)
        postgres.start()
        ending.callback(postgres.signal, signal.SIGKILL)
        server.start()
        ending.callback(server.signal, signal.SIGKILL)
        proxy = ending.enter_context(Proxy(ports[2], ports[1]))
        ending.callback(proxy.shutdown)
        patch = ending.enter_context(pytest.MonkeyPatch.context())
        with pytest.raises(Unreachable, match="not authenticated") as stranger:
            Tracking(f"http://127.0.0.1:{ports[2]}", "shop", None)
        assert "MLFLOW_TRACKING_PASSWORD" in stranger.value.advice
        patch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        patch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
        connect(f"http://127.0.0.1:{ports[2]}", "shop", None)  # its first file takes the server seconds
        patch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
        with locked(tmp_path_factory.mktemp("locked")) as alone:
            team = suffered(tmp_path_factory.mktemp("storage"), server, postgres, proxy)
        with closing(psycopg.connect(host="127.0.0.1", port=ports[0], user="mlflow", dbname="mlflow")) as database:
            points, counted = held(database)
        yield {"team": Story(*team, proxy.lost, points, counted), "alone": alone[0]}


def suffered(storage: Path, server: Any, postgres: Postgres, proxy: Proxy) -> tuple[list[str], list[str], float]:
    """Train through every fault, each as long as it takes to be noticed, and finish in the last."""
    lines: list[str] = []
    training = Training(storage, Tracking(f"http://127.0.0.1:{proxy.server_port}", "shop", None, lines.append))
    training.train(EACH)
    assert training.tracking.flush(60) == []
    well = partial(setattr, proxy, "fault", "")
    faults: list[tuple[Callable[[], None], Callable[[], None]]] = [
        (partial(server.signal, signal.SIGSTOP), partial(server.signal, signal.SIGCONT)),
        (partial(postgres.signal, signal.SIGSTOP), partial(postgres.signal, signal.SIGCONT)),
        (partial(postgres.signal, signal.SIGKILL), postgres.start),
        (partial(setattr, proxy, "fault", "refuse"), well),
        (partial(setattr, proxy, "fault", "lose"), well),
    ]
    for number, (begin, end) in enumerate(faults, start=1):
        begin()
        training.train(EACH, "finished" if number == FAULTS else "running")
        until(lambda told=2 * number - 1: len(lines) >= told)
        time.sleep(OUTAGE)
        end()
        unsent = training.tracking.flush(60 + OUTAGE)
    return lines, unsent, training.slowest


@contextmanager
def locked(storage: Path) -> Iterator[list[Story]]:
    """A driver whose SQLite is locked from its second epochs on until the block ends; its story is there then."""
    lines: list[str] = []
    told: list[Story] = []
    training = Training(storage, Tracking(f"sqlite:///{storage}/mlflow.db", "shop", storage / "a", lines.append))
    training.train(EACH)
    assert training.tracking.flush(60) == []
    with closing(sqlite3.connect(storage / "mlflow.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        training.train(EACH)
        yield told
        other.execute("ROLLBACK")
    unsent = training.tracking.flush(60)
    with closing(sqlite3.connect(storage / "mlflow.db")) as database:
        told.append(Story(lines, unsent, training.slowest, 0, *held(database)))


def held(database: Any) -> tuple[Counter[tuple[str, str, int]], dict[str, int]]:
    """The points of all jobs' runs, each as often as it is there, and how many of other things there are."""
    cursor = database.cursor()

    def rows(query: str) -> list[tuple[Any, ...]]:
        cursor.execute(query)
        return list(cursor.fetchall())

    return Counter(rows(POINTS)), {name: rows(query)[0][0] for name, query in COUNTED.items()}


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 90
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_no_call_waits_for_what_is_wrong(stories: dict[str, Story]) -> None:
    assert max(story.slowest for story in stories.values()) < 0.2


def test_each_fault_is_told_when_it_comes_and_when_it_goes(stories: dict[str, Story]) -> None:
    told = [line.split(" (")[0].split(";")[0] for line in stories["team"].lines]
    assert told == FAULTS * ["MLflow is away", "MLflow is back"]
    assert stories["team"].lost > 0


@pytest.mark.usefixtures("stories")
def test_the_files_of_its_weights_are_in_the_bucket(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3_environment(s3).items():
        monkeypatch.setenv(name, value)
    opened.cache_clear()
    bucket, _, folder = ARTIFACTS.rpartition("/")
    held = opened(bucket)
    files = {key.rpartition("/")[2]: held.get(key)[0] for key in held.list(folder)}
    assert files["model.safetensors"] == b"weights"


@pytest.mark.parametrize(("kind", "epochs"), [("team", (1 + FAULTS) * EACH), ("alone", 2 * EACH)])
def test_every_run_key_and_step_is_there_exactly_once(stories: dict[str, Story], kind: str, epochs: int) -> None:
    story = stories[kind]
    assert story.unsent == []
    expected = [("job", name, step) for name in (*METRICS, "best/top1_error") for step in range(1, epochs + 1)]
    assert story.points == Counter(expected)
    weights = int(kind == "team")  # the other job still runs
    assert story.counted == {"runs": 2, "versions": weights, "files": weights}  # the plan's run and the job's

"""A real `mlflow server` on loopback, killed and started again while jobs train, and frozen."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from mlflow import MlflowClient

from aliprod.build.events import JobState
from aliprod.errors import Unreachable
from aliprod.plan.jobs import Job
from aliprod.recipe import Stage
from aliprod.store import commit
from aliprod.store.layout import job_place
from aliprod.tracking.runs import JobProgress, PlanProgress
from aliprod.tracking.sync import Tracking

EPOCHS = 60


@dataclass
class Story:
    """One outage: what two drivers saw of it, and what MLflow shows afterwards."""

    storage: Path
    uri: str
    jobs: dict[str, Job]
    lines: list[str] = field(default_factory=list)
    slowest_call: float = 0.0
    unsent_while_away: list[str] = field(default_factory=list)
    unsent_after: list[str] = field(default_factory=list)
    dead_drivers_unsent: list[str] = field(default_factory=list)

    def write(self, name: str, until: int) -> Path:
        """What the training of a job leaves in the storage path; weights at the end, the best epoch being the last."""
        folder = self.storage / job_place(name, str(self.jobs[name].key))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record(epoch)) + "\n" for epoch in range(until)))
        if until == EPOCHS:
            commit.write(folder / "weights", lambda staging: fill(staging, name), {})
        return folder

    def history(self, name: str) -> list[tuple[int, int, float]]:
        client = MlflowClient(self.uri)
        run = self.run(name)
        points = client.get_metric_history(run.info.run_id, "train/class") if run else []
        return sorted((point.step, point.timestamp, point.value) for point in points)

    def run(self, name: str):
        client = MlflowClient(self.uri)
        experiment = client.get_experiment_by_name("shop").experiment_id
        runs = client.search_runs([experiment], f"tags.`aliprod.job` = '{name}'")
        assert len(runs) < 2
        return runs[0] if runs else None


def record(epoch: int) -> dict[str, float]:
    return {"epoch": epoch, "time_ms": 1_700_000_000_000 + epoch, "train/class": 2.0 - epoch, "val/top1_error": 0.5}


def fill(folder: Path, content: str) -> None:
    (folder / "model.safetensors").write_text(content)
    (folder / "config.json").write_text(json.dumps({"epoch": EPOCHS - 1, "top1_error": 0.5}))
    (folder / "classes.json").write_text("{}")


def job(name: str, digit: str) -> Job:
    backbone, stage = name.split("/")
    network = "resnet50.tv_in1k"
    return Job(name, backbone, network, stage, Stage(), (), None, (), (), True, {"digit": digit})


def shown(*jobs: JobProgress) -> PlanProgress:
    return PlanProgress('name = "shop"\n', "0" * 64, "RUNNING", "| job |\n|---|\n", jobs)


DRIVER = """
    import json, sys
    from pathlib import Path
    from aliprod.plan.jobs import Job
    from aliprod.recipe import Stage
    from aliprod.tracking.runs import JobProgress, PlanProgress
    from aliprod.tracking.sync import Tracking

    uri, folder = sys.argv[1:]
    job = Job("resnet50/dcl", "resnet50", "resnet50.tv_in1k", "dcl", Stage(), (), None, (), (), True, {"digit": "b"})
    tracking = Tracking(uri, "shop", None, sys.stderr.write)
    show = lambda state: tracking.show(
        PlanProgress("", "1" * 64, "RUNNING", "", (JobProgress(job, Path(folder), state),))
    )
    show("running")
    assert tracking.flush(60) == []
    print("sent", flush=True)
    input()  # meanwhile the server is killed
    show("finished")
    print(json.dumps(tracking.flush(1)), flush=True)
"""


@pytest.fixture(scope="module")
def story(server: Any, tmp_path_factory: pytest.TempPathFactory) -> Story:
    """Two drivers train a job each; the server is killed; one driver ends before it is back, the other after."""
    jobs = {"resnet50/full": job("resnet50/full", "a"), "resnet50/dcl": job("resnet50/dcl", "b")}
    story = Story(tmp_path_factory.mktemp("storage"), server.uri, jobs)
    full, dcl = jobs["resnet50/full"], jobs["resnet50/dcl"]
    others = story.write(dcl.name, 5)
    tracking = Tracking(server.uri, "shop", None, story.lines.append)
    dead = subprocess.Popen(
        [sys.executable, "-c", dedent(DRIVER), server.uri, str(others)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert dead.stdin is not None
    assert dead.stdout is not None
    assert dead.stdout.readline() == "sent\n"

    def show(state: JobState, until: int) -> None:
        folder = story.write(full.name, until)
        began = time.monotonic()
        tracking.show(shown(JobProgress(full, folder, state)))
        story.slowest_call = max(story.slowest_call, time.monotonic() - began)

    for epoch in range(EPOCHS // 2):
        show("running", epoch + 1)
    while not story.history("resnet50/full"):
        time.sleep(0.02)
    server.signal(signal.SIGKILL)
    for epoch in range(EPOCHS // 2, EPOCHS):
        show("running", epoch + 1)
    show("finished", EPOCHS)
    story.unsent_while_away = tracking.flush(2)
    story.write(dcl.name, EPOCHS)
    out, _ = dead.communicate("\n", timeout=60)
    story.dead_drivers_unsent = json.loads(out)

    server.start()
    story.unsent_after = tracking.flush(90)
    later = Tracking(server.uri, "shop", None, story.lines.append)
    later.show(shown(JobProgress(dcl, others, "reused")))
    story.unsent_after += later.flush(90)
    return story


def test_no_call_waits_for_mlflow(story):
    assert story.slowest_call < 0.2


def test_the_outage_is_told_in_two_lines_and_in_what_is_unsent(story):
    assert [line.split(" (")[0].split(";")[0] for line in story.lines] == ["MLflow is away", "MLflow is back"]
    assert "resnet50/full: MLflow is away" in story.unsent_while_away
    assert "resnet50/dcl: MLflow is away" in story.dead_drivers_unsent
    assert story.unsent_after == []


@pytest.mark.parametrize("name", ["resnet50/full", "resnet50/dcl"])
def test_every_point_arrived_once_at_the_time_it_was_taken(story, name):
    expected = [(epoch + 1, 1_700_000_000_000 + epoch, 2.0 - epoch) for epoch in range(EPOCHS)]
    assert story.history(name) == expected


@pytest.mark.parametrize("name", ["resnet50/full", "resnet50/dcl"])
def test_each_job_is_complete_with_one_version_that_comes_back_byte_for_byte(story, name, tmp_path):
    folder = story.storage / job_place(name, str(story.jobs[name].key))
    run = story.run(name)
    assert run.data.tags["aliprod.result"] == commit.digest(folder / "weights")
    assert run.info.status == "FINISHED"
    versions = MlflowClient(story.uri).search_model_versions(f"name = 'shop.{name.replace('/', '.')}'")
    assert [(version.tags["checkpoint"], version.tags["epoch"]) for version in versions] == [("best, last", "60")]
    tracking = Tracking(story.uri, "shop", None)
    choice = tracking.registry.members([name])[name]
    tracking.registry.download(choice, tmp_path / "got")
    assert commit.digest(tmp_path / "got") == commit.digest(folder / "weights")


def test_a_frozen_server_is_told_within_its_time_limit(server, story, monkeypatch):
    tracking = Tracking(server.uri, "shop", None)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    server.signal(signal.SIGSTOP)
    try:
        with pytest.raises(Unreachable, match="no answer in time"):
            tracking.registry.members(["resnet50/full"])
        began = time.monotonic()
        with pytest.raises(Unreachable, match="no answer in time") as told:
            Tracking(server.uri, "shop", None)
        assert told.value.status == 3
        assert time.monotonic() - began < 6
    finally:
        server.signal(signal.SIGCONT)

"""The command line for a cluster: `ray job submit`, and what the dashboard then shows."""

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from aliprod.store.epochs import pace, read
from aliprod.store.layout import METRICS, newest_step
from aliprod.tracking.server import reach

ROOT = Path(__file__).resolve().parents[2]
ONE_JOB = ("--set", 'jobs={efficientnet=["full"]}', "--set", 'ensemble.members=["efficientnet/full"]')


@pytest.fixture
def submit(cluster: Any) -> Any:
    """Submit a command with this checkout as its working folder."""

    def submitted(*entrypoint: str | Path) -> subprocess.CompletedProcess[str]:
        runtime = ("--working-dir", ".", "--runtime-env", "jobs/runtime_env.yaml")
        command = ["ray", "job", "submit", "--address", cluster.dashboard, *runtime, "--", *map(str, entrypoint)]
        environment = cluster.environment
        return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=900)  # noqa: PLW1510

    return submitted


def test_a_submitted_plan_is_run_and_shown_and_says_where_its_results_are(
    submit: Any, cluster: Any, plan: Path
) -> None:
    done = submit("python", "jobs/run_plan.py", plan, *ONE_JOB)
    results = cluster.home / "aliprod"
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"No --storage given: results go to {results}" in done.stdout
    assert json.loads((results / "tiny" / "result.json").read_text())["trained"] == ["efficientnet/full"]
    assert (results / "tiny" / "submission.csv").is_file()

    jobs = [job for job in cluster.ask("/api/jobs/") if "run_plan.py" in (job["entrypoint"] or "")]
    tasks = cluster.ask("/api/v0/tasks?limit=9999&detail=1")["data"]["result"]["result"]
    runs = cluster.ask("/api/train/v2/runs/v1")["train_runs"]
    names = {task["name"] for task in tasks if task["job_id"] == jobs[-1]["job_id"]}
    here = [run for run in runs if str(results) in run["run_settings"]["run_config"]["storage_path"]]
    assert {"efficientnet/full", "efficientnet/full test", "ensemble"} <= names
    assert [(run["name"].rpartition("-")[0], run["status"]) for run in here] == [("efficientnet.full", "FINISHED")]

    again = submit("python", "jobs/ensemble.py", plan, *ONE_JOB, "--storage", results, "--json")
    assert again.returncode == 0, again.stdout + again.stderr
    assert '"submission": ' in again.stdout


def test_a_job_that_is_stopped_ends_soon_with_a_checkpoint_and_leaves_nothing_behind(
    cluster: Any, plan: Path, tmp_path: Path
) -> None:
    long = (
        "--set",
        "stages.full.epochs=1000",
        "--set",
        "cluster.save_every_steps=100000",
    )  # none but the one asked for
    runtime = ("--working-dir", ".", "--runtime-env", "jobs/runtime_env.yaml")
    command = ("python", "jobs/run_plan.py", plan, "--storage", tmp_path, *ONE_JOB, *long)
    ray = ("ray", "job", "submit", "--address", cluster.dashboard, "--submission-id", "stopped", "--no-wait")
    environment: dict[str, Any] = {"env": cluster.environment, "cwd": ROOT, "capture_output": True, "text": True}
    before = cluster.left()
    subprocess.run([*ray, *runtime, "--", *map(str, command)], check=True, **environment)
    cluster.until(lambda: list(tmp_path.glob(f"jobs/*/*/*/{METRICS}")))
    [folder] = tmp_path.glob("jobs/*/*/*")
    step = 8 / min(line["speed/images_per_second"] for line in read(folder / METRICS))  # seconds of a batch
    [driver] = (one for one in psutil.process_iter() if str(tmp_path) in _arguments(one) and "python" in one.name())
    began = time.monotonic()
    cluster.ask("/api/jobs/stopped/stop", "POST")  # as `ray job stop` does
    assert psutil.wait_procs([driver], timeout=60)[1] == []
    assert time.monotonic() - began < step + 10
    cluster.until(lambda: cluster.left() == before, seconds=30)
    job = cluster.ask("/api/jobs/stopped")
    assert job["status"] == "STOPPED", job
    assert (newest_step(folder) or 0) >= 8 * len(read(folder / METRICS)) > 0
    assert (newest_step(folder) or 0) >= (pace(folder) or {})["step"], "no step that was told of is lost"
    client = reach(f"sqlite:///{tmp_path / 'mlflow.db'}").client
    runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    assert {run.info.status for run in runs} == {"KILLED"}


def test_a_submitted_plan_that_is_wrong_fails_with_a_sentence(submit: Any, plan: Path) -> None:
    done = submit("python", "jobs/run_plan.py", plan, "--set", "stages.full.epohcs=1")
    assert done.returncode == 1
    assert "Did you mean epochs?" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def _arguments(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []

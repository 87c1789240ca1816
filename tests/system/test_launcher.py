"""The launcher is killed while jobs train: Ray starts it anew, and the jobs go on from their checkpoints."""

import json
from pathlib import Path
from typing import Any

import psutil

from aliprod.store import commit


def launchers(cluster: Any) -> list[dict[str, Any]]:
    actors = cluster.ask("/api/v0/actors?limit=999&detail=1")["data"]["result"]["result"]
    return [actor for actor in actors if actor["class_name"] == "Launcher" and actor["state"] == "ALIVE"]


def test_a_killed_launcher_is_replaced_and_its_jobs_go_on(cluster: Any, plan: Path, tmp_path: Path) -> None:
    sets = ('jobs.resnet=["full"]', 'ensemble.members=["resnet/full", "efficientnet/full"]')
    few = [word for one in sets for word in ("--set", one)]
    process = cluster.start("run", plan, "--storage", tmp_path, "--json", *few)
    cluster.until(lambda: list(tmp_path.glob("jobs/*/*/*/resume/step-*/manifest.json")), process)
    workers = cluster.workers()
    [launcher] = launchers(cluster)
    psutil.Process(launcher["pid"]).kill()
    cluster.until(lambda: not any(worker.is_running() for worker in workers), seconds=60)
    out, err = process.communicate(timeout=900)
    outcome = json.loads(out.splitlines()[-1])
    assert process.returncode == 0, err
    assert outcome["failed"] == outcome["not_run"] == []
    assert all(commit.read(folder) is not None for folder in tmp_path.glob("jobs/*/*/*/weights"))
    assert cluster.workers() == []

"""Several drivers on one new storage path, each with a Ray of its own: what is trained is trained once."""

import json
import os
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil

from aliprod.store import commit
from aliprod.store.layout import METRICS

ONE_JOB = [
    word
    for one in ('jobs={efficientnet=["full"]}', 'ensemble.members=["efficientnet/full"]', "stages.full.epochs=20")
    for word in ("--set", one)
]
JOB = "efficientnet/full"


@contextmanager
def drivers(cluster: Any, plan: Path, storage: Path, *names: str) -> Iterator[list["subprocess.Popen[str]"]]:
    """A driver for each name, started at once; of what they started nothing is left."""
    command = ("run", plan, "--storage", storage, "--json", *ONE_JOB, "--set")
    with ExitStack() as stack:
        started = [cluster.start_alone(*command, f'name="{name}"') for name in names]
        for process in started:
            stack.callback(_kill, process)
        yield started


def _kill(process: "subprocess.Popen[str]") -> None:
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    for member in (process, *family):
        member.kill()
    process.communicate()


def ended(process: "subprocess.Popen[str]") -> tuple[dict[str, Any], str]:
    """The outcome of a driver that ended well, and its log."""
    out, log = process.communicate(timeout=300)
    assert process.returncode == 0, log
    assert "Traceback" not in log
    return json.loads(out.splitlines()[-1]), log


def shown(storage: Path, plan: str) -> tuple[Counter[str], Counter[str]]:
    """How many runs of each kind, and how many versions of each checkpoint MLflow shows of a plan."""
    from aliprod.tracking.server import reach

    client = reach(f"sqlite:///{storage / 'mlflow.db'}").client
    runs = client.search_runs([client.get_experiment_by_name(plan).experiment_id])
    versions = client.search_model_versions(f"name = '{plan}.{JOB.replace('/', '.')}'")
    return Counter(run.data.tags["aliprod.kind"] for run in runs), Counter(one.tags["sha256"] for one in versions)


def checkpoints(storage: Path) -> list[Path]:
    return [path for path in storage.glob("jobs/*/*/*/resume/step-*") if commit.read(path) is not None]


def test_what_two_drivers_of_a_plan_and_one_of_another_share_is_trained_once_though_the_one_that_trains_is_killed(
    cluster: Any, plan: Path, tmp_path: Path
) -> None:
    with drivers(cluster, plan, tmp_path, "tiny", "tiny", "other") as started:
        alive = {process.pid: process for process in started}
        cluster.until(lambda: bool(checkpoints(tmp_path)) or any(process.poll() for process in started))
        [lease] = tmp_path.glob(f".leases/{'[0-9a-f]' * 64}/*")
        first = alive.pop(json.loads(lease.read_text())["pid"])
        os.killpg(first.pid, signal.SIGKILL)
        results = [ended(process) for process in alive.values()]
    outcomes = sorted((outcome for outcome, _ in results), key=lambda outcome: len(outcome["reused"]))
    assert [outcome["trained"] for outcome in outcomes] == [[JOB], []], "the one that took over, the one that waited"
    assert [outcome["reused"] for outcome in outcomes] == [[], [JOB]]
    assert any(f"aiting for {os.uname().nodename} pid" in log for _, log in results)
    assert first.returncode == -signal.SIGKILL
    for outcome in outcomes:
        runs, versions = shown(tmp_path, outcome["plan"])
        assert runs == {"plan": 1, "job": 1, "ensemble": 1}
        assert set(versions.values()) == {1}
        assert outcome["ensemble"]["top1_error"] == outcomes[0]["ensemble"]["top1_error"]
        if outcome["plan"] == outcomes[0]["plan"]:
            assert outcome["ensemble"] == outcomes[0]["ensemble"]
    [metrics] = tmp_path.glob(f"jobs/{JOB}/*/{METRICS}")
    assert [json.loads(line)["epoch"] for line in metrics.read_text().splitlines()] == list(range(20))
    left = {"plan-other"} if first is started[2] else set()  # nobody is there to take that over
    assert {path.name for path in (tmp_path / ".leases").iterdir()} == left

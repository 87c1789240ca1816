"""Without an address: a Ray of our own, though another one runs on this machine, that ends with the run."""

import json
import os
import pty
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from aliprod.store.epochs import pace, read
from aliprod.store.layout import METRICS, newest_step

SETS = (
    'jobs={efficientnet=["full"]}',
    'ensemble.members=["efficientnet/full"]',
    "stages.full.epochs=1000",
    "cluster.save_every_steps=100000",  # none but the one that it is asked for
)


def scarce() -> list[str]:
    """What gives a command 256 open files and, where we may mount, 64 MB of shared memory."""
    few = ["prlimit", "--nofile=256"]
    if subprocess.run(["unshare", "--mount", "true"], stderr=subprocess.DEVNULL, check=False).returncode:
        return few
    return ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"', "sh", *few]


@pytest.mark.usefixtures("attended")
@pytest.mark.parametrize("way", ["Ctrl-C", "closed terminal", "Ctrl-C twice"])
def test_a_run_that_is_interrupted_ends_at_its_next_step_with_a_checkpoint_and_leaves_nothing_behind(
    way: str, cluster: Any, plan: Path, tmp_path: Path
) -> None:
    sets = [word for one in SETS for word in ("--set", one)]
    command = [*scarce(), sys.executable, "-m", "aliprod", "run", str(plan), "--storage", str(tmp_path), *sets]
    terminal, its = pty.openpty()
    streams: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), its)
    process = subprocess.Popen(["setsid", "--ctty", *command], env=cluster.environment, cwd=cluster.home, **streams)
    os.close(its)
    try:
        cluster.until(lambda: list(tmp_path.glob(f"jobs/*/*/*/{METRICS}")), process)
    except AssertionError as error:
        os.set_blocking(terminal, False)
        raise AssertionError(os.read(terminal, 1 << 16).decode()) from error
    family = psutil.Process(process.pid).children(recursive=True)
    assert "raylet" in {child.name() for child in family}
    [folder] = tmp_path.glob("jobs/*/*/*")
    step = 8 / min(line["speed/images_per_second"] for line in read(folder / METRICS))  # seconds of a batch
    began = time.monotonic()
    if way == "closed terminal":
        os.close(terminal)
    else:
        os.write(terminal, b"\x03")  # which the terminal sends to the whole group
    if way == "Ctrl-C twice":
        time.sleep(0.1)
        os.write(terminal, b"\x03")
    try:
        assert process.wait(120) == 130
    finally:
        process.kill()
    took = time.monotonic() - began
    assert took < step + 10
    assert psutil.wait_procs(family, timeout=30)[1] == []
    if way != "Ctrl-C twice":  # it asks for no checkpoint
        assert (newest_step(folder) or 0) >= (pace(folder) or {})["step"], "no step that was told of is lost"
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        assert set(database.execute("select status from runs")) == {("KILLED",)}
    database.close()
    assert cluster.workers() == [], "the other Ray was left alone"


STARTING = """
import json, psutil
import ray._private.services as services
from aliprod.cluster import session
from aliprod.errors import Unreachable

def not_at_first(*arguments):
    late.append(1)
    if len(late) == 1:
        raise Exception("The current node timed out during startup.")  # as Ray says it, after 30 s
    return get_node(*arguments)

get_node, services.get_node = services.get_node, not_at_first
late = []
session.join(None)
print(len(session.nodes()))
session.ray.get(session.ray.remote(num_cpus=0)(lambda: None).remote())
family = [psutil.Process(), *psutil.Process().children(recursive=True)]
print(json.dumps([one.laddr.ip for each in family for one in each.net_connections("inet") if one.status == "LISTEN"]))
session.ray.shutdown()

def never(**_):
    raise Exception("The current node timed out during startup.")

session.ray.init = never
try:
    session.join(None)
except Unreachable as error:
    print(error)
"""


def test_a_local_ray_is_open_on_loopback_alone_and_one_that_does_not_come_up_is_started_once_more(
    cluster: Any,
) -> None:
    own = {name: value for name, value in cluster.environment.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-c", STARTING]
    nodes, listening, told, *_ = subprocess.check_output(command, env=own, cwd=cluster.home, text=True).splitlines()
    assert nodes == "1"
    found = json.loads(listening)
    assert len(found) > 5
    assert set(found) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert told.startswith("local Ray: Ray does not start here: The current node timed out during startup.")


def test_a_home_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {"HOME": "/proc/none"}
    command = [sys.executable, "-m", "aliprod", "doctor", "--storage", tmp_path]
    done = subprocess.run(command, env=own, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert "local Ray: Ray does not start here: No such file or directory (/proc/none)." in done.stdout
    assert "Traceback" not in done.stdout + done.stderr

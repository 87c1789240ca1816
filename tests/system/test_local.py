"""Without an address: a Ray of our own, though another one runs on this machine, that ends with the run."""

import os
import pty
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from aliprod.store import commit
from aliprod.store.epochs import read
from aliprod.store.layout import METRICS

SETS = (
    'jobs={efficientnet=["full"]}',
    'ensemble.members=["efficientnet/full"]',
    "stages.full.epochs=1000",
    "cluster.save_every_steps=100000",  # none but the one that it is asked for
)


def _ctrl_c(cluster: Any, command: list[str]) -> tuple[subprocess.Popen[Any], Callable[[], None]]:
    streams: dict[str, Any] = dict.fromkeys(("stdout", "stderr"), subprocess.DEVNULL)
    process = subprocess.Popen(command, env=cluster.environment, cwd=cluster.home, start_new_session=True, **streams)
    return process, lambda: os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the whole group


def _closed_terminal(cluster: Any, command: list[str]) -> tuple[subprocess.Popen[Any], Callable[[], None]]:
    ours, its = pty.openpty()
    streams: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), its)
    process = subprocess.Popen(["setsid", "--ctty", *command], env=cluster.environment, cwd=cluster.home, **streams)
    os.close(its)
    return process, lambda: os.close(ours)


@pytest.mark.usefixtures("attended")
@pytest.mark.parametrize("way", [_ctrl_c, _closed_terminal])
def test_a_run_that_is_interrupted_takes_a_checkpoint_and_leaves_nothing_behind(
    way: Any, cluster: Any, plan: Path, tmp_path: Path
) -> None:
    sets = [word for one in SETS for word in ("--set", one)]
    process, interrupt = way(
        cluster, [sys.executable, "-m", "aliprod", "run", str(plan), "--storage", str(tmp_path), *sets]
    )
    cluster.until(lambda: list(tmp_path.glob(f"jobs/*/*/*/{METRICS}")), process)
    family = psutil.Process(process.pid).children(recursive=True)
    assert "raylet" in {child.name() for child in family}
    interrupt()
    try:
        assert process.wait(120) == 130
    finally:
        process.kill()
    assert psutil.wait_procs(family, timeout=30)[1] == []
    [folder] = tmp_path.glob("jobs/*/*/*")
    steps = [int(path.name.removeprefix("step-")) for path in folder.glob("resume/step-*") if commit.read(path)]
    epochs = [int(line["epoch"]) for line in read(folder / METRICS)]
    assert 8 * len(epochs) <= max(steps)  # beyond the last epoch that it has told of
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        assert set(database.execute("select status from runs")) == {("KILLED",)}
    database.close()
    assert cluster.workers() == [], "the other Ray was left alone"

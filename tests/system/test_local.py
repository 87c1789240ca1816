"""Without an address: a Ray of our own, though another one runs on this machine, that ends with the run."""

import os
import signal
from pathlib import Path
from typing import Any

import psutil

ONE_JOB = ("--set", 'jobs={efficientnet=["full"]}', "--set", 'ensemble.members=["efficientnet/full"]')


def test_ctrl_c_in_a_terminal_ends_the_run_and_its_ray_and_keeps_the_checkpoint(
    cluster: Any, plan: Path, tmp_path: Path
) -> None:
    process = cluster.start_alone("run", plan, "--storage", tmp_path, *ONE_JOB)
    cluster.until(lambda: bool(process.poll() or list(tmp_path.glob("jobs/*/*/*/resume/step-*/manifest.json"))))
    family = psutil.Process(process.pid).children(recursive=True)
    assert "raylet" in {child.name() for child in family}
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the whole group
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, out + err
    assert "Interrupted. What is finished is kept" in err
    assert "Traceback" not in out + err
    _, alive = psutil.wait_procs(family, timeout=60)
    assert alive == []
    assert list(tmp_path.glob("jobs/*/*/*/resume/step-*"))
    assert cluster.workers() == [], "the other Ray was left alone"

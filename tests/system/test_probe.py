"""Several nodes need one storage path: a node that sees another folder under its name is found before the first job."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def stranger(cluster: Any, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A storage path that a second node of the cluster has mounted as the parameter says."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "--mount", "true"], check=False).returncode:
        pytest.skip("needs the right to make a mount namespace (unshare --mount, as root)")
    storage = tmp_path / "storage"
    storage.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = f"--num-cpus=1 --min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port={port}"
    ray = (
        f"{sys.executable} -m ray.scripts.scripts start --block --address={cluster.address} --node-ip-address=127.0.0.1"
    )
    log = tmp_path / "node.log"
    with log.open("wb") as output:
        node = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", f"{request.param.format(storage)} && exec {ray} {options}"],
            env=cluster.environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )

    def alive() -> int:
        nodes = cluster.ask("/api/v0/nodes")["data"]["result"]["result"]
        return sum(node["state"] == "ALIVE" for node in nodes)

    cluster.until(lambda: node.poll() is not None or alive() == 2, seconds=180)
    assert node.poll() is None, log.read_text()
    yield storage
    os.killpg(node.pid, signal.SIGKILL)
    node.wait()
    cluster.until(lambda: alive() == 1, seconds=180)  # the other tests have the cluster as it was


@pytest.mark.parametrize(
    ("stranger", "why"),
    [
        ("mount -t tmpfs tmpfs {0}", "No such file or directory"),
        ("mount --bind {0} {0} && mount -o remount,bind,ro {0}", "Read-only file system"),
    ],
    indirect=["stranger"],
    ids=["has another folder", "has it read-only"],
)
def test_a_node_that_does_not_share_the_storage_path_is_found_before_the_first_job(
    cluster: Any, plan: Path, stranger: Path, why: str
) -> None:
    run = cluster.aliprod("run", plan, "--storage", stranger)
    assert run.returncode == 3, run.stdout + run.stderr
    assert "does not share this storage path" in run.stderr
    assert why in run.stderr
    assert str(stranger) in run.stderr
    assert "--storage" in run.stderr
    assert "Traceback" not in run.stderr
    assert not list(stranger.glob("jobs/*/*/*/metrics.jsonl"))

"""Several nodes need one storage path: a node that sees another folder under its name is found before the first job."""

import shutil
import subprocess
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
    with cluster.node("--num-cpus=1", mount=request.param.format(storage)):
        yield storage


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

"""aliprod doctor: a healthy cluster can run plans; of a sick node every illness is named, with what to do."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray

ROOT = Path(__file__).resolve().parents[2]
DEAD = "http://user:secret@127.0.0.1:9"


def checks(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert "Traceback" not in done.stderr, done.stderr
    return list(json.loads(done.stdout.splitlines()[-1])["checks"])


def test_a_cluster_that_can_run_a_plan_passes(cluster: Any, plan: Path, tmp_path: Path) -> None:
    with cluster.node("--num-cpus=1"):
        done = cluster.aliprod("doctor", plan, "--storage", tmp_path / "runs", "--json")
    found = checks(done)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [check for check in found if not check["ok"] or check["advice"]] == []
    nodes = {check["node"] for check in found} - {None}
    assert len(nodes) == 2
    asked = {
        "storage",
        "software",
        "GPUs",
        "memory",
        "shared memory",
        "open files",
        "clock",
        "catalogue",
        "checkpoints",
    }
    assert {(check["node"], check["name"]) for check in found if check["node"]} == {
        (n, name) for n in nodes for name in asked
    }
    assert [check["name"] for check in found if check["node"] is None] == ["MLflow", "ranks", "room"]
    assert list((tmp_path / "runs").iterdir()) == []


def test_every_illness_of_a_node_is_named_with_a_cure(cluster: Any, plan: Path, tmp_path: Path) -> None:
    if shutil.which("unshare") is None or subprocess.run(["unshare", "--mount", "true"], check=False).returncode:
        pytest.skip("needs the right to make a mount namespace (unshare --mount, as root)")
    storage, other = tmp_path / "storage", tmp_path / "other"
    storage.mkdir()
    shutil.copytree(ROOT / "aliprod", other / "aliprod", ignore=shutil.ignore_patterns("__pycache__"))
    version = other / "aliprod" / "version.py"
    version.write_text(version.read_text().replace('VERSION = "', 'VERSION = "9.'))
    sick = f"mount -t tmpfs tmpfs {storage} && mount -t tmpfs -o size=64m tmpfs /dev/shm && ulimit -n 1000"
    sick += f" && export PYTHONPATH={other}"
    with cluster.node("--num-cpus=1", "--num-gpus=2", mount=sick):
        done = cluster.aliprod("doctor", plan, "--storage", storage, "--tracking-uri", DEAD, "--json")
    assert done.returncode == 3
    bad = {check["name"]: check for check in checks(done) if not check["ok"]}
    assert bad.keys() == {"MLflow", "storage", "software", "GPUs", "shared memory", "open files"}
    assert len({check["node"] for check in bad.values()}) == 2, "the other node is healthy"
    assert all(check["advice"] for check in bad.values())
    assert "the connection is refused" in bad["MLflow"]["found"]
    assert "secret" not in done.stdout + done.stderr
    assert "is not shared: No such file or directory" in bad["storage"]["found"]
    assert "aliprod 9.0.1.0 and not 0.1.0, code " in bad["software"]["found"]
    assert "Ray counts 2, torch finds 0" in bad["GPUs"]["found"]
    assert bad["shared memory"]["found"] == "0.1 GB"
    assert bad["open files"]["found"] == "1,000 a process"


def test_a_node_that_has_no_aliprod_and_a_plan_without_room_are_told(cluster: Any, plan: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken" / "aliprod"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('half installed')")
    with cluster.node("--num-cpus=1", environment={"PYTHONPATH": str(broken.parent)}):
        done = cluster.aliprod("doctor", plan, "--storage", tmp_path / "runs", "--set", "cluster.cpus_per_worker=99")
    assert done.returncode == 3
    assert "half installed" in done.stdout
    assert "takes 99 CPUs, and no node can hold that" in done.stdout
    assert "2 of " in done.stdout.splitlines()[-1]
    assert "Traceback" not in done.stdout + done.stderr


def test_a_cluster_that_is_gone_is_one_line_of_the_answer(cluster: Any, tmp_path: Path) -> None:
    done = cluster.start_alone("doctor", "--address", "127.0.0.1:9", "--storage", tmp_path, "--json")
    out, err = done.communicate(timeout=120)
    assert done.returncode == 3, err
    [_, check] = json.loads(out.splitlines()[-1])["checks"]
    assert (check["name"], check["ok"]) == ("Ray", False)
    assert check["found"] == "127.0.0.1:9: no Ray cluster answers: Connection refused"
    assert "RAY_ADDRESS" in check["advice"]


def test_another_ray_than_the_clusters_is_named(cluster: Any) -> None:
    program = f"""
import ray
ray.__version__ = "2.1.0"
from aliprod.cluster import session
from aliprod.errors import Unreachable
try:
    session.join("{cluster.address}")
except Unreachable as error:
    print(error)
"""
    command, environment = [sys.executable, "-c", program], cluster.environment
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert f"Version mismatch: The cluster was started with: Ray: {ray.__version__} Python: " in told.stdout
    assert "was started with: Ray: 2.1.0 Python: " in told.stdout
    assert "ray job submit" in told.stdout

"""A cluster that begins with a head without CPUs, and grows and shrinks by Ray's own autoscaler."""

import json
import time
from pathlib import Path
from typing import Any

from aliprod.store import commit

LISTS = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
EMPTY: dict[str, Any] = {f"{name}_commands": [] for name in LISTS}
GROWS = EMPTY | {
    "cluster_name": "grows",
    "max_workers": 3,
    "upscaling_speed": 1.0,
    "idle_timeout_minutes": 0.5,
    "auth": {"ssh_user": "nobody"},
    "docker": {},
    "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "small": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
        "large": {"resources": {"CPU": 2}, "node_config": {}, "min_workers": 0, "max_workers": 1},
    },
    "file_mounts": {},
    "cluster_synced_files": [],
    "file_mounts_sync_continuously": False,
    "rsync_exclude": [],
    "rsync_filter": [],
}
TWO_JOBS = ("--set", 'jobs={resnet=["full"], efficientnet=["full"]}', "--set", 'ensemble.members=["resnet/full"]')


def test_nodes_come_for_what_waits_and_go_when_nothing_does(heads: Any, plan: Path, tmp_path: Path) -> None:
    with heads(0, GROWS) as cluster:
        assert cluster.alive() == 1
        process = cluster.start("run", plan, "--storage", tmp_path, "--json", *TWO_JOBS, "--set", "defaults.shares=2")
        cluster.until(lambda: cluster.alive() > 1, process)
        out, log = process.communicate(timeout=600)
        assert process.returncode == 0, log
        assert sorted(json.loads(out.splitlines()[-1])["trained"]) == ["efficientnet/full", "resnet/full"]
        assert len([path for path in tmp_path.glob("jobs/*/*/*/weights") if commit.read(path)]) == 2
        ended = time.monotonic()
        cluster.until(lambda: cluster.alive() == 1, seconds=120)
        assert time.monotonic() - ended < 120

"""A cluster that begins with a head without CPUs, and grows and shrinks by Ray's own autoscaler."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

KINDS = {"small": 1, "large": 2}  # their CPUs
UNUSED = ("setup", "head_setup", "worker_setup", "initialization", "head_start_ray", "worker_start_ray")
GROWS: dict[str, Any] = {
    **{f"{name}_commands": [] for name in UNUSED},
    "docker": {},
    "auth": {},
    "file_mounts": {},
    "file_mounts_sync_continuously": False,
    "cluster_synced_files": [],
    "rsync_exclude": [],
    "rsync_filter": [],
    "cluster_name": "grows",
    "upscaling_speed": 1.0,
    "max_workers": 2,
    "idle_timeout_minutes": 0.2,
    "head_node_type": "ray.head.default",
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}},
        **{kind: {"resources": {"CPU": cpus}, "node_config": {}, "max_workers": 1} for kind, cpus in KINDS.items()},
    },
}


@pytest.fixture(scope="module")
def growing(heads: Any) -> Iterator[Any]:
    with heads(0, GROWS) as cluster:
        yield cluster


def cpus(cluster: Any) -> list[int]:
    """Of the nodes that it has."""
    nodes = cluster.ask("/api/v0/nodes")["data"]["result"]["result"]
    return sorted(int(node["resources_total"].get("CPU", 0)) for node in nodes if node["state"] == "ALIVE")


def test_nodes_of_both_kinds_come_for_what_waits_and_go_when_nothing_does(
    growing: Any, plan: Path, tmp_path: Path
) -> None:
    sets = ('jobs={resnet=["full"], efficientnet=["full"]}', 'ensemble.members=["resnet/full"]', "defaults.shares=2")
    command = ("run", plan, "--storage", tmp_path, "--json", *(word for one in sets for word in ("--set", one)))
    assert cpus(growing) == [0]
    process = growing.start(*command)
    growing.until(lambda: cpus(growing) == [0, 1, 2], process)
    out, log = process.communicate(timeout=600)
    assert process.returncode == 0, log
    assert sorted(json.loads(out.splitlines()[-1])["trained"]) == ["efficientnet/full", "resnet/full"]
    assert "0 of 2 jobs done, 2 waiting for 1 CPU" in log
    growing.until(lambda: cpus(growing) == [0], seconds=120)

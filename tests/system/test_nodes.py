"""Ranks on the nodes that they are given: a training moves while it runs, its nodes are drained and killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray._private.state import actors
from ray.core.generated.autoscaler_pb2 import DrainNodeReason, GetClusterResourceStateReply
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from aliprod.build.graph import targets
from aliprod.build.room import uses_gpu, with_cpus
from aliprod.build.schedule import Change, Outcome
from aliprod.build.target import Resources, Site, lacking
from aliprod.cluster import session, tasks
from aliprod.cluster.launch import Start, start_launcher
from aliprod.cluster.tasks import Pending, RayRunner
from aliprod.plan.open import Opened
from aliprod.plan.schema import Cluster
from aliprod.store import commit
from aliprod.store.layout import newest_step
from aliprod.store.lease import Leases
from tests.conftest import open_file

JOB = "efficientnet/full"
SETS = (
    'jobs={efficientnet=["full"]}',
    f'ensemble.members=["{JOB}"]',
    "defaults.shares=2",
    "stages.full.epochs=20",
    "cluster.save_every_steps=100000",
)


GROWS = {
    "max_workers": 3,
    "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 4}},
        "small": {"resources": {"CPU": 1}, "max_workers": 2},
        "large": {"resources": {"CPU": 64, "GPU": 8}, "max_workers": 1},
    },
}


@pytest.fixture(scope="module")
def opened(plan: Path, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return open_file(plan, tmp_path_factory.mktemp("moved"), SETS)


@pytest.fixture(scope="module")
def site(cluster: Any, opened: Opened) -> Iterator[Site]:
    """This process is a driver of the cluster."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cluster.environment.items():
            patch.setenv(name, value)
        patch.setattr(tasks, "_PATIENCE_SECONDS", 2.0)  # these nodes are near
        patch.setattr(tasks, "_LOST_SECONDS", 5.0)
        config = cluster.home / "ray_bootstrap_config.yaml"  # where `ray up` leaves it
        config.write_text(json.dumps(GROWS))
        session.join(cluster.address)
        yield replace(Site.of(opened), cluster=with_cpus(opened.plan.cluster, session.nodes()))
        ray.shutdown()
        config.unlink()


class Driver:
    """A runner, and a cluster whose nodes come and go."""

    def __init__(self, cluster: Any, opened: Opened, site: Site) -> None:
        self.cluster, self.stack, self.told = cluster, ExitStack(), False
        leases = self.stack.enter_context(Leases(site.storage, "test"))
        self.site = site = replace(site, driver=leases.token)
        self.graph = lambda: targets(opened.with_cluster(site.cluster), False, {})
        self.runner = RayRunner(
            site, start_launcher(site), lambda: self.told, lambda one: self.graph()[one.name], lambda *_: 1.0, leases
        )

    def add(self, cpus: int) -> tuple[str, subprocess.Popen[bytes]]:
        """Another node: its name, and its process."""
        before = {node.name for node in session.nodes()}
        process = self.stack.enter_context(self.cluster.node(f"--num-cpus={cpus}"))
        [name] = {node.name for node in session.nodes()} - before
        return name, process

    def until(self, true: Callable[[], bool], *works: Pending) -> list[tuple[Pending, Outcome]]:
        end = time.monotonic() + 240
        while not true():
            assert time.monotonic() < end
            if ended := self.runner.wait(works, 1.0):
                return ended
        return []

    def steps(self) -> int:
        return newest_step(self.graph()[JOB].folder(self.site.storage).parent) or 0


@pytest.fixture(scope="module")
def driver(cluster: Any, opened: Opened, site: Site) -> Iterator[Driver]:
    found = Driver(cluster, opened, site)
    for target in lacking(found.graph(), site.storage, [found.graph()[JOB]]).values():
        if target.name != JOB:
            target.make(target, site)
    with found.stack:
        yield found


@pytest.fixture(scope="module")
def undisturbed(opened: Opened, site: Site, tmp_path_factory: pytest.TempPathFactory) -> str:
    """sha256 of the weights of the same training, made without Ray by one rank."""
    threads = torch.get_num_threads()
    target = targets(opened.with_cluster(site.cluster), False, {})[JOB]
    alone = replace(site, storage=tmp_path_factory.mktemp("alone"))
    target.make(target, alone)
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
    return commit.sha256(target.folder(alone.storage) / "model.safetensors")


def ranks() -> set[str]:
    """The nodes on which ranks run now."""
    found = [actor for actor in actors().values() if actor["ActorClassName"] == "RayTrainWorker"]
    return {actor["Address"]["NodeID"] for actor in found if actor["State"] == "ALIVE"}


def test_a_training_that_ray_does_not_place_waits_and_is_never_said_to_run(driver: Driver) -> None:
    runner, target = driver.runner, driver.graph()[JOB]
    [node] = [node for node in session.nodes() if node.resources.cpus == 4]
    taken = placement_group([{"CPU": 4}])
    assert taken.wait(60)

    def changes() -> Iterator[Change | None]:
        work = runner.start(target, [node.name])
        yield Change(target.name, "started", nodes=(node.name,))
        end = time.monotonic() + 4
        while time.monotonic() < end:
            assert runner.wait([work], 1.0) == []
            yield None
        runner.stop(work)
        [(_, outcome)] = driver.until(lambda: False, work)
        yield Change(target.name, outcome.state)

    told = [change for change in runner.as_begun(changes()) if change is not None]
    remove_placement_group(taken)
    assert told == [
        Change(target.name, "waiting", "waiting for Ray to start 1 rank"),
        Change(target.name, "paused"),
    ]


HOLDER = """
import sys, ray
from ray.util.placement_group import placement_group
ray.init(sys.argv[1], logging_level="ERROR")
placement_group([{"CPU": 4}]).wait(60)
print("held", flush=True)
sys.stdin.read()
"""


def test_what_another_driver_of_the_cluster_holds_is_no_room(driver: Driver) -> None:
    runner, before = driver.runner, driver.runner.nodes()
    command, pipe = [sys.executable, "-c", HOLDER, driver.cluster.address], subprocess.PIPE
    with subprocess.Popen(command, env=driver.cluster.environment, stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout is not None
        assert "held" in other.stdout.readline()
        work = runner.start(driver.graph()[JOB], [before[0].name])  # they began at the same moment
        assert driver.until(lambda: False, work) == [(work, Outcome("paused"))]
        assert [node.resources.cpus for node in runner.nodes()] == [0]
        other.kill()
    driver.until(lambda: list(runner.nodes()) == before)


def test_a_node_that_comes_later_with_another_storage_path_is_told_and_used_once_it_has_ours(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("unshare") is None or subprocess.run(["unshare", "--mount", "true"], check=False).returncode:
        pytest.skip("needs the right to make a mount namespace (unshare --mount, as root)")
    monkeypatch.setattr(tasks, "_PROBE_SECONDS", 0.5)
    before, storage = driver.runner.nodes(), driver.site.storage
    with driver.cluster.node("--num-cpus=1", mount=f"mount -t tmpfs tmpfs {storage}") as node:
        assert len(session.nodes()) == len(before) + 1
        assert driver.runner.nodes() == before
        driver.until(lambda: bool(driver.runner.refused))
        assert "does not share this storage path" in driver.runner.refused.pop()
        assert driver.runner.nodes() == before
        subprocess.run(["nsenter", f"--mount=/proc/{node.pid}/ns/mnt", "umount", storage], check=True)
        driver.until(lambda: len(driver.runner.nodes()) == len(before) + 1)
        assert driver.runner.refused == []


def test_a_training_that_another_driver_has_taken_since_it_was_asked_for_waits_for_that_one(driver: Driver) -> None:
    runner, target = driver.runner, driver.graph()[JOB]
    assert runner.elsewhere(target) == ""
    with Leases(driver.site.storage, "plan other") as other:
        assert other.take(str(target.key)) == ""
        work = runner.start(target, [session.nodes()[0].name])
        assert driver.until(lambda: False, work) == [(work, Outcome("paused"))]
        assert runner.elsewhere(target).endswith("of plan other")


def test_a_training_whose_node_goes_before_it_has_begun_is_paused(driver: Driver) -> None:
    name, process = driver.add(1)
    work = driver.runner.start(driver.graph()[JOB], [name])
    driver.until(lambda: any(actor["ActorClassName"] == "RayTrainWorker" for actor in actors().values()))
    os.killpg(process.pid, signal.SIGKILL)
    assert driver.until(lambda: False, work) == [(work, Outcome("paused"))]
    assert not [group for group in placement_group_table().values() if group["state"] in ("CREATED", "RESCHEDULING")]


@pytest.fixture(scope="module")
def moved(driver: Driver) -> str:
    """sha256 of the weights of a training that was moved, resized, drained and killed on its way."""
    runner, target = driver.runner, driver.graph()[JOB]
    (one, first), (two, _) = driver.add(1), driver.add(1)

    work = runner.start(target, [one])
    assert driver.until(lambda: runner.has_begun(work), work) == []
    assert ranks() == {one}
    runner.stop(work)
    assert driver.until(lambda: False, work) == [(work, Outcome("paused"))]
    seen = driver.steps()
    assert seen > 0
    assert target.record(driver.site.storage) is None

    work = runner.start(target, [one, two])
    assert driver.until(lambda: runner.has_begun(work), work) == []
    assert ranks() == {one, two}

    gcs = ray._private.worker.global_worker.gcs_client
    gcs.drain_node(two, DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION, "test", int(1e3 * (time.time() + 300)))
    driver.until(lambda: two not in {node.name for node in runner.nodes()}, work)
    runner.stop(work)  # as the scheduler does
    assert driver.until(lambda: False, work) == [(work, Outcome("paused"))]
    assert driver.steps() > seen
    seen = driver.steps()

    work = runner.start(target, [one])
    assert driver.until(lambda: runner.has_begun(work), work) == []
    os.killpg(first.pid, signal.SIGKILL)
    assert driver.until(lambda: False, work) == [(work, Outcome("paused"))]
    assert driver.steps() >= seen  # it may have finished an epoch before it was killed
    assert target.record(driver.site.storage) is None

    three, _ = driver.add(1)
    work = runner.start(target, [three])
    assert driver.until(lambda: False, work) == [(work, Outcome("done"))]
    return commit.sha256(target.folder(driver.site.storage) / "model.safetensors")


def test_a_training_moves_from_node_to_node_and_its_bytes_stay(moved: str, undisturbed: str) -> None:
    assert moved == undisturbed


@pytest.mark.usefixtures("moved")
def test_a_prediction_is_given_up_where_it_loses_its_nodes_again_and_again_and_gets_no_further(driver: Driver) -> None:
    runner, target = driver.runner, driver.graph()[f"{JOB} test"]
    lost = Pending(Start(0, target, ("a node that is gone",)), [])
    shards = target.folder(driver.site.storage).parent / ".test-ten_crop.0.unfinished"
    for shard in range(6):
        (shards / f"{shard:05d}").mkdir(parents=True)
        assert runner._unfinished(lost, Outcome("failed", "NodeDiedError")) == Outcome("paused")
    outcomes = [runner._unfinished(lost, Outcome("failed", "NodeDiedError")).state for _ in range(3)]
    assert outcomes == ["paused", "paused", "failed"], "max_failures = 3"


@pytest.mark.usefixtures("moved")
def test_a_prediction_is_made_in_parts_each_on_its_node(driver: Driver) -> None:
    runner, target = driver.runner, driver.graph()[f"{JOB} test"]
    work = runner.start(target, [node.name for node in session.nodes()])
    assert len(work.refs) > 1
    assert driver.until(lambda: False, work) == [(work, Outcome("done"))]
    assert driver.graph()[f"{JOB} test"].record(driver.site.storage) is not None


def test_what_waits_makes_a_cluster_grow_by_the_nodes_that_it_may_start(driver: Driver) -> None:
    small, large = Resources(1, 0), Resources(64, 8)
    there = [node.resources for node in session.nodes()].count(small)
    assert session.types(driver.site.cluster) == [small] * (2 - there) + [large]
    assert uses_gpu(Cluster(), session.machines(driver.site.cluster)), "which are to come"

    def asked() -> list[dict[str, float]]:
        """What the autoscaler sees."""
        reply = GetClusterResourceStateReply.FromString(
            ray._private.worker.global_worker.gcs_client.get_cluster_resource_state()
        )
        pending = reply.cluster_resource_state.pending_resource_requests
        return [dict(one.request.resources_bundle) for one in pending if one.count]

    driver.runner.request([Resources(8, 1)])
    driver.until(lambda: {"CPU": 8.0, "GPU": 1.0} in asked())
    driver.runner.request([])
    driver.until(lambda: {"CPU": 8.0, "GPU": 1.0} not in asked())

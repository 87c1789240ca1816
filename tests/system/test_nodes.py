"""Ranks on the nodes that they are given: a training moves while it runs, its nodes are drained and killed."""

import os
import signal
import subprocess
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
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

from aliprod.build.graph import targets
from aliprod.build.schedule import Outcome
from aliprod.build.target import Site, lacking
from aliprod.cluster import session
from aliprod.cluster.launch import start_launcher
from aliprod.cluster.tasks import RayRunner, Work
from aliprod.plan.load import load
from aliprod.plan.open import Opened, Request, open_plan
from aliprod.plan.places import resolve
from aliprod.store import commit
from aliprod.store.layout import newest_step

JOB = "efficientnet/full"
SETS = (
    'jobs={efficientnet=["full"]}',
    f'ensemble.members=["{JOB}"]',
    "defaults.shares=2",
    "stages.full.epochs=20",
    "cluster.save_every_steps=100000",
)


@pytest.fixture(scope="module")
def opened(plan: Path, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    storage = tmp_path_factory.mktemp("moved")
    loaded = load(plan, SETS)
    return open_plan(Request(loaded, plan.read_text(), resolve(loaded, storage, None, None)))


@pytest.fixture(scope="module")
def site(cluster: Any, opened: Opened) -> Iterator[Site]:
    """This process is a driver of the cluster."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cluster.environment.items():
            patch.setenv(name, value)
        session.join(cluster.address)
        yield replace(Site.of(opened), cluster=session.with_cpus(opened.plan.cluster))
        ray.shutdown()


class Driver:
    """A runner, and a cluster whose nodes come and go."""

    def __init__(self, cluster: Any, opened: Opened, site: Site) -> None:
        self.cluster, self.site, self.stack, self.told = cluster, site, ExitStack(), False
        self.graph = lambda: targets(opened.with_cluster(site.cluster), False, {})
        self.runner = RayRunner(
            site, start_launcher(site), lambda: self.told, lambda target: self.graph()[target.name], lambda *_: 1.0
        )

    def add(self, cpus: int) -> tuple[str, subprocess.Popen[bytes]]:
        """Another node: its name, and its process."""
        before = {node.name for node in session.nodes()}
        process = self.stack.enter_context(self.cluster.node(f"--num-cpus={cpus}"))
        [name] = {node.name for node in session.nodes()} - before
        return name, process

    def until(self, true: Callable[[], bool], *works: Work) -> list[tuple[Work, Outcome]]:
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
            list(target.make(target, site))
    with found.stack:
        yield found


@pytest.fixture(scope="module")
def undisturbed(opened: Opened, site: Site, tmp_path_factory: pytest.TempPathFactory) -> str:
    """sha256 of the weights of the same training, made without Ray by one rank."""
    threads = torch.get_num_threads()
    target = targets(opened.with_cluster(site.cluster), False, {})[JOB]
    alone = replace(site, storage=tmp_path_factory.mktemp("alone"))
    list(target.make(target, alone))
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
    return commit.sha256(target.folder(alone.storage) / "model.safetensors")


def ranks() -> set[str]:
    """The nodes on which ranks run now."""
    found = [actor for actor in actors().values() if actor["ActorClassName"] == "RayTrainWorker"]
    return {actor["Address"]["NodeID"] for actor in found if actor["State"] == "ALIVE"}


def test_a_training_moves_from_node_to_node_and_its_bytes_stay(driver: Driver, undisturbed: str) -> None:
    runner, target = driver.runner, driver.graph()[JOB]
    (one, first), (two, _) = driver.add(1), driver.add(1)

    work = runner.start(target, [one])
    assert driver.until(lambda: runner.has_begun(work), work) == []
    assert ranks() == {one}
    asked = time.monotonic()
    runner.stop(work)
    assert driver.until(lambda: False, work) == [(work, Outcome("paused"))]
    seen = driver.steps()
    assert seen > 0
    assert target.record(driver.site.storage) is None

    work = runner.start(target, [one, two])
    assert driver.until(lambda: runner.has_begun(work), work) == []
    print(f"resized in {time.monotonic() - asked:.1f} s")
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
    assert driver.steps() == seen

    three, _ = driver.add(1)
    work = runner.start(target, [three])
    assert driver.until(lambda: False, work) == [(work, Outcome("done"))]
    assert commit.sha256(target.folder(driver.site.storage) / "model.safetensors") == undisturbed

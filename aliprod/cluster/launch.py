"""A training goes to the launcher, the one actor of a run, in which each TorchTrainer has its controller; its ranks run
`train_rank`.

Importing this module is cheap: neither the driver nor the launcher's first second needs Ray Train.
"""

import os
import threading
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, Literal

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from aliprod.build.schedule import Outcome
from aliprod.build.target import Site, Target
from aliprod.cluster import session
from aliprod.errors import NonFiniteLoss, Refused
from aliprod.plan.schema import Cluster
from aliprod.store import lease

_MOST_JOBS = 256  # side by side: threads of the launcher
_ASK_SECONDS = 0.5


def start_launcher(site: Site) -> Any:
    """Start the launcher of a run; it imports what it needs while the driver goes on.

    It runs on this node: on another it would die with that node even where its workers are elsewhere. Where it dies,
    Ray starts it anew and repeats what it was doing: each job goes on from its checkpoint.

    Returns:
        Its handle. Keep it: the launcher ends with the last handle.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options: Any = {"max_restarts": -1, "max_task_retries": site.cluster.max_failures, "scheduling_strategy": here}
    options |= {"num_cpus": 0, "max_concurrency": _MOST_JOBS, "concurrency_groups": {"talk": 2}}
    return ray.remote(**options)(Launcher).remote(site)


@dataclass(frozen=True)
class Start:
    """A start of a job.

    Attributes:
        number: it tells one start of a job from the next.
        nodes: of each rank.
    """

    number: int
    target: Target
    nodes: tuple[str, ...]


def environment(cluster: Cluster) -> dict[str, str]:
    """Variables that Ray Train reads where ``fit`` is called and in its workers."""
    return {
        "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",  # else the dashboard's API knows no runs of Ray Train
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": str(cluster.poll_seconds),
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a node that is about to go is the scheduler's business
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5",  # then it is looked whether the nodes are still there
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }


class Launcher:
    """The actor: it fits each job's trainer in a thread of its own, and stands between the driver and rank 0."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.stops, self.begun = frozenset[int](), set[int]()
        os.environ |= environment(site.cluster) | os.environ  # what is set already stays
        _free_places("all")
        threading.Thread(target=import_module, args=("aliprod.cluster.trainer",), daemon=True).start()

    def fit(self, start: Start) -> Outcome:
        """Train a job."""
        from aliprod.cluster.trainer import fit

        me = ray.get_runtime_context().current_actor
        return fit(start, self.site, me, lambda: start.number in self.stops)

    @ray.method(concurrency_group="talk")
    def hear(self, stops: frozenset[int]) -> frozenset[int]:
        """Take down which starts are to stop; which ones have begun. It is asked again and again by the driver."""
        self.stops = stops
        return frozenset(self.begun)

    @ray.method(concurrency_group="talk")
    def is_to_stop(self, number: int) -> bool:
        """Whether a start is to stop; asked again and again by its rank 0, from its beginning on."""
        self.begun.add(number)
        return number in self.stops

    @ray.method(concurrency_group="talk")
    def free(self) -> None:
        """Let go of the room of ranks of which some can never begin, since their node is gone."""
        _free_places("lost")


def _free_places(which: Literal["all", "lost"]) -> None:
    """Remove placement groups of this actor: all of a former life, whose workers ended with it but whose resources Ray
    would keep until the driver ends; or those that Ray would move from a node that is gone, to no other."""
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    me = ray.get_runtime_context().get_actor_id()
    for group in session.placement_groups():
        lost, there = group.state == group.RESCHEDULING, group.state != group.REMOVED
        if group.creator_actor_id.hex() == me and (lost if which == "lost" else there):
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))


def train_rank(config: dict[str, Any]) -> Outcome:
    """Train on this rank.

    A checkpoint is what the storage path has committed; Ray Train is told nothing on the way: its report is a barrier
    that may wait for its controller's next look, and shows no number to anybody. What an exact replay would repeat is
    returned, not raised: Ray would try it again.
    """
    import ray.train  # here: it takes a second, and only the worker needs it

    target: Target = config["target"]
    stop = threading.Event()
    site: Site = replace(config["site"], stop=stop.is_set)
    if lease.is_lost(site.storage, str(target.key), site.driver):
        return Outcome("failed", "another driver has taken it over.")
    lease.follow(site.storage, str(target.key), site.driver)
    if ray.train.get_context().get_world_rank() == 0:
        threading.Thread(target=_listen, args=(config["launcher"], config["number"], stop), daemon=True).start()
    try:
        target.make(target, site)
    except (NonFiniteLoss, Refused) as error:
        return Outcome("failed", str(error))
    return Outcome("paused" if stop.is_set() and target.record(site.storage) is None else "done")


def _listen(launcher: Any, number: int, stop: threading.Event) -> None:
    """Ask the launcher until it says that this job is to stop. The first question tells that it has begun."""
    try:
        while not ray.get(launcher.is_to_stop.remote(number)):
            stop.wait(_ASK_SECONDS)
    except ray.exceptions.RayError:
        return  # the launcher is gone, and this process goes with it
    stop.set()

"""A job goes to the launcher: the one actor of a run, in which every job's trainer has its controller.

Importing this module is cheap: the driver needs no Ray Train, and neither of the two what trains.
"""

import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from aliprod.orchestration.worker import Rank, pack
from aliprod.plan.schema import Cluster

if TYPE_CHECKING:
    from aliprod.training.job import Work

_MOST_JOBS = 256  # side by side: threads of the launcher


def start_launcher(cluster: Cluster, gpu: bool, ray_storage: Path) -> Any:
    """Start the launcher of a run; it imports what it needs while the driver goes on.

    It runs on this node: on another it would die with that node even where its workers are elsewhere. Where it dies,
    Ray starts it anew and repeats what it was doing: each job goes on from its checkpoint.

    Returns:
        Its handle. Keep it: the launcher ends with the last handle.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=cluster.max_failures)(Launcher)
    options = actor.options(max_concurrency=_MOST_JOBS, scheduling_strategy=here)
    return options.remote(cluster, gpu, ray_storage)


def launch(launcher: Any, work: "Work", catalogue: Path) -> Any:
    """Start a job, which the dashboard lists by its name.

    Returns:
        A reference that resolves to why the job failed, or to an empty text.
    """
    return launcher.fit.options(name=work.name).remote(pack(work, catalogue))


def environment(cluster: Cluster) -> dict[str, str]:
    """Variables that Ray Train reads where ``fit`` is called and in its workers."""
    return {
        "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",  # else the dashboard has no Train tab
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": str(cluster.poll_seconds),
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }


class Launcher:
    """The actor: it fits each job's trainer in a thread of its own.

    Args:
        cluster: what all jobs have in common.
        gpu: whether their workers take GPUs.
        ray_storage: where Ray Train keeps its own files.
    """

    def __init__(self, cluster: Cluster, gpu: bool, ray_storage: Path) -> None:
        self.cluster, self.gpu, self.ray_storage = cluster, gpu, ray_storage
        os.environ |= environment(cluster) | os.environ  # what is set already stays
        _free_places()
        threading.Thread(target=_import_trainer, daemon=True).start()

    def fit(self, rank: Rank) -> str:
        """Train a job; why it failed, or an empty text."""
        from aliprod.orchestration.trainer import fit

        return fit(rank, self.cluster, self.gpu, self.ray_storage)


def _import_trainer() -> None:
    import aliprod.orchestration.trainer  # noqa: F401


def _free_places() -> None:
    """Remove the placement groups of a former life of this actor: its workers ended with it, but Ray would keep their
    resources until the driver ends."""
    from ray._private.state import state  # the public table does not say who made a group
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # type: ignore[attr-defined]
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    me = ray.get_runtime_context().get_actor_id()
    for raw in state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(raw)
        if group.creator_actor_id.hex() == me and group.state != PlacementGroupTableData.REMOVED:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))

"""The Ray cluster: joining it, what it has, and whether all its nodes see the storage path."""

import logging
import os
import socket
import uuid
import warnings
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from aliprod.build.target import Resources
from aliprod.errors import Refused, Unreachable
from aliprod.plan.schema import Cluster
from aliprod.store import commit

NAMESPACE = "aliprod"
_PROBE_SECONDS = 60
_KNOCK_SECONDS = 10


def join(address: str | None) -> None:
    """Join the cluster at ``address``, or start a local one of our own, never one that happens to run.

    Raises:
        Unreachable: there is no Ray at that address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # tokens are on: that is no news
    try:
        if address:
            _knock(address)
            os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "1")  # tries, of 40 s: Ray's default are 20
        else:
            os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "8")  # by default one a core
            os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "0")  # for a dashboard, which is not started
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # nobody takes our one node away
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Ray's own deprecations are none of the user's business
            ray.init(
                address=address or "local",
                include_dashboard=None if address else False,
                logging_level=logging.WARNING,
                log_to_driver=False,
                namespace=NAMESPACE,
            )
    except (OSError, RuntimeError, ValueError, OverflowError, ray.exceptions.RayError) as error:
        first = getattr(error, "strerror", None) or (str(error).splitlines() or [""])[0]
        raise Unreachable(
            f"no Ray cluster answers: {first}",
            address or "local Ray",
            "Check --address or RAY_ADDRESS (and RAY_AUTH_MODE where the cluster asks for a token); "
            "without an address, aliprod starts a local Ray.",
        ) from error


def _knock(address: str) -> None:
    """Raise where nobody listens at ``HOST:PORT``: Ray itself would go on asking for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdecimal():  # else it is a word, such as auto: Ray looks by itself
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_SECONDS).close()


def capacity() -> Resources:
    """CPUs and GPUs of all nodes together, busy or not."""
    resources = ray.cluster_resources()
    return Resources(int(resources.get("CPU", 0)), int(resources.get("GPU", 0)))


def uses_gpu(cluster: Cluster) -> bool:
    """Whether jobs take GPUs: as the plan says, or, left to ``auto``, where the cluster has any."""
    return capacity().gpus > 0 if cluster.use_gpu == "auto" else cluster.use_gpu


def check_room(cluster: Cluster, needed: Resources) -> None:
    """Refuse a plan whose jobs the cluster can never hold, since Ray would wait for ever.

    Raises:
        Unreachable: the cluster is too small.
    """
    has = limit(cluster)
    if not needed.fits(has):
        raise Unreachable(
            f"a job takes {needed.cpus} CPUs and {needed.gpus} GPUs, the cluster has {has.cpus} and {has.gpus}.",
            "[cluster]",
            "Lower workers or cpus_per_worker; or, where the cluster grows on demand, set max_cpus and max_gpus.",
        )


def limit(cluster: Cluster) -> Resources:
    """What may be asked for: what there is, or what the plan says the cluster can grow to."""
    has = capacity()
    return Resources(max(has.cpus, cluster.max_cpus or 0), max(has.gpus, cluster.max_gpus or 0))


def probe(storage: Path) -> None:
    """Have every node read what this one wrote into the storage path, and write something back.

    Raises:
        Unreachable: a node does not see the path, or may not write there.
    """
    folder, token = storage / ".probe", uuid.uuid4().hex
    commit.write_file(folder / "driver", token)
    here = ray.get_runtime_context().get_node_id()
    others = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] != here]
    refs = {
        _probe.options(
            name="storage probe", scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(folder, node["NodeID"]): node
        for node in others
    }
    done, late = ray.wait(list(refs), num_returns=len(refs), timeout=_PROBE_SECONDS) if refs else ([], [])
    for ref in done:
        answer = folder / refs[ref]["NodeID"]
        if ray.get(ref) != token or not answer.exists() or answer.read_text() != token:
            _refuse(storage, refs[ref])
    for ref in late:
        _refuse(storage, refs[ref])
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


def hold(plan: str, storage: Path) -> Any:
    """Take the lease on a plan: one driver at a time. It ends with this driver, however that ends.

    The lease only saves GPU hours: results are addressed by key and written once, so two drivers harm nothing.

    Returns:
        The lease, held for as long as it is referred to.

    Raises:
        Refused: another driver of this cluster runs the plan.
    """
    name = f"{plan} in {storage}"
    try:
        lease: Any = ray.remote(num_cpus=0)(_Lease).options(name=name).remote(os.getpid())
    except ValueError as error:  # Ray's ActorAlreadyExistsError is one
        raise Refused(
            "another driver of this cluster runs this plan in this storage path.",
            name,
            "Wait for it, or stop it (`ray job stop`); what it has finished is kept.",
        ) from error
    ray.get(lease.holder.remote())
    return lease


class _Lease:
    def __init__(self, pid: int) -> None:
        self.pid = pid

    def holder(self) -> int:
        return self.pid


@ray.remote(num_cpus=0, max_retries=0)
def _probe(folder: Path, node: str) -> str:
    try:
        token = (folder / "driver").read_text()
        (folder / node).write_text(token)
    except OSError as error:
        return str(error)
    return token


def _refuse(storage: Path, node: dict[str, object]) -> None:
    raise Unreachable(
        f"node {node['NodeManagerHostname']} does not share this storage path.",
        storage,
        "Give --storage a folder that every node of the cluster reads and writes (NFS, EFS, Lustre, ...).",
    )

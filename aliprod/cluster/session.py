"""The Ray cluster: joining it, what it has, whether its nodes see the storage path; and what tells a run to stop."""

import json
import logging
import os
import signal
import socket
import stat
import threading
import traceback
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
from ray._private import ray_constants
from ray._private.state import state
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from aliprod.build.room import Node
from aliprod.build.target import NOTHING, Resources
from aliprod.errors import AliprodError, Unreachable
from aliprod.plan.schema import Cluster
from aliprod.processes import KEEPING
from aliprod.store import commit, mirror

_PROBE_SECONDS = 60
_KNOCK_SECONDS = 10
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_HEAD = "node:__internal_head__"  # a resource of the head alone
_CONFIG = "~/ray_bootstrap_config.yaml"  # on the head, by `ray up`
_LOCAL = {  # variables that a Ray of our own is started with
    "RAY_worker_maximum_startup_concurrency": "8",  # by default one a core
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",  # for a dashboard, which is not started
    **KEEPING,  # Ray Train trains in a thread of its own, for which it is too late once it is there
}


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
            os.environ |= _LOCAL | os.environ  # what is set already stays
        try:
            _init(address)
        except Exception:
            if address:
                raise
            ray.shutdown()
            _init(address)  # on a busy machine Ray gives up a raylet after 30 s, and another try finds all in memory
    except Exception as error:  # Ray raises bare ones too
        said = "".join(traceback.format_exception(error))  # what caused it stands in a text, if anywhere
        if "AuthenticationError" in said or "nauthenticated" in said:
            what = "this Ray cluster asks for a token, and none, or a wrong one, was shown."
            advice = (
                "Say RAY_AUTH_MODE=token, and put what `ray get-auth-token` prints on its head into "
                "~/.ray/auth_token or RAY_AUTH_TOKEN."
            )
            raise Unreachable(what, address or "local Ray", advice) from error
        if "Version mismatch" in said:
            advice = "Have the cluster's Ray and Python where the driver runs; `ray job submit` runs it there."
            raise Unreachable(" ".join(str(error).split()), address or "local Ray", advice) from error
        first = getattr(error, "strerror", None) or (str(error).splitlines() or [""])[0]
        if not address:
            path = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
            advice = "It keeps a token below HOME and its logs below the temp folder: both must be writable."
            raise Unreachable(f"Ray does not start here: {first}{path}.", "local Ray", advice) from error
        raise Unreachable(
            f"no Ray cluster answers: {first}",
            address,
            "Check --address or RAY_ADDRESS; without an address, aliprod starts a local Ray.",
        ) from error


def _init(address: str | None) -> None:
    # Ray's own switch for laptops, read at its import and in its children: ports are open on loopback alone.
    ray_constants.ENABLE_RAY_CLUSTER = bool(address)
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = str(int(bool(address)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own deprecations are none of the user's business
        ray.init(
            address=address or "local",
            include_dashboard=None if address else False,
            logging_level=logging.WARNING,
            log_to_driver=False,
        )


def _knock(address: str) -> None:
    """Raise where nobody listens at ``HOST:PORT``: Ray itself would go on asking for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdecimal():  # else it is a word, such as auto: Ray looks by itself
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_SECONDS).close()


def nodes() -> list[Node]:
    """The nodes that are alive, and that nobody is about to take away, with all they have, busy or not."""
    going = state.get_draining_nodes()
    found = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in going]
    return [Node(node["NodeID"], _resources(node["Resources"])) for node in found]


def types(cluster: Cluster) -> list[Resources]:
    """The nodes that the cluster may still start by itself, one entry each.

    `ray up` leaves its configuration with the head. Other autoscalers (KubeRay's) tell nobody what they may start:
    then it is what the plan says the cluster can grow to, as one more node.
    """
    there = [node.resources for node in nodes()]
    config = _autoscaler(ray.get_runtime_context().get_job_id())
    if config is None:
        has = sum(there, NOTHING)
        more = Resources(max(0, (cluster.max_cpus or 0) - has.cpus), max(0, (cluster.max_gpus or 0) - has.gpus))
        return [] if more == NOTHING else [more]
    most, found = int(config.get("max_workers", 0)) - (len(there) - 1), list[Resources]()
    for name, kind in config["available_node_types"].items():
        one = _resources(kind.get("resources", {}))
        count = 0 if name == config.get("head_node_type") else int(kind.get("max_workers", most))
        found += [one] * (count - there.count(one))
    return found[: max(0, most)]


def placement_groups() -> list[Any]:
    """All of the cluster, with who made them, which Ray's public table does not say: protobuf PlacementGroupTableData.
    Trainings keep the room of their ranks in them."""
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # type: ignore[attr-defined]

    return list(map(PlacementGroupTableData.FromString, state._connect_and_get_accessor().get_placement_group_table()))


def held_by_others() -> dict[str, Resources]:
    """What trainings of other drivers hold, by node."""
    me, found = ray.get_runtime_context().get_job_id(), dict[str, Resources]()
    for group in placement_groups():
        if group.state == group.CREATED and group.creator_job_id.hex() != me:
            for bundle in group.bundles:
                name = bundle.node_id.hex()
                found[name] = found.get(name, NOTHING) + _resources(bundle.unit_resources)
    return found


def machines(cluster: Cluster) -> list[Node]:
    """The nodes that are there, and those that the cluster may still start by itself."""
    return [*nodes(), *(Node("", one) for one in types(cluster))]


@cache
def _autoscaler(_: str) -> dict[str, Any] | None:
    """What `ray up` has left with the head; None where nothing is there. Asked once a session."""
    [head] = [node["NodeID"] for node in ray.nodes() if node["Alive"] and _HEAD in node["Resources"]]
    there = NodeAffinitySchedulingStrategy(head, soft=False)
    text = ray.get(_read.options(name="what the autoscaler may start", scheduling_strategy=there).remote(_CONFIG))
    return dict(json.loads(text)) if text else None


@ray.remote(num_cpus=0)
def _read(path: str) -> str:
    file = Path(path).expanduser()
    return file.read_text() if file.exists() else ""


def _resources(has: Mapping[str, float]) -> Resources:
    return Resources(int(has.get("CPU", 0)), int(has.get("GPU", 0)))


def probe(storage: Path, only: str | None = None) -> None:
    """Have every node read what this one wrote into the storage path, and write something back.

    Args:
        only: a node, where the others are known to see it.
    Raises:
        Unreachable: a node does not see the path, or may not write there.
    """
    token = uuid.uuid4().hex
    folder = storage / f".probe-{token[:8]}"  # of its own: another driver may be at it too
    commit.write_file(folder / "driver", token)
    here = ray.get_runtime_context().get_node_id()
    others = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] != here]
    others = [node for node in others if only in (None, node["NodeID"])]
    try:
        for node, found in ask(others, "storage probe", _probe, folder):
            commit.refresh(folder)
            answer = folder / node["NodeID"]
            if isinstance(found, ray.exceptions.RayError) and node["NodeID"] not in {one.name for one in nodes()}:
                continue  # it went while it was asked
            if found != token or not answer.exists() or answer.read_text() != token:
                said = "no answer" if isinstance(found, ray.exceptions.RayError) else found
                host, why = node["NodeManagerHostname"], "" if found == token else f" ({said})"
                raise Unreachable(
                    f"node {host} does not share this storage path, or may not write there{why}.",
                    mirror.shown(storage),
                    "Give --storage a folder that every node of the cluster reads and writes (NFS, EFS, Lustre, ...), "
                    "or a bucket.",
                )
    finally:
        commit.remove(folder)


def ask(
    asked: Sequence[Mapping[str, Any]], name: str, question: Callable[..., Any], folder: Path, *more: Any
) -> Iterator[tuple[Mapping[str, Any], Any]]:
    """Ask nodes by one small task each, which is given a folder, the node's name, and more.

    Yields:
        A node of `ray.nodes` and its answer, or the error that came instead.
    """
    task, refs = ray.remote(num_cpus=0, max_retries=0)(question), dict[Any, Mapping[str, Any]]()
    for node in asked:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        refs[task.options(name=name, scheduling_strategy=there).remote(folder, node["NodeID"], *more)] = node
    done, late = ray.wait(list(refs), num_returns=len(refs), timeout=_PROBE_SECONDS) if refs else ([], [])
    for ref in done:
        try:
            yield refs[ref], ray.get(ref)
        except ray.exceptions.RayError as error:
            yield refs[ref], error
    for ref in late:
        yield refs[ref], TimeoutError(f"no answer in {_PROBE_SECONDS} s")


def _probe(folder: Path, node: str) -> str:
    try:
        commit.refresh(folder)
        token = (folder / "driver").read_text()
        commit.write_file(folder / node, token)
    except OSError as error:
        return str(error.strerror)
    except AliprodError as error:
        return error.what
    return token


def last_line(error: BaseException) -> str:
    """The last line of what an error says, which is the cause."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


class Signals:
    """Whether a run was told to stop: by Ctrl-C, `ray job stop` (SIGTERM), or a terminal that is closed (SIGHUP).

    Attributes:
        told: it was.
        gently: something runs that takes a checkpoint first: one signal sets ``told``, another raises
            KeyboardInterrupt, as all do while nothing runs.
    """

    def __init__(self) -> None:
        self.told, self.gently = False, False
        main = threading.current_thread() is threading.main_thread()
        self.heeded = [one for one in _SIGNALS if main and signal.getsignal(one) != signal.SIG_IGN]  # else: nohup

    def listen(self) -> None:
        """Heed the signals from now on."""
        for number in self.heeded:
            signal.signal(number, self._hear)

    @contextmanager
    def starting_others(self) -> Iterator[None]:
        """Have processes that are started outlive a closed terminal until they are told to end; ray.init sets handlers
        of its own besides."""
        if signal.SIGHUP in self.heeded:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what they inherit
        try:
            yield
        finally:
            self.listen()

    def _hear(self, number: int, _: object) -> None:
        if number == signal.SIGHUP:
            _leave_terminal()
        at_once = self.told or not self.gently
        self.told = True
        if at_once:
            raise KeyboardInterrupt


def _leave_terminal() -> None:
    """Let go of a terminal that is gone: whatever is written to it fails."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        if stat.S_ISCHR(os.fstat(descriptor).st_mode):  # isatty() is false once it is gone
            os.dup2(nowhere, descriptor)

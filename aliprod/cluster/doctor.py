"""Can this cluster run plans? Every node is asked by one small task, and what is wrong is said with what to do."""

import heapq
import math
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import ray

from aliprod.build.graph import targets_on
from aliprod.build.room import check_room, slots
from aliprod.build.target import lacking
from aliprod.cluster import session
from aliprod.cluster.facts import Facts, facts, nearest_folder, software
from aliprod.errors import AliprodError, Unreachable
from aliprod.forecast.demand import Demand, demand
from aliprod.plan.open import Opened
from aliprod.plan.places import Places, catalogue_path
from aliprod.shown import redacted
from aliprod.store import commit, mirror
from aliprod.tracking import server

_BYTES = 64 << 20  # written and read for the speed
_SHARED = 1 << 30  # docker gives 64 MB; below its object store Ray goes to the disk, and loaders die of SIGBUS
_FILES = 4096  # below, Ray warns
_MEMORY = 2_000_000_000  # driver, launcher and Ray take 1.6 GB, a rank 0.9 GB before its network
_SKEW_SECONDS = 60.0  # object stores and Kerberos refuse minutes
_ROUNDS = 3


@dataclass(frozen=True)
class Check:
    """What was asked, and the answer. node: its host; None: of the cluster as a whole. advice: '' where it is ok."""

    name: str
    ok: bool
    node: str | None
    found: str
    advice: str = ""


def examine(places: Places, opened: Opened | None) -> Iterator[Check]:
    """Ask MLflow, the storage path and every node; with a plan, whether there is room for it too."""
    takes = demand(opened) if opened and opened.catalogue else None
    yield _mlflow(places, opened)
    try:
        session.join(places.address)
        yield from _nodes(places, opened, takes)
        if opened is not None:
            yield from _room(opened, takes)
    except AliprodError as error:
        yield _failed("Ray", error)
    finally:
        ray.shutdown()


def _check(name: str, node: str | None, ok: bool, found: str, advice: str) -> Check:
    return Check(name, ok, node, found, "" if ok else advice)


def _failed(name: str, error: AliprodError) -> Check:
    return Check(name, False, None, f"{error.where}: {error.what}", error.advice)


def _mlflow(places: Places, opened: Opened | None) -> Check:
    """Whether it answers here, where the driver runs; with a plan, whether it keeps artifacts too."""
    uri = places.tracking_uri
    if uri.startswith("sqlite:") and not Path(uri.removeprefix("sqlite:///")).exists():
        return Check("MLflow", True, None, "the first run makes its SQLite")
    try:
        if opened is None:
            server.reach(uri)
        else:
            server.connect(uri, opened.plan.name, places.artifacts)
    except AliprodError as error:
        return _failed("MLflow", error)
    return Check("MLflow", True, None, f"{redacted(uri)} answers")


def _nodes(places: Places, opened: Opened | None, takes: Demand | None) -> Iterator[Check]:
    """What each node says of itself."""
    token, alive = uuid.uuid4().hex, [node for node in ray.nodes() if node["Alive"]]
    folder, own = places.storage / f".doctor-{token[:8]}", software()
    hosts = Counter(node["NodeManagerHostname"] for node in alive)
    catalogue = catalogue_path(opened.plan, places) if opened and takes else None
    try:
        commit.write_file(folder / "driver", token)
        for node, found in session.ask(alive, "doctor", facts, folder, _BYTES, catalogue):
            host, key = node["NodeManagerHostname"], node["NodeID"]
            host += f" ({key[:6]})" if hosts[host] > 1 else ""
            if not isinstance(found, Facts):
                advice = "Have aliprod and the packages of constraints.txt there; `ray status` and its logs say more."
                yield Check("answers", False, host, session.last_line(found), advice)
                continue
            commit.refresh(folder)
            back = (folder / key).exists() and (folder / key).read_text() == token == found.seen
            yield _storage(host, found, back, places.storage)
            yield _software(host, found.software, own)
            yield _gpus(host, found, int(node["Resources"].get("GPU", 0)))
            yield from _limits(host, found)
            yield _clock(host, *_skew(partial(_now, key)))
            if opened and takes:
                yield from _fits(host, found, opened, takes)
    except AliprodError as error:
        yield _failed("storage", error)
    finally:
        commit.remove(folder)


def _storage(host: str, found: Facts, back: bool, storage: Path) -> Check:
    if not back or not found.write:
        why = found.storage or "what one writes there the other does not see"
        advice = "Mount one folder on every node under this path, writable by the user of the jobs; or give --storage."
        return Check("storage", False, host, f"{mirror.shown(storage)} is not shared: {why}", advice)
    moves = f"writes {found.write / 1e6:,.0f} MB/s, reads {found.read / 1e6:,.0f} MB/s"
    return Check("storage", True, host, f"{moves}, 4 kB are safe after {1e3 * found.sync:,.1f} ms")


def _software(host: str, found: Mapping[str, str], own: Mapping[str, str]) -> Check:
    other = [f"{name} {found[name]} and not {own[name]}" for name in own if found[name] != own[name]]
    said = f"Ray {own['ray']}, Python {own['python']}, aliprod {own['aliprod']}, as where the driver runs"
    advice = "Install constraints.txt and one aliprod on every node and where the driver runs: one image for all."
    return _check("software", host, not other, ", ".join(other) or said, advice)


def _gpus(host: str, found: Facts, counted: int) -> Check:
    """counted: GPUs that Ray gives out there."""
    kinds = "; ".join(f"{count} x {kind}" for kind, count in Counter(found.gpus).items()) or "none"
    if not found.gpus:
        advice = "nvidia-smi names none: install the driver; give them to the container (docker run --gpus all)."
    elif found.cuda is None:
        advice = "torch is built without CUDA there: install the build of constraints.txt."
    else:
        advice = f"torch is built for CUDA {found.cuda}: update the driver, and look at CUDA_VISIBLE_DEVICES."
    both = f"; Ray counts {counted}, torch finds {found.visible}" if counted or found.visible else ""
    return _check("GPUs", host, found.visible >= counted, kinds + both, advice)


def _limits(host: str, found: Facts) -> Iterator[Check]:
    said = f"{_gigabytes(found.free_memory)} of {_gigabytes(found.memory)} are free"
    advice = f"A process of a job takes 1 GB at least: free {_gigabytes(_MEMORY)}, or take a larger machine."
    yield _check("memory", host, found.free_memory >= _MEMORY, said, advice)
    advice = "Enlarge /dev/shm: docker run --shm-size=16g; in Kubernetes an emptyDir with medium: Memory."
    yield _check("shared memory", host, found.shared_memory >= _SHARED, _gigabytes(found.shared_memory), advice)
    advice = "Raise it where Ray is started: ulimit -n 65536, or docker run --ulimit nofile=65536:65536."
    yield _check("open files", host, found.open_files >= _FILES, f"{found.open_files:,} a process", advice)


def _clock(host: str, ahead: float, error: float) -> Check:
    said = f"{abs(ahead):,.3f} s {'ahead of' if ahead > 0 else 'behind'} the driver's, to {error:,.3f} s"
    advice = "Set it by NTP: start chrony or systemd-timesyncd there."
    return _check("clock", host, abs(ahead) - error <= _SKEW_SECONDS, said, advice)


def _skew(now: Callable[[], float], clock: Callable[[], float] = time.time) -> tuple[float, float]:
    """Seconds that another clock is ahead, and how wrong that may be: from the middle of the quickest question."""
    rounds = list[tuple[float, float]]()
    for _ in range(_ROUNDS):
        asked, said, answered = clock(), now(), clock()
        rounds.append(((answered - asked) / 2, said - (asked + answered) / 2))
    error, ahead = min(rounds)
    return ahead, error


def _now(node: str) -> float:
    [(_, said)] = session.ask([{"NodeID": node}], "clock", lambda *_: time.time(), Path())
    if isinstance(said, Exception):
        raise Unreachable(f"the node has gone: {session.last_line(said)}", node)
    return float(said)


def _fits(host: str, found: Facts, opened: Opened, takes: Demand) -> Iterator[Check]:
    """Whether a node sees the plan's catalogue, has room to lay it out, and writes a checkpoint in time."""
    where = catalogue_path(opened.plan, opened.places)
    if opened.plan.catalogue.path is None and mirror.of(where) is not None:
        yield Check("catalogue", True, host, "it is rendered there")
    else:
        said = f"{mirror.shown(where)} is {'' if found.catalogue else 'not '}there"
        yield _check("catalogue", host, found.catalogue, said, "Put it where every node sees it, under the same path.")
    if takes.cache:
        said = f"{_gigabytes(found.free_cache)} are free, the catalogue takes {_gigabytes(takes.cache)}"
        lacks = takes.cache > found.free_cache
        rest = ": what has no room is read from its shards, each epoch; ALIPROD_CACHE may name a larger disk"
        yield Check("own disk", True, host, said + rest * lacks)
    if found.write and (largest := max(takes.resume.values(), default=0) / 2):
        seconds = largest / found.write
        said = f"a checkpoint of {_gigabytes(largest)} takes {seconds:,.0f} s"
        advice = "That counts as a hang: raise [cluster] watchdog_seconds, or take a faster storage."
        yield _check("checkpoints", host, not seconds > opened.plan.cluster.watchdog_seconds, said, advice)


def _room(opened: Opened, takes: Demand | None) -> Iterator[Check]:
    """Whether the plan's ranks and its files have room."""
    if takes is None:
        yield _check("room", None, opened.plan.catalogue.path is None, opened.note, "Put the catalogue there.")
        return
    nodes, settings = session.nodes(), opened.plan.cluster
    todo = lacking(targets_on(opened, nodes), opened.places.storage)
    try:
        check_room(todo, session.machines(settings))
        yield Check("ranks", True, None, "every job finds its room")
    except AliprodError as error:
        yield _failed("ranks", error)
    trains = [target.resources for target in todo.values() if target.kind == "training"]
    side = max((sum(slots(node.resources, rank) for node in nodes) for rank in trains), default=0)
    yield _disk(opened.places.storage, takes, min(side, settings.max_parallel_jobs or side))


def _disk(storage: Path, takes: Demand, side: int) -> Check:
    """side: jobs that run side by side, each with two checkpoints."""
    if mirror.of(storage) is not None:
        return Check("room", True, None, "a bucket has room; of the disks, see above")
    free = shutil.disk_usage(nearest_folder(storage)).free
    kept, resume = sum(takes.kept.values()), sum(heapq.nlargest(side, takes.resume.values()))
    if math.isnan(kept + resume):
        return Check("room", True, None, f"{_gigabytes(free)} are free; what the plan's networks take is not known")
    said = f"{_gigabytes(free)} are free, the plan takes {_gigabytes(kept)}, and its checkpoints {_gigabytes(resume)}"
    advice = "Make room, or take another --storage; `aliprod plan` says what each job takes."
    return _check("room", None, kept + resume <= free, said, advice)


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:,.1f} GB"

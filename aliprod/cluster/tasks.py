"""A target on the cluster: a training goes to the launcher, all else becomes Ray tasks, each rank on its node."""

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from aliprod.build.room import Node, Room, slots
from aliprod.build.schedule import Change, Outcome
from aliprod.build.target import NOTHING, Resources, Site, Target
from aliprod.cluster import session
from aliprod.cluster.launch import Start
from aliprod.errors import AliprodError
from aliprod.store import commit
from aliprod.store.layout import newest_step
from aliprod.store.lease import Leases
from aliprod.store.resumable import finished_shards

TICK_SECONDS = 0.2
_ASK_AGAIN_SECONDS = 5.0
_PATIENCE_SECONDS = 10.0  # a rank's process starts in as many
_LOST_SECONDS = 20.0  # in which Ray Train notices that a node is gone, if it ever does
_LEASE_SECONDS = _HELD_SECONDS = 1.0
_PROBES, _PROBE_SECONDS = 60, 60.0  # of a node that cannot be used, and between two
_PAUSED = Outcome("paused")


@dataclass(eq=False)
class Pending:
    """A target that is being made.

    Attributes:
        refs: Ray's, of what has not ended.
        stopped: it was asked to.
        whole: the task that is left makes all that the others have not.
        lost: when one of its nodes was seen to be gone.
    """

    start: Start
    refs: list[Any]
    stopped: bool = False
    whole: bool = False
    lost: float = math.inf

    @property
    def trains(self) -> bool:
        return self.start.target.kind == "training"


class RayRunner:
    """Makes targets on the cluster.

    Args:
        launcher: of `aliprod.cluster.launch.start_launcher`, where anything is to be trained.
        stopping: whether nothing more is to be started, and what runs is to stop.
        current: a target as it is now that what it needs is made.
        estimate: seconds that a target takes at a world size.
        leases: of the driver, who holds one of each training that runs.
    Attributes:
        there: the nodes, when they were last asked for.
        refused: why nodes that came later are not used, for people.
    """

    def __init__(
        self,
        site: Site,
        launcher: Any,
        stopping: Callable[[], bool],
        current: Callable[[Target], Target],
        estimate: Callable[[Target, int], float],
        leases: Leases,
    ) -> None:
        self.site, self.launcher, self.stopping, self.current = site, launcher, stopping, current
        self.estimate, self.leases = estimate, leases
        self.numbers, self.begun, self.works = count(), frozenset[int](), dict[str, Pending]()
        self.sharing = {node.name: True for node in session.nodes()}  # the storage path; those of now are probed
        self.there, self.refused = list[Node](), list[str]()
        self.targets = dict[str, Target]()  # as they were when they were started, or have paused
        self.losses = dict[str, tuple[int | None, int]]()  # of nodes, since a step or a shard
        self.others = dict[str, tuple[str, float]]()  # who trains what elsewhere, and until when that is believed
        self.held, self.held_until = dict[str, Resources](), 0.0  # by other drivers, of each node
        self.answer: Any = None
        self.wanted, self.asked, self.asked_at = Counter[Resources](), dict[Any, Resources](), 0.0

    def now(self) -> float:
        return time.monotonic()

    def nodes(self) -> Sequence[Node]:
        """Those that stay and share the storage path, with what other drivers leave of them; one that is new is asked
        first."""
        found = session.nodes()
        for node in found:
            if node.name not in self.sharing:
                self.sharing[node.name] = False
                threading.Thread(target=self._probe, args=(node.name,), daemon=True).start()
        if self.now() >= self.held_until:
            self.held, self.held_until = session.held_by_others(), self.now() + _HELD_SECONDS
        sharing = (node for node in found if self.sharing[node.name])
        self.there = [Node(node.name, node.resources - self.held.get(node.name, NOTHING)) for node in sharing]
        return self.there

    def types(self) -> Sequence[Resources]:
        return session.types(self.site.cluster)

    def seconds(self, target: Target, world_size: int) -> float:
        return self.estimate(self.targets.get(target.name, target), world_size)

    def start(self, target: Target, nodes: Sequence[str]) -> Pending:
        """Start to make a target, a rank on each of the nodes."""
        target = self.targets[target.name] = self.current(target)
        start = Start(next(self.numbers), target, tuple(nodes))
        if target.kind == "training":
            refs = [self._train(start)]
        else:
            refs = [self._task(start, node, (part, len(nodes))) for part, node in enumerate(nodes)]
        self.works[target.name] = Pending(start, refs)
        return self.works[target.name]

    def stop(self, handle: Pending) -> None:
        """Ask it to end: a training with a checkpoint at its next step; a prediction keeps its finished shards."""
        handle.stopped = True
        if not handle.trains:
            for ref in handle.refs:
                ray.cancel(ref, force=True)

    def request(self, ranks: Sequence[Resources]) -> None:
        """Have a cluster that grows start nodes for ranks that have no room.

        Tasks that do nothing wait for that room: they end with this driver, however that ends, where a request to
        the autoscaler itself would stay, and keep nodes that nobody uses.
        """
        self.wanted, self.asked_at = Counter(ranks if self.types() else ()), self.now()
        lacking = Counter(self.wanted)
        for ref, rank in list(self.asked.items()):
            if lacking[rank]:
                lacking[rank] -= 1
            else:
                ray.cancel(ref)
                del self.asked[ref]
        for rank in lacking.elements():
            named: dict[str, Any] = {"num_cpus": rank.cpus, "num_gpus": rank.gpus, "name": "waits for a node"}
            self.asked[_nothing.options(**named).remote()] = rank

    def wait(self, handles: Sequence[Pending], patience: float) -> list[tuple[Pending, Outcome]]:
        """Wait a moment for any of the handles; those that ended."""
        for handle in handles if self.stopping() else self._displaced(handles):
            if not handle.stopped:
                self.stop(handle)
        self._talk(handles)
        if self.wanted and self.now() - self.asked_at > _ASK_AGAIN_SECONDS:
            done, _ = ray.wait(list(self.asked), num_returns=len(self.asked), timeout=0)
            self.asked = {ref: rank for ref, rank in self.asked.items() if ref not in done}
            self.request(list(self.wanted.elements()))
        if refs := [ref for handle in handles for ref in handle.refs]:
            ray.wait(refs, num_returns=1, timeout=min(patience, TICK_SECONDS))
        else:
            time.sleep(min(patience, TICK_SECONDS))
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        for handle in handles:
            if not alive.issuperset(handle.start.nodes):
                handle.lost = min(handle.lost, self.now())
        ended = [(handle, outcome) for handle in handles if (outcome := self._outcome(handle))]
        for handle, _ in ended:
            self.leases.release(str(handle.start.target.key))
        return ended

    def _displaced(self, handles: Sequence[Pending]) -> Iterator[Pending]:
        """Trainings that have not begun, and whose room another driver has taken meanwhile."""
        waiting = [handle for handle in handles if not self.has_begun(handle)]
        if not waiting:
            return
        room = Room(self.nodes())
        for handle in (one for one in handles if one not in waiting):
            room.take(handle.start.target.resources, handle.start.nodes)
        for handle in waiting:
            rank = handle.start.target.resources
            ranks = Counter(name for name in handle.start.nodes if name in self.held)
            if any(slots(room.free.get(name, NOTHING), rank) < n for name, n in ranks.items()):
                yield handle

    def elsewhere(self, target: Target) -> str:
        """Which other driver trains a target now; '' where none does. Asked once a second: it may be a question to a
        bucket."""
        if target.kind != "training":
            return ""
        answer, until = self.others.get(target.name, ("", 0.0))
        if self.now() >= until:
            answer = self.leases.holder(str(target.key))
            self.others[target.name] = answer, self.now() + _LEASE_SECONDS
        return answer

    def has_begun(self, work: Pending) -> bool:
        """Whether Ray has placed it, and its first rank is at work."""
        return not work.trains or work.start.number in self.begun

    def as_begun(self, changes: Iterable[Change | None]) -> Iterator[Change | None]:
        """Say that a target has been started once it has begun; until then, after some seconds, that it waits."""
        held, since = dict[str, Change](), dict[str, float]()
        for change in changes:
            for name in [name for name in held if self.has_begun(self.works[name])]:
                yield held.pop(name)
            if change is None:
                for name in [name for name in held if self.now() - since.get(name, math.inf) > _PATIENCE_SECONDS]:
                    del since[name]
                    ranks = len(held[name].nodes)
                    yield Change(name, "waiting", f"waiting for Ray to start {ranks} rank{'s' if ranks > 1 else ''}")
            elif change.state == "started":
                held[change.name], since[change.name] = change, self.now()
                continue
            elif (started := held.pop(change.name, None)) is not None and change.state != "paused":
                yield started
            yield change

    def _probe(self, node: str) -> None:
        """Ask a node until it shares the storage path, which may be mounted later than Ray is started."""
        for number in range(_PROBES):
            if number:
                time.sleep(_PROBE_SECONDS)
            try:
                if ray.is_initialized():
                    session.probe(self.site.storage, node)
                    self.sharing[node] = True
                return
            except (AliprodError, ray.exceptions.RayError) as error:
                if not number:
                    self.refused.append(f"A node is not used until it answers otherwise: {error}")

    def _talk(self, handles: Sequence[Pending]) -> None:
        """Tell the launcher what is to stop, and hear from it what has begun."""
        if self.launcher is None or (self.answer is not None and not ray.wait([self.answer], timeout=0)[0]):
            return
        if self.answer is not None:
            with suppress(ray.exceptions.RayError):  # the launcher may be about to start anew
                self.begun = ray.get(self.answer)
        self.answer = self.launcher.hear.remote(frozenset(h.start.number for h in handles if h.stopped))

    def _outcome(self, handle: Pending) -> Outcome | None:
        """How it has ended; None where it has not."""
        start = handle.start
        if handle.trains and self.stopping() and not self.has_begun(handle):
            return _PAUSED  # nothing is lost where it ends with its session of Ray
        done, handle.refs = ray.wait(handle.refs, num_returns=len(handle.refs), timeout=0)
        if bad := next((found for found in map(_result, done) if found.state != "done"), None):
            for ref in handle.refs:
                ray.cancel(ref, force=True)
            return self._unfinished(handle, bad)
        if handle.trains and self.now() - handle.lost > _LOST_SECONDS:  # Ray Train waits for ranks that cannot begin
            self.launcher.free.remote()
            return self._unfinished(handle, _PAUSED)
        if handle.refs:
            return None
        parts = len(start.nodes) > 1 and not handle.trains and not handle.whole
        if parts and start.target.record(self.site.storage) is None:  # what others have written may be seen later
            handle.refs, handle.whole = [self._task(start, start.nodes[0], (0, 1))], True
            return None
        return Outcome("done")

    def _unfinished(self, handle: Pending, outcome: Outcome) -> Outcome:
        """What the scheduler is told of something that was stopped, has failed, or has lost a node."""
        target, name = handle.start.target, handle.start.target.name
        lost = not {node.name for node in session.nodes()}.issuperset(handle.start.nodes)
        if not handle.stopped and not lost:
            return outcome
        self.targets[name] = self.current(target)
        if lost and not handle.stopped:
            kept = self._kept(handle)
            since, times = self.losses.get(name, (kept, 0))
            self.losses[name] = (kept, times + 1 if since == kept else 1)
            if self.losses[name][1] > self.site.cluster.max_failures:
                return Outcome("failed", f"its nodes were lost {times + 1} times without a new checkpoint.")
        return _PAUSED

    def _kept(self, handle: Pending) -> int | None:
        """How far something is that has lost a node: the step of its newest checkpoint, or how many shards there are
        of it and what is made beside it."""
        folder = handle.start.target.folder(self.site.storage)
        if handle.trains:
            return newest_step(folder.parent)
        with suppress(AliprodError):
            commit.refresh(folder.parent)
        return finished_shards(folder.parent)

    def _task(self, start: Start, node: str, part: tuple[int, int]) -> Any:
        target, there = start.target, NodeAffinitySchedulingStrategy(node, soft=False)
        named: dict[str, Any] = {"name": target.name, "scheduling_strategy": there}
        options = _make.options(num_cpus=target.resources.cpus, num_gpus=target.resources.gpus, **named)
        return options.remote(target, replace(self.site, part=part))

    def _train(self, start: Start) -> Any:
        """Launch a training once its lease is ours. Another driver may have it by now, or may have finished it."""
        if holder := self.leases.take(str(start.target.key)):
            self.others[start.target.name] = holder, self.now() + _LEASE_SECONDS
            return ray.put(_PAUSED)
        if start.target.record(self.site.storage) is not None:
            return ray.put(Outcome("done"))
        return self.launcher.fit.options(name=start.target.name).remote(start)  # by which the dashboard lists it


@ray.remote(max_retries=3)
def _make(target: Target, site: Site) -> Outcome:
    if target.record(site.storage) is not None:
        return Outcome("done")
    try:
        target.make(target, site)
    except AliprodError as error:
        return Outcome("failed", str(error))
    return Outcome("done")


@ray.remote(max_retries=0)
def _nothing() -> None:
    """Wait for room, no more."""


def _result(ref: Any) -> Outcome:
    try:
        outcome: Outcome = ray.get(ref)
    except ray.exceptions.RayError as error:
        return Outcome("failed", f"{type(error).__name__}: {session.last_line(error)}")
    return outcome

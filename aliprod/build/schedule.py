"""The scheduler: it makes all targets of a graph, as `aliprod.build.allot` divides the room among them.

How a target is started, stopped and waited for is given, so that the same code runs on a cluster and on a simulated
clock.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal, Protocol

from aliprod.build.allot import Paths, Running, Situation, decide
from aliprod.build.room import Node
from aliprod.build.target import Resources, Target

_ELSEWHERE_SECONDS = 5.0  # between two looks at what other drivers make
_SURPRISE = 0.2  # by which a rate must differ from what was known for the room to be divided anew


@dataclass(frozen=True)
class Outcome:
    """How something ended: as it should, for good, or with a checkpoint since it was asked to. ``detail``: why it
    failed."""

    state: Literal["done", "failed", "paused"]
    detail: str = ""


class Runner(Protocol):
    """Whatever makes targets: a Ray cluster, or a clock."""

    def now(self) -> float:
        """Seconds, of a clock that only goes forward."""

    def nodes(self) -> Sequence[Node]:
        """Those that are there, and are not about to go."""

    def types(self) -> Sequence[Resources]:
        """Nodes that the cluster may still start by itself, one entry each; () where it cannot."""

    def elsewhere(self, target: Target, /) -> str:
        """Which other driver makes a target now; '' where none does."""

    def seconds(self, target: Target, world_size: int) -> float:
        """What a target takes from the checkpoint that it began with, or would begin with, at the rates known now."""

    def start(self, target: Target, nodes: Sequence[str]) -> Any:
        """Begin to make a target, a rank on each of the nodes named; a handle."""

    def stop(self, handle: Any) -> None:
        """Ask it to end with a checkpoint."""

    def request(self, ranks: Sequence[Resources]) -> None:
        """Tell a cluster that grows what there is no room for."""

    def wait(self, handles: list[Any], patience: float) -> list[tuple[Any, Outcome]]:
        """Wait a moment, ``patience`` seconds at most, for any of the handles; those that ended."""

    def stopping(self) -> bool:
        """Whether nothing more is to be started."""


@dataclass(frozen=True)
class Change:
    """A target has been started, waits, is paused to go on otherwise, is done, has failed, or will not be made.
    ``detail``: what it waits for, why it failed, or which failure drops it. ``nodes``: of each rank of one that was
    started."""

    name: str
    state: Literal["started", "waiting", "paused", "done", "failed", "dropped"]
    detail: str = ""
    nodes: tuple[str, ...] = ()


def execute(
    targets: Mapping[str, Target],
    runner: Runner,
    most: int | None = None,
    running: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
) -> Iterator[Change | None]:
    """Make all targets, each behind what it needs. A need that is not among them is made. One that fails drops those
    that need it, and nothing else. ``most``: targets side by side. ``running``: the nodes of each that runs at the
    beginning; it is started there first. Yields each change, and None after each wait, for whoever watches what runs.
    """
    making = _Making(targets, runner, most, running)
    while making.waiting or making.running:
        if runner.stopping():
            making.waiting.clear()
            making.again = math.inf
            if not making.running:
                return
        elif making.surprised():
            yield from making.divide()
        yield from making.ended()
        yield None


class _Making:
    """What waits, what runs, and how the room was divided when it last was."""

    def __init__(
        self, targets: Mapping[str, Target], runner: Runner, most: int | None, running: Mapping[str, tuple[str, ...]]
    ) -> None:
        self.targets, self.waiting, self.runner, self.most = dict(targets), dict(targets), runner, most
        self.running, self.handles = dict[str, Running](), dict[str, Any]()
        self.again, self.said, self.wanted = runner.now(), dict[str, str](), list[Resources]()
        self.nodes, self.before = list[Node](), dict[str, int]()  # ranks of each that was given others
        self.paths = Paths.of(targets, runner.seconds)
        for name, nodes in running.items():
            self._start(name, nodes)
        self.paces = {name: self._pace(name) for name in self.running}

    def surprised(self) -> bool:
        """Whether anything is otherwise than when the room was divided."""
        due = self.runner.now() >= self.again or list(self.runner.nodes()) != self.nodes
        return due or self._surprising()

    def divide(self) -> Iterator[Change]:
        """Divide the room, stop and start what that asks for."""
        self.nodes = list(self.runner.nodes())
        left = {name: self.targets[name] for name in self.targets if name in self.waiting or name in self.running}
        now = self.runner.now()
        running = {name: replace(one, share=self._share(name)) for name, one in self.running.items()}
        if self._surprising():
            self.paths = Paths.of(left, self.runner.seconds)
        others = self._elsewhere(left)
        decision = decide(Situation(left, running, self.nodes, self.paths, now, self.runner.types(), self.most, others))
        self.again = now + min(decision.patience, _ELSEWHERE_SECONDS if others else math.inf)
        there = {node.name for node in self.nodes}
        for name in decision.stop:
            one = self.running[name] = replace(self.running[name], stopping=True)
            self.before[name] = len(one.nodes) if there.issuperset(one.nodes) else 0
            self.runner.stop(self.handles[name])
        for name, nodes in decision.start.items():
            self._start(name, nodes)
            self.said.pop(name, None)
            yield Change(name, "started", nodes=nodes)
        self.paces = {name: self._pace(name) for name in self.running}
        if decision.wanted != self.wanted:
            self.wanted = list(decision.wanted)
            self.runner.request(self.wanted)
        for name, words in decision.waiting.items():
            if self.said.get(name) != words:
                self.said[name] = words
                yield Change(name, "waiting", words)

    def ended(self) -> Iterator[Change]:
        """Wait for anything to end, and see what that means for the others."""
        patience = max(0.0, self.again - self.runner.now())
        for handle, outcome in self.runner.wait(list(self.handles.values()), patience):
            name = next(name for name, one in self.handles.items() if one == handle)
            del self.handles[name], self.running[name]
            self.paces.pop(name, None)
            self.again = self.runner.now()
            yield Change(name, outcome.state, outcome.detail)
            if outcome.state == "paused":
                self.waiting[name] = self.targets[name]
                self.paths = self.paths.renewed(self.targets[name], self.runner.seconds)
            elif outcome.state == "failed":
                yield from self._drop(name)

    def _start(self, name: str, nodes: tuple[str, ...]) -> None:
        self.handles[name] = self.runner.start(self.waiting.pop(name), nodes)
        self.running[name] = Running(nodes, self.runner.now(), before=self.before.get(name, 0))

    def _elsewhere(self, left: Mapping[str, Target]) -> dict[str, str]:
        """What could run, and another driver makes, with who that is."""
        ready = [one for one in self.waiting.values() if not any(need.name in left for need in one.needed())]
        return {target.name: words for target in ready if (words := self.runner.elsewhere(target))}

    def _pace(self, name: str) -> float:
        return self.runner.seconds(self.targets[name], len(self.running[name].nodes))

    def _surprising(self) -> bool:
        """Whether a rate is another than when the paths were measured."""
        return any(abs(self._pace(name) / pace - 1) > _SURPRISE for name, pace in self.paces.items() if pace)

    def _share(self, name: str) -> float:
        """What is left of a target that runs, of what it began with."""
        pace = self._pace(name)
        return max(0.0, 1 - (self.runner.now() - self.running[name].since) / pace) if pace else 0.0

    def _drop(self, failed: str) -> Iterator[Change]:
        """Take out of what waits whatever needs a failed target, directly or not."""
        lost = {failed}
        for name in [name for name in self.targets if name in self.waiting]:  # needs come before those that need them
            if any(need.name in lost for need in self.waiting[name].needed()):
                lost.add(name)
                del self.waiting[name]
                yield Change(name, "dropped", failed)

"""A simulated cluster: what is started ends when its seconds are over, and waiting takes no time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from aliprod.build.room import Node
from aliprod.build.schedule import Outcome
from aliprod.build.target import Resources, Target


class Span(NamedTuple):
    """A stretch of time, in seconds from the clock's beginning, in which a target was made by so many ranks."""

    begin: float
    end: float
    ranks: int


@dataclass(frozen=True)
class _Begun:
    target: Target
    nodes: tuple[str, ...]
    begin: float
    works: float  # from when on
    end: float


class Clock:
    """Stands for a cluster of fixed nodes.

    Args:
        seconds: that a target takes at a world size.
        starting: seconds that the start of a training takes. again: those of every other start of it.
    Attributes:
        spans: when each target was being made.
    """

    def __init__(
        self, nodes: Sequence[Node], seconds: Callable[[Target, int], float], starting: float, again: float
    ) -> None:
        self._nodes, self._seconds, self.starting, self.again, self.time = nodes, seconds, starting, again, 0.0
        self.spans: dict[str, list[Span]] = {}
        self._left: dict[str, float] = {}
        self._begun: dict[str, _Begun] = {}
        self._stopped: list[str] = []

    def now(self) -> float:
        return self.time

    def nodes(self) -> Sequence[Node]:
        return self._nodes

    def types(self) -> Sequence[Resources]:
        return ()

    def stopping(self) -> bool:
        return False

    def elsewhere(self, _: Target) -> str:
        return ""

    def seconds(self, target: Target, world_size: int) -> float:
        return self._seconds(target, world_size) * self._left.get(target.name, 1.0)

    def start(self, target: Target, nodes: Sequence[str]) -> str:
        starting = self.again if target.name in self.spans else self.starting
        works = self.time + (starting if target.kind == "training" else 0.0)
        end = works + self.seconds(target, len(nodes))
        self._begun[target.name] = _Begun(target, tuple(nodes), self.time, works, end)
        return target.name

    def stop(self, handle: str) -> None:
        self._stopped.append(handle)

    def request(self, ranks: Sequence[Resources]) -> None:
        """Nothing grows here."""

    def wait(self, handles: Sequence[str], patience: float) -> list[tuple[str, Outcome]]:
        """To the next end; all that end then. What was stopped has ended already."""
        if paused := self._stopped:
            self._stopped = []
            return [(name, self._pause(name)) for name in paused]
        self.time = min([self.time + patience, *(self._begun[name].end for name in handles)])
        over = [name for name in handles if self._begun[name].end <= self.time]
        for name in over:
            self._note(self._begun.pop(name))
        return [(name, Outcome("done")) for name in over]

    def _pause(self, name: str) -> Outcome:
        one = self._begun.pop(name)
        self._note(one)
        if one.end > one.works:
            self._left[name] = self._left.get(name, 1.0) * min(1.0, (one.end - self.time) / (one.end - one.works))
        return Outcome("paused")

    def _note(self, one: _Begun) -> None:
        self.spans.setdefault(one.target.name, []).append(Span(one.begin, self.time, len(one.nodes)))

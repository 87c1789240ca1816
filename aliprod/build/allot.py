"""Who gets how many ranks, and on which nodes: a pure function of what is left, what runs and what room there is.

A plan cannot end before its longest path at its widest has, nor before all work, spread evenly over the room, is done:
the later of the two is the deadline. Each target that could run gets the fewest ranks with which its path meets the
deadline, the longest path first; what is left over doubles the ranks of whichever path is then the longest.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from aliprod.build.room import Node, Room, slots
from aliprod.build.target import Resources, Target

RESTART_SECONDS = 15.0  # that a target loses where it is stopped and started again
_AGAIN_SECONDS = 1.0  # between two looks at least: to less than its last digit a clock cannot be put on
CALM_SECONDS = 10 * RESTART_SECONDS  # that lie between two changes of a target, and that one must have left for another
BACK_SECONDS = 10 * CALM_SECONDS  # that lie between a change and another one back to the ranks from before

Seconds = tuple[float, ...]  # at each number of ranks


@dataclass(frozen=True)
class Paths:
    """Seconds of the longest paths that are left."""

    targets: Mapping[str, Target]
    columns: Mapping[int, int]  # numbers of ranks, ascending, and where each stands in `Seconds`
    alone: Mapping[str, Seconds]  # of each target by itself
    below: Mapping[str, Seconds]  # of the longest path of what needs it, all with so many ranks or as many as they can
    trains: frozenset[str]  # those that are trainings, or needed by one: they go before all else
    rank: Resources  # the largest; room is counted in such ranks

    @classmethod
    def of(cls, targets: Mapping[str, Target], seconds: Callable[[Target, int], float]) -> "Paths":
        """Measure the paths of targets, each behind what it needs. ``seconds``: that a target takes at a world size."""
        sizes = sorted({1, *(size for target in targets.values() for size in target.world_sizes)})
        below, trains, alone = dict.fromkeys(targets, (0.0,) * len(sizes)), set[str](), dict[str, Seconds]()
        for name, target in reversed(list(targets.items())):
            alone[name] = _at_each(target, sizes, seconds)
            whole = tuple(own + after for own, after in zip(alone[name], below[name], strict=True))
            if target.kind == "training":
                trains.add(name)
            for need in target.needed():
                if need.name in below:
                    below[need.name] = tuple(map(max, below[need.name], whole))
                    if name in trains:
                        trains.add(need.name)
        takes = (target.resources for target in targets.values())
        rank = max(takes, key=lambda rank: (rank.gpus, rank.cpus), default=Resources(0, 0))
        columns = {size: column for column, size in enumerate(sizes)}
        return cls(targets, columns, alone, below, frozenset(trains), rank)

    def left(self, targets: Mapping[str, Target], shares: Mapping[str, float]) -> "Paths":
        """The same of those targets that are not made yet. ``shares``: what is left of those that run."""
        alone = {name: self.alone[name] for name in targets}
        for name, share in shares.items():
            alone[name] = tuple(share * seconds for seconds in alone[name])
        return replace(self, targets=targets, alone=alone)

    def renewed(self, target: Target, seconds: Callable[[Target, int], float]) -> "Paths":
        """The same, where a target takes other seconds than before, and nothing that it needs is to be made."""
        return replace(self, alone={**self.alone, target.name: _at_each(target, self.columns, seconds)})

    def in_order(self, names: Iterable[str]) -> list[str]:
        """The longest path first; a prediction after all that a training waits for."""
        return sorted(names, key=lambda name: (name not in self.trains, -self.alone[name][0] - self.below[name][0]))

    def own(self, name: str, size: int) -> float:
        """A target's seconds."""
        return self.alone[name][self.columns[size]]

    def seconds(self, name: str, size: int = 0) -> float:
        """A path's, with so many ranks for the target itself and the most for what follows; 0: the most for itself."""
        return (self.own(name, size) if size else self.alone[name][-1]) + self.below[name][-1]

    def weight(self, name: str) -> float:
        """How much of the largest rank a target's is."""
        takes, rank = self.targets[name].resources, self.rank
        return takes.gpus / rank.gpus if rank.gpus else takes.cpus / max(1, rank.cpus)

    def work(self, name: str, size: int) -> float:
        """Seconds of all ranks of a target together."""
        return self.own(name, size) * size * self.weight(name)

    @cached_property
    def least_work(self) -> float:
        """Of all targets, with the fewest ranks."""
        return sum(self.work(name, target.floor) for name, target in self.targets.items())

    @cached_property
    def longest(self) -> float:
        """Path, all with the most ranks."""
        return max((self.seconds(name) for name in self.targets), default=0.0)

    def deadline(self, slots: int) -> float:
        """Seconds that no schedule goes below, where so many ranks run at a time."""
        return max(self.least_work / max(1, slots), self.longest)

    def needed(self, name: str, deadline: float) -> int:
        """The fewest ranks with which a path ends by then; the most where none does."""
        found = zip(self.columns, self.alone[name], self.below[name], strict=True)
        return next((size for size, own, after in found if own + after <= deadline), max(self.columns))


@dataclass(frozen=True)
class Running:
    """A target that is being made."""

    nodes: tuple[str, ...]  # of each rank
    since: float  # when it began there
    share: float = 1.0  # of what it began with, that is left
    stopping: bool = False  # it has been asked to end with a checkpoint, and holds its room until it has
    before: int = 0  # how many ranks it had before it was last given others; 0: it was not


@dataclass(frozen=True)
class Situation:
    """What a decision depends on."""

    targets: Mapping[str, Target]  # all that are not made, each behind what it needs
    running: Mapping[str, Running]
    nodes: Sequence[Node]
    paths: Paths  # of these targets and others, each as if it just began
    now: float = 0.0
    types: Sequence[Resources] = ()  # of the nodes that the cluster may still start by itself, one entry a node
    most: int | None = None  # targets side by side
    elsewhere: Mapping[str, str] = field(default_factory=dict)  # what another driver makes, with who that is

    @property
    def slots(self) -> int:
        """How many of the largest ranks the nodes hold."""
        return sum(slots(node.resources, self.paths.rank) for node in self.nodes)


@dataclass(frozen=True)
class Decision:
    """What to do now."""

    start: Mapping[str, tuple[str, ...]]  # the node of each rank, by target
    stop: Sequence[str]  # what is to end with a checkpoint, to go on otherwise
    waiting: Mapping[str, str]  # what each target waits for that neither runs nor starts, in words
    wanted: Sequence[Resources]  # ranks for which there is no room
    patience: float  # seconds after which to look again, whatever happens


def decide(situation: Situation) -> Decision:
    """Say what to start, where, and what to stop so that it goes on with more or fewer ranks."""
    running = situation.running
    paths = situation.paths.left(situation.targets, {name: one.share for name, one in running.items()})
    blocked = dict(_blocked(situation))
    runnable = [*running, *(name for name in situation.targets if name not in blocked and name not in running)]
    line = situation.paths.in_order(runnable)  # as each began: what has been worked on does not lose its turn by that
    there = {node.name for node in situation.nodes}
    stoppable = (name for name in running if situation.targets[name].world_sizes)
    leaving = {name for name in stoppable if not there.issuperset(running[name].nodes)}  # a node is about to go
    keep = {name for name, one in running.items() if not one.stopping} - leaving
    held = {name for name in keep if not _may_change(situation, paths, name)}
    sizes = _divide(situation, paths, line, keep)
    if held != keep:
        other = _divide(situation, paths, line, held)
        while back := {name for name in keep - held if _goes_back(situation, name, other[name])}:
            held |= back
            other = _divide(situation, paths, line, held)
        gain = _makespan(situation, paths, sizes) - _makespan(situation, paths, other)
        sizes = other if gain > RESTART_SECONDS else sizes
    stop = [name for name in line if name in keep and sizes[name] != len(running[name].nodes)]
    stop += [name for name in leaving if not running[name].stopping]
    start, room = _start(situation, line, sizes, bool(stop))
    began = [running[name].since - situation.now for name in held]
    calm = (limit + since for since in began for limit in (CALM_SECONDS, BACK_SECONDS))
    return Decision(
        start,
        stop,
        blocked | _short_of_room(situation, line, start, room),
        _wanted(situation, paths, line, sizes),
        max(_AGAIN_SECONDS, min((seconds for seconds in calm if seconds > 0), default=math.inf)),
    )


def _blocked(situation: Situation) -> Iterator[tuple[str, str]]:
    """What cannot run yet, with what it waits for."""
    for name, target in situation.targets.items():
        needs = [need.name for need in target.needed() if need.name in situation.targets]
        if words := [*needs, *filter(None, [situation.elsewhere.get(name)])]:
            yield name, f"waiting for {words[0]}"


def _may_change(situation: Situation, paths: Paths, name: str) -> bool:
    """Whether a target has run for long enough, and has enough left, to be started again otherwise."""
    one = situation.running[name]
    left = paths.own(name, len(one.nodes))
    return bool(situation.targets[name].world_sizes) and min(left, situation.now - one.since) >= CALM_SECONDS


def _goes_back(situation: Situation, name: str, size: int) -> bool:
    """Whether a target that was changed not long ago would be given the ranks again that it had before."""
    one = situation.running[name]
    return size == one.before != len(one.nodes) and situation.now - one.since < BACK_SECONDS


def _divide(situation: Situation, paths: Paths, line: Sequence[str], held: Iterable[str]) -> dict[str, int]:
    """The ranks of each target; 0: it has to wait. ``line``: what could run, the most urgent first. ``held``: what
    runs, and stays as it is."""
    room, places = Room(situation.nodes), dict[str, tuple[str, ...]]()
    for name in held:
        places[name] = situation.running[name].nodes
        room.take(situation.targets[name].resources, places[name])
    growing, deadline, full = set[str](), paths.deadline(situation.slots), set[Resources]()
    for name in line:
        target = situation.targets[name]
        if name in places or len(places) == situation.most or target.resources in full:
            continue
        if nodes := _place(room, target, paths.needed(name, deadline)):
            places[name] = nodes
            growing.add(name)
            room.take(target.resources, nodes)
            continue
        if not full:
            room.reserve(target.resources, target.floor, situation.nodes)
        full.add(target.resources)
    _widen(paths, room, growing, places)
    return {name: len(places.get(name, ())) for name in line}


def _place(room: Room, target: Target, size: int) -> tuple[str, ...]:
    """Nodes for as many ranks as it can be made with, and there is room for, up to ``size``; () where for none."""
    for fewer in reversed(target.world_sizes or (1,)):
        if fewer <= max(size, target.floor) and (nodes := room.place(target.resources, fewer)):
            return nodes
    return ()


def _widen(paths: Paths, room: Room, growing: set[str], places: dict[str, tuple[str, ...]]) -> None:
    """Double the ranks of the longest path, for as long as there is room."""
    while growing:
        name = max(growing, key=lambda name: (paths.seconds(name, len(places[name])), name))
        target, now = paths.targets[name], places[name]
        larger = min((size for size in target.world_sizes if size > len(now)), default=0)
        room.give(target.resources, now)
        if larger and (nodes := room.place(target.resources, larger)):
            places[name] = nodes
        else:
            growing.remove(name)
        room.take(target.resources, places[name])


def _makespan(situation: Situation, paths: Paths, sizes: Mapping[str, int]) -> float:
    """About when the plan would end: the longest path, or all work over all room, with what idles until the next end,
    when what waits begins."""
    given = {name: size for name, size in sizes.items() if size}
    following = min((paths.own(name, size) for name, size in given.items()), default=0.0)
    longest = max((paths.seconds(name, size) for name, size in given.items()), default=0.0)
    later = max((paths.seconds(name) for name, size in sizes.items() if not size), default=-following)
    work, idle = paths.least_work, float(situation.slots)
    for name, size in given.items():
        work += paths.work(name, size) - paths.work(name, paths.targets[name].floor)
        idle -= paths.weight(name) * size
    return max(longest, following + later, (work + max(0.0, idle) * following) / max(1, situation.slots))


def _start(
    situation: Situation, line: Sequence[str], sizes: Mapping[str, int], stops: bool
) -> tuple[dict[str, tuple[str, ...]], Room]:
    """Nodes for what is to begin and has room now, and the room that is left. ``stops``: something is about to give
    room: what does not fit as it should waits for that."""
    room, start = Room(situation.nodes), dict[str, tuple[str, ...]]()
    for name, one in situation.running.items():
        room.take(situation.targets[name].resources, one.nodes)
        stops = stops or one.stopping
    for name in line:
        full = situation.most is not None and len(situation.running) + len(start) >= situation.most
        if not sizes[name] or name in situation.running or full:
            continue
        target = situation.targets[name]
        nodes = room.place(target.resources, sizes[name]) if stops else _place(room, target, sizes[name])
        if nodes:
            start[name] = nodes
            room.take(target.resources, nodes)
    return start, room


def _short_of_room(
    situation: Situation, line: Sequence[str], start: Mapping[str, object], room: Room
) -> dict[str, str]:
    """What could run, and does not, with what it waits for."""
    waits = [name for name in line if name not in start and name not in situation.running]
    if situation.most is not None and len(situation.running) + len(start) >= situation.most:
        return dict.fromkeys(waits, f"waiting for another to end: max_parallel_jobs = {situation.most}")
    shapes = {(target.resources, target.floor) for target in map(situation.targets.__getitem__, waits)}
    words = {shape: room.lacks(*shape) for shape in shapes}
    return {name: words[situation.targets[name].resources, situation.targets[name].floor] for name in waits}


def _wanted(situation: Situation, paths: Paths, line: Sequence[str], sizes: Mapping[str, int]) -> list[Resources]:
    """Ranks that a larger cluster would be given: as many as the deadline asks for that it would have."""
    if not situation.types:
        return []
    more = sum(slots(machine, paths.rank) for machine in situation.types)
    deadline = paths.deadline(situation.slots + more)
    return [
        situation.targets[name].resources
        for name in line
        for _ in range(situation.targets[name].within(paths.needed(name, deadline)) - sizes[name])
    ]


def _at_each(target: Target, sizes: Iterable[int], seconds: Callable[[Target, int], float]) -> Seconds:
    """Its seconds at each size, or at the nearest below that it may be made with."""
    found = {size: seconds(target, size) for size in target.world_sizes or (1,)}
    return tuple(found[target.within(size)] for size in sizes)

"""How long the way from each target to the end of the plan is, at each world size."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from aliprod.build.target import Resources, Target

Seconds = tuple[float, ...]  # at each of the sizes


@dataclass(frozen=True)
class Paths:
    """Seconds of the longest paths that are left.

    Attributes:
        columns: numbers of ranks, ascending, and where each stands in `Seconds`.
        alone: of each target by itself. below: of the longest path of what needs it, all with so many ranks, or as many
            as they can have.
        trains: those that are trainings, or needed by one: they go before all else.
        rank: the largest; room is counted in such ranks.
    """

    targets: Mapping[str, Target]
    columns: Mapping[int, int]
    alone: Mapping[str, Seconds]
    below: Mapping[str, Seconds]
    trains: frozenset[str]
    rank: Resources

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
        for size, own, after in zip(self.columns, self.alone[name], self.below[name], strict=True):
            if own + after <= deadline:
                return size
        return max(self.columns)


def _at_each(target: Target, sizes: Iterable[int], seconds: Callable[[Target, int], float]) -> Seconds:
    """Its seconds at each size, or at the nearest below that it may be made with."""
    found = {size: seconds(target, size) for size in target.world_sizes or (1,)}
    return tuple(found[target.within(size)] for size in sizes)

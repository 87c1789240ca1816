"""Room is a matter of nodes, not of sums: a rank needs its CPUs and its GPU on one node."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from aliprod.build.target import Resources, Target
from aliprod.errors import Unreachable
from aliprod.plan.schema import Cluster


@dataclass(frozen=True)
class Node:
    """A machine of the cluster: all its resources, busy or not."""

    name: str
    resources: Resources


def slots(free: Resources, rank: Resources) -> int:
    """How many such ranks there is room for; of what takes nothing, one."""
    pairs = ((free.cpus, rank.cpus), (free.gpus, rank.gpus))
    return max(0, min((has // one for has, one in pairs if one > 0), default=1))


class Room:
    """What is free on each node, as it is taken and given back."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        self.free = {node.name: node.resources for node in nodes}

    def place(self, rank: Resources, count: int) -> tuple[str, ...]:
        """The nodes of so many ranks, as few nodes as possible, the fullest that will do; () where there is no room."""
        fits = {name: room for name, free in self.free.items() if (room := slots(free, rank))}
        if sum(fits.values()) < count:
            return ()
        if enough := [name for name, room in fits.items() if room >= count]:
            best = min(enough, key=lambda name: (0 if rank.gpus else self.free[name].gpus, fits[name]))
            return (best,) * count
        largest_first = sorted(fits, key=lambda name: -fits[name])
        return tuple(name for name in largest_first for _ in range(fits[name]))[:count]

    def reserve(self, rank: Resources, count: int, nodes: Iterable[Node]) -> None:
        """Take the room of ranks that have to wait for it, where there is most of it already: what remains is below
        zero, so that nothing smaller takes it before them."""
        for node in sorted(nodes, key=lambda node: -slots(self.free[node.name], rank)):
            taken = min(count, slots(node.resources, rank))
            self.take(rank, (node.name,) * taken)
            count -= taken

    def take(self, rank: Resources, names: Iterable[str]) -> None:
        """Use room; on nodes that are not there, none."""
        for name in names:
            if name in self.free:
                self.free[name] -= rank

    def give(self, rank: Resources, names: Iterable[str]) -> None:
        """Give room back."""
        for name in names:
            if name in self.free:
                self.free[name] += rank

    def lacks(self, rank: Resources, count: int) -> str:
        """What so many ranks wait for, in words."""
        gpus = sum(max(0, free.gpus) for free in self.free.values())
        if rank.gpus and gpus >= rank.gpus * count:
            return f"waiting for room: no node has {_counted(rank.cpus, 'CPU')} free beside a GPU"
        what = _counted(rank.gpus * count, "GPU") if rank.gpus else _counted(rank.cpus * count, "CPU")
        return f"waiting for {what}"


def check_room(targets: Mapping[str, Target], nodes: Iterable[Node]) -> None:
    """Refuse what the nodes can never hold, since it would wait for ever. Unreachable: naming the target and the
    largest node."""
    machines = [node.resources for node in nodes]
    for target in targets.values():
        rank, floor = target.resources, target.floor
        room = sum(slots(machine, rank) for machine in machines)
        if room >= floor:
            continue
        takes = _said(rank) if floor == 1 else f"{floor} ranks of {_said(rank)} each"
        if room:
            what = f"{target.name} takes {takes}, and the nodes have room for {room}."
            raise Unreachable(what, "[cluster]", "Lower ranks, or cpus_per_worker.")
        like = (one for one in machines if (one.gpus > 0) == (rank.gpus > 0))
        largest = max(like, key=lambda one: one.cpus, default=next(iter(machines), None))
        has = "there is none" if largest is None else f"the largest has {_said(largest)}"
        if free := rank.gpus and sum(machine.gpus for machine in machines):
            has += f" ({_counted(free, 'GPU')} in all, and beside none of them {_counted(rank.cpus, 'CPU')})"
        what = f"{target.name} takes {takes}, and no node can hold that: {has}."
        advice = "Lower cpus_per_worker. " if rank.cpus > 1 else ""
        advice += "Without GPUs say use_gpu = false. " if rank.gpus and not free else ""
        raise Unreachable(what, "[cluster]", f"{advice}Where the cluster grows on demand, set max_cpus and max_gpus.")


def uses_gpu(cluster: Cluster, nodes: Sequence[Node]) -> bool:
    """Whether jobs take GPUs: as the plan says, or, left to ``auto``, where any node has one."""
    return any(node.resources.gpus for node in nodes) if cluster.use_gpu == "auto" else cluster.use_gpu


def with_cpus(cluster: Cluster, nodes: Sequence[Node]) -> Cluster:
    """The same, with the CPUs of a rank where the plan does not say how many: what the nodes have for each GPU; without
    GPUs one, since the number of threads is part of a CPU's arithmetic."""
    if cluster.cpus_per_worker is not None:
        return cluster
    gpu = uses_gpu(cluster, nodes)
    shares = [node.resources.cpus // node.resources.gpus for node in nodes if gpu and node.resources.gpus]
    return cluster.model_copy(update={"cpus_per_worker": max(1, min(shares, default=1))})


def _said(resources: Resources) -> str:
    cpus = _counted(resources.cpus, "CPU")
    return f"{cpus} and {_counted(resources.gpus, 'GPU')}" if resources.gpus else cpus


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"

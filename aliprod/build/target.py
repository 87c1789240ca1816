"""What a run makes: one type for a training, a prediction, soft labels, an ensemble, and all else."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from aliprod.catalogue import sources
from aliprod.catalogue.catalogue import Catalogue
from aliprod.catalogue.sources import PLAIN, Reading
from aliprod.errors import Refused
from aliprod.plan.jobs import Job
from aliprod.plan.open import Opened
from aliprod.plan.places import catalogue_path
from aliprod.plan.schema import Cluster, Synth
from aliprod.recipe import Views, never
from aliprod.store import commit, mirror
from aliprod.store.layout import key_of


@dataclass(frozen=True)
class Resources:
    """CPUs and GPUs, of a rank or of a node."""

    cpus: int
    gpus: int

    def __add__(self, other: "Resources") -> "Resources":
        return Resources(self.cpus + other.cpus, self.gpus + other.gpus)

    def __sub__(self, other: "Resources") -> "Resources":
        return Resources(self.cpus - other.cpus, self.gpus - other.gpus)


NOTHING = Resources(0, 0)


@dataclass(frozen=True)
class Site:
    """Where a target is made: paths that every node sees, how the catalogue is read, and the plan's [cluster]."""

    storage: Path
    catalogue: Path
    cluster: Cluster
    stop: Callable[[], bool] = never  # whether to end early; what can go on from a checkpoint writes one
    part: tuple[int, int] = (0, 1)  # which part is made here, of how many: of what several processes make apart
    driver: str = ""  # token of the driver whose leases hold while it is made; "" where none holds any
    reading: Reading = PLAIN
    synth: Synth | None = None  # what the catalogue is rendered from

    @classmethod
    def of(cls, opened: Opened) -> "Site":
        """Where the targets of a plan are made. Refused: its catalogue is not there."""
        opened.read_catalogue()
        path = catalogue_path(opened.plan, opened.places).resolve()
        synth = opened.plan.catalogue.synth if opened.plan.catalogue.path is None else None
        return cls(opened.places.storage, path, opened.plan.cluster, reading=opened.reading, synth=synth)

    def read(self) -> Catalogue:
        """The catalogue, as the plan says it is to be read. Refused: as `sources.read`."""
        if self.synth is not None:
            render(self.synth, self.catalogue)  # no bucket has it, and it is the same everywhere
        return sources.read(mirror.here(self.catalogue), self.reading)


@dataclass(frozen=True)
class Cost:
    """Images that a target takes: the cost model divides them by measured rates."""

    job: Job | None = None  # whose network works
    trained: int = 0  # images forward and backward
    seen: int = 0  # images forward alone, in ``views``
    views: Views = "center"
    known: bool = True  # False where nothing measures beforehand what it takes


@dataclass(frozen=True, eq=False)
class Target:
    """Something that is made once and kept in a committed folder."""

    kind: str
    name: str  # unique in a graph, and people read it
    facts: Mapping[str, Any] | None  # plain JSON, all that the key hashes; None while what it needs is not there yet
    place: str | None  # its folder below the storage path; None while the facts are
    make: Callable[["Target", Site], None]  # in any process, without Ray
    needs: Mapping[str, tuple["Target", ...]] = field(default_factory=dict)  # the targets that it reads, by their role
    cost: Cost = Cost()  # what is left to do
    resources: Resources = Resources(1, 0)  # of one rank
    # Numbers of ranks that it may be made with, ascending; it can be stopped, and goes on with another number. Ranks of
    # a training are a process group, of all else parts of the work (`Site.part`). (): one process makes it in one go.
    world_sizes: tuple[int, ...] = ()
    job: Job | None = None  # the job whose state its failure shows; None: the whole plan's
    goal: bool = False  # made for its own sake; what is no goal is made where something needs it
    first: bool = False  # made before anything else is started, since it may refuse the plan
    latest: bool = False  # its folder has what was made last, of whichever key; otherwise the folder is the key's own

    @property
    def key(self) -> str | None:
        """sha256 of its facts."""
        return None if self.facts is None else key_of(self.facts)

    @property
    def owner(self) -> Job:
        """Its job. ValueError: it belongs to the whole plan."""
        if self.job is None:
            raise ValueError(f"{self.name} belongs to no job")
        return self.job

    @property
    def floor(self) -> int:
        """The fewest ranks that it may be made with."""
        return self.world_sizes[0] if self.world_sizes else 1

    def within(self, size: int) -> int:
        """The most ranks up to ``size`` that it may be made with, else the fewest."""
        return max((one for one in self.world_sizes if one <= size), default=self.floor)

    def needed(self) -> Iterator["Target"]:
        """The targets that it needs, whatever their role."""
        return chain(*self.needs.values())

    def folder(self, storage: Path) -> Path:
        """Its folder. ValueError: it is not known yet."""
        if self.place is None:
            raise ValueError(f"{self.name} has no folder yet: what it needs is not there")
        return storage / self.place

    def record(self, storage: Path) -> dict[str, Any] | None:
        """What its commit record says; None where it is not made."""
        found = None if self.place is None else commit.read(storage / self.place, again=self.latest)
        return None if found is None or (self.latest and found.get("target") != self.key) else found


def render(synth: Synth, path: Path) -> None:
    """Render a catalogue where it is not there. Refused: something else is."""
    if path.exists():
        return
    from aliprod.synth.synth import synthesise

    try:
        synthesise(path, synth.classes, synth.images, synth.seed)
    except Refused:
        if not path.exists():  # else another process was faster, with the same pictures
            raise


def powers_of_two(most: int) -> tuple[int, ...]:
    """1, 2, 4, ... up to ``most``."""
    return tuple(2**power for power in range(most.bit_length()))


def lacking(graph: Mapping[str, Target], storage: Path, goals: Iterable[Target] | None = None) -> dict[str, Target]:
    """The goals of a graph that are not made, and what they need that is not made either, in the graph's order.
    ``goals``: others than the graph's own."""
    asked = [target for target in graph.values() if target.goal] if goals is None else list(goals)
    missing = dict[str, bool]()
    while asked:
        target = asked.pop()
        if target.name not in missing:
            missing[target.name] = target.record(storage) is None
            asked += target.needed() if missing[target.name] else ()
    return {name: target for name, target in graph.items() if missing.get(name)}

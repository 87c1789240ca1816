"""Which target when, with targets that last as long as a clock says that is moved by hand."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import repeat

from hypothesis import given
from hypothesis import strategies as st

from aliprod.build.schedule import Change, execute
from aliprod.build.target import Resources, Target

CAPACITY, SMALL = Resources(4, 2), Resources(1, 0)


def target(name: str, needs: Iterable[Target] = (), resources: Resources = SMALL) -> Target:
    return Target(
        kind="stone",
        name=name,
        facts={},
        place=name,
        make=lambda target, context: (),
        needs={"needs": tuple(needs)},
        resources=resources,
    )


@dataclass
class Machine:
    """Makes each target in as many seconds as it is to last, and writes down which was made when."""

    seconds: dict[str, int]
    failing: frozenset[str] = frozenset()
    clock: int = 0
    ends: dict[str, int] = field(default_factory=dict)
    began: list[tuple[int, str]] = field(default_factory=list)
    ended: dict[str, int] = field(default_factory=dict)
    side_by_side: list[set[str]] = field(default_factory=list)
    stop_at: float = math.inf
    sizes: Iterator[Resources] = field(default_factory=lambda: repeat(CAPACITY))

    def capacity(self) -> Resources:
        return next(self.sizes)

    def stopping(self) -> bool:
        return self.clock >= self.stop_at

    def start(self, target: Target) -> str:
        self.began.append((self.clock, target.name))
        self.ends[target.name] = self.clock + self.seconds[target.name]
        self.side_by_side.append(set(self.ends))
        return f"handle of {target.name}"

    def wait(self, handles: list[str]) -> list[tuple[str, str]]:
        """To the next end; all that end then."""
        assert sorted(handles) == sorted(f"handle of {name}" for name in self.ends)
        self.clock = min(self.ends.values(), default=self.clock + 1)
        over = [name for name, end in self.ends.items() if end == self.clock]
        for name in over:
            del self.ends[name]
            self.ended[name] = self.clock
        return [(f"handle of {name}", "it broke" if name in self.failing else "") for name in over]


@dataclass(frozen=True)
class Case:
    machine: Machine
    targets: list[Target]
    most: int | None = None

    @property
    def needs(self) -> dict[str, list[str]]:
        return {target.name: [need.name for need in target.needed()] for target in self.targets}

    def run(self) -> list[Change]:
        events = execute({target.name: target for target in self.targets}, self.machine, self.most)
        return [event for event in events if event is not None]

    def below(self, names: set[str]) -> set[str]:
        """Those that need one of these, directly or not."""
        found = set(names)
        for name, needs in self.needs.items():
            if found.intersection(needs):
                found.add(name)
        return found - names


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Up to 12 targets of any resources that fit at all, each needing some of those before it."""
    names = [f"target {number}" for number in range(draw(st.integers(1, 12)))]
    seconds = {name: draw(st.integers(1, 5)) for name in names}
    machine = Machine(seconds, frozenset(draw(st.sets(st.sampled_from(names), max_size=3))))
    targets: list[Target] = []
    for name in names:
        needs = draw(st.sets(st.sampled_from(targets), max_size=2)) if targets else set()
        resources = Resources(draw(st.integers(0, CAPACITY.cpus)), draw(st.integers(0, CAPACITY.gpus)))
        targets.append(target(name, needs, resources))
    return Case(machine, targets, draw(st.none() | st.integers(1, 3)))


@given(cases())
def test_every_target_is_made_once_or_is_dropped_once_and_is_told_of_in_order(case: Case) -> None:
    told: dict[str, list[str]] = {}
    for change in case.run():
        told.setdefault(change.name, []).append(change.state)
    assert set(told) == {target.name for target in case.targets}
    assert all(states in (["started", "done"], ["started", "failed"], ["dropped"]) for states in told.values())
    assert Counter(name for _, name in case.machine.began) == Counter(
        name for name, states in told.items() if states != ["dropped"]
    )


@given(cases())
def test_never_more_than_the_cluster_has_nor_more_targets_than_asked_for(case: Case) -> None:
    case.run()
    resources = {target.name: target.resources for target in case.targets}
    for running in case.machine.side_by_side:
        assert sum(resources[name].cpus for name in running) <= CAPACITY.cpus
        assert sum(resources[name].gpus for name in running) <= CAPACITY.gpus
        assert case.most is None or len(running) <= case.most


@given(cases())
def test_a_target_begins_after_all_that_it_needs_are_done(case: Case) -> None:
    case.run()
    needs = case.needs
    for time, name in case.machine.began:
        assert all(case.machine.ended[need] <= time and need not in case.machine.failing for need in needs[name])


@given(cases())
def test_a_failure_drops_its_descendants_and_nothing_else(case: Case) -> None:
    changes = case.run()
    failed = {change.name for change in changes if change.state == "failed"}
    dropped = {change.name: change.detail for change in changes if change.state == "dropped"}
    assert failed == {name for _, name in case.machine.began} & case.machine.failing
    assert set(dropped) == case.below(failed)
    assert all(name in case.below({blamed}) for name, blamed in dropped.items())
    assert {change.detail for change in changes if change.state == "failed"} <= {"it broke"}


@given(cases())
def test_none_passes_an_earlier_one_that_could_run(case: Case) -> None:
    """So small tasks never starve a wide one: what comes after it waits until it has had its room."""
    case.run()
    needs = case.needs
    order = list(case.needs)
    begun_before: set[str] = set()
    for time, name in case.machine.began:
        earlier = [other for other in order[: order.index(name)] if other not in begun_before]
        ready = [o for o in earlier if all(case.machine.ended.get(need, time + 1) <= time for need in needs[o])]
        assert [other for other in ready if not set(needs[other]) & case.machine.failing] == []
        begun_before.add(name)


def test_a_wide_target_gets_its_turn_among_small_ones() -> None:
    small = [f"small {number}" for number in range(20)]
    machine = Machine(dict.fromkeys([*small, "wide"], 1) | {"small 0": 3})
    targets = [target(name) for name in small]
    targets.insert(2, target("wide", resources=CAPACITY))
    Case(machine, targets).run()
    assert [name for _, name in machine.began][:4] == ["small 0", "small 1", "wide", "small 2"]
    assert machine.ended["wide"] == 4, "it waited for the two before it alone"


@given(cases(), st.integers(0, 20))
def test_stopping_starts_nothing_more_and_waits_for_what_runs(case: Case, stop_at: int) -> None:
    case.machine.stop_at = stop_at
    case.run()
    assert all(time < stop_at for time, _ in case.machine.began)
    assert case.machine.ends == {}
    assert set(case.machine.ended) == {name for _, name in case.machine.began}


def test_a_target_waits_for_a_cluster_that_grows() -> None:
    machine = Machine({"wide": 1}, sizes=iter([Resources(1, 0), Resources(2, 0), *[Resources(4, 0)] * 9]))
    changes = Case(machine, [target("wide", resources=Resources(4, 0))]).run()
    assert [change.state for change in changes] == ["started", "done"]
    assert machine.began == [(2, "wide")]


def test_a_need_that_is_not_among_the_targets_is_made_already() -> None:
    machine = Machine({"child": 1})
    assert len(Case(machine, [target("child", [target("parent of an earlier run")])]).run()) == 2


def test_whoever_watches_is_told_after_every_wait() -> None:
    machine = Machine({"long": 3, "short": 1})
    changes = execute({name: target(name) for name in ("long", "short")}, machine)
    assert [change and change.state for change in changes] == ["started", "started", "done", None, "done", None]

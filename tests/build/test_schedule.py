"""Which target when, where and by how many ranks, on a clock that is moved by hand and nodes that come and go."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aliprod.build.allot import BACK_SECONDS, CALM_SECONDS, Paths, Running, Situation, decide
from aliprod.build.room import Node, check_room, with_cpus
from aliprod.build.schedule import Change, Outcome, execute
from aliprod.build.target import Resources, Target, powers_of_two
from aliprod.errors import Unreachable
from aliprod.plan.schema import Cluster

RANK = Resources(2, 1)
TWO_NODES = (Node("a", Resources(8, 4)), Node("b", Resources(8, 4)))
HOUR = 3600.0


def target(
    name: str,
    needs: Iterable[Target] = (),
    world_sizes: tuple[int, ...] = (1, 2, 4, 8),
    resources: Resources = RANK,
    kind: str = "training",
) -> Target:
    return Target(
        kind=kind,
        name=name,
        facts={},
        place=name,
        make=lambda target, context: (),
        needs={"needs": tuple(needs)},
        resources=resources,
        world_sizes=world_sizes,
    )


@dataclass(frozen=True)
class Stretch:
    """Of time, in which a target was made. ``asked``: to end by us."""

    name: str
    nodes: tuple[str, ...]
    begin: float
    end: float
    outcome: str


@dataclass
class Machine:
    """Makes each target in as many seconds as it is to last, n times as fast with n ranks, and writes down what it did.

    Args:
        failing: at their end. dying: nodes that are gone from a time on. coming: nodes that are there from a time on.
        slow: targets that turn out to take twice as long.
    """

    length: dict[str, float]
    there: Sequence[Node] = TWO_NODES
    failing: frozenset[str] = frozenset()
    dying: dict[str, float] = field(default_factory=dict)
    coming: dict[str, float] = field(default_factory=dict)
    stop_at: float = math.inf
    slow: frozenset[str] = frozenset()
    clock: float = 0.0
    running: dict[str, tuple[Target, tuple[str, ...], float, float]] = field(default_factory=dict)
    left: dict[str, float] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    wanted: list[Sequence[Resources]] = field(default_factory=list)
    done: list[Stretch] = field(default_factory=list)
    could_start: tuple[Resources, ...] = ()
    others: dict[str, float] = field(default_factory=dict)  # until when another driver makes a target
    most: int | None = None

    def now(self) -> float:
        return self.clock

    def nodes(self) -> Sequence[Node]:
        return [
            node
            for node in self.there
            if self.coming.get(node.name, 0) <= self.clock < self.dying.get(node.name, math.inf)
        ]

    def elsewhere(self, target: Target) -> str:
        return "another driver" if self.clock < self.others.get(target.name, 0) else ""

    def types(self) -> Sequence[Resources]:
        return self.could_start

    def seconds(self, target: Target, world_size: int) -> float:
        known = 2 if target.name in self.slow and self.clock > HOUR / 2 else 1
        return known * self.length[target.name] * self.left.get(target.name, 1.0) / world_size

    def stopping(self) -> bool:
        return self.clock >= self.stop_at

    def request(self, ranks: Sequence[Resources]) -> None:
        self.wanted.append(ranks)

    def start(self, target: Target, nodes: Sequence[str]) -> str:
        assert len(nodes) in (target.world_sizes or (1,))
        assert set(nodes) <= {node.name for node in self.nodes()}, "on a node that is there"
        assert target.name not in self.running
        lasts = self.length[target.name] * self.left.get(target.name, 1.0) / len(nodes)
        end = self.clock + lasts * (2 if target.name in self.slow else 1)
        self.running[target.name] = (target, tuple(nodes), self.clock, end)
        assert self.most is None or len(self.running) <= self.most
        self._nowhere_too_full()
        return f"handle of {target.name}"

    def stop(self, handle: str) -> None:
        name = handle.removeprefix("handle of ")
        assert self.running[name][0].world_sizes, "what cannot be stopped"
        assert name not in self.asked
        self.asked.append(name)

    def wait(self, handles: Sequence[str], patience: float) -> list[tuple[str, Outcome]]:
        """To the next end, or node that comes or goes; what was asked to pause has a second to do so."""
        assert sorted(handles) == sorted(f"handle of {name}" for name in self.running)
        moments = [end for _, _, _, end in self.running.values()]
        moments += [time for time in (*self.dying.values(), *self.coming.values(), self.stop_at) if time > self.clock]
        moments += [self.clock + 1] * bool(self.asked or not moments)
        self.clock = min(*moments, self.clock + patience) if patience < math.inf else min(moments)
        ended = [name for name, (_, _, _, end) in self.running.items() if end <= self.clock]
        paused = [name for name in self.asked if name not in ended]
        lost = [name for name, one in self.running.items() if name not in ended + paused and self._lost(one[1])]
        self.asked = []
        found = [self._end(name, "failed" if name in self.failing else "done") for name in ended]
        return found + [self._end(name, "paused") for name in paused + lost]

    def _lost(self, nodes: Sequence[str]) -> bool:
        return any(self.dying.get(name, math.inf) + 2 <= self.clock for name in nodes)

    def _end(self, name: str, state: str) -> tuple[str, Outcome]:
        _, nodes, begin, end = self.running.pop(name)
        self.done.append(Stretch(name, nodes, begin, self.clock, state))
        if state == "paused":
            whole = end - begin
            self.left[name] = self.left.get(name, 1.0) * ((end - self.clock) / whole if whole else 0.0)
        return f"handle of {name}", Outcome(state, "it broke" if state == "failed" else "")  # type: ignore[arg-type]

    def _nowhere_too_full(self) -> None:
        for node in self.there:
            taken = [one[0].resources for one in self.running.values() for name in one[1] if name == node.name]
            assert sum(rank.cpus for rank in taken) <= node.resources.cpus
            assert sum(rank.gpus for rank in taken) <= node.resources.gpus


@dataclass(frozen=True)
class Case:
    machine: Machine
    targets: list[Target]

    def run(self) -> list[Change]:
        return [
            change for change in execute({t.name: t for t in self.targets}, self.machine, self.machine.most) if change
        ]

    def below(self, names: Iterable[str]) -> set[str]:
        """All that need any of the names, directly or not."""
        lost = set(names)
        for one in self.targets:
            if any(need.name in lost for need in one.needed()):
                lost.add(one.name)
        return lost - set(names)

    def ended(self, name: str) -> float:
        return next(one.end for one in self.machine.done if one.name == name and one.outcome == "done")


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Up to 12 targets, each needing some of those before it, of sizes that one of the nodes that stay can hold."""
    found: list[Target] = []
    for number in range(draw(st.integers(1, 12))):
        needs = draw(st.sets(st.sampled_from(found), max_size=2)) if found else set()
        sizes = draw(st.sampled_from([(), (1,), (2,), (4,), (1, 2), (1, 2, 4, 8)]))
        rank = draw(st.sampled_from([RANK, Resources(1, 0), Resources(8, 1) if sizes in ((), (1,)) else RANK]))
        kind = draw(st.sampled_from(["training", "prediction"]))
        found.append(target(f"target {number}", needs, sizes, rank, kind))
    names = [one.name for one in found]
    length = {name: draw(st.sampled_from([0.0, 5.0, 100.0, HOUR, 20 * HOUR])) for name in names}
    others = [Node(f"other {number}", draw(st.sampled_from([Resources(8, 4), Resources(3, 3)]))) for number in range(2)]
    times = st.dictionaries(
        st.sampled_from([node.name for node in others]), st.sampled_from([1.0, 90.0, HOUR, 9 * HOUR])
    )
    machine = Machine(
        length,
        (Node("stays", Resources(8, 4)), *others),
        failing=frozenset(draw(st.sets(st.sampled_from(names), max_size=2))),
        dying=draw(times),
        coming=draw(times),
        slow=frozenset(draw(st.sets(st.sampled_from(names), max_size=2))),
        most=draw(st.none() | st.integers(1, 3)),
    )
    return Case(machine, found)


@settings(max_examples=50, deadline=None)
@given(cases())
def test_every_target_ends_once_behind_its_needs_and_no_node_holds_more_than_it_has(case: Case) -> None:
    changes = case.run()  # the machine looks at its nodes at each start, and at how many run
    made = [one for one in case.machine.done if one.outcome != "paused"]
    dropped = {change.name for change in changes if change.state == "dropped"}
    assert sorted([one.name for one in made] + list(dropped)) == sorted(one.name for one in case.targets)
    failed = {one.name for one in made if one.outcome == "failed"}
    assert failed == {one.name for one in made} & case.machine.failing
    assert dropped == case.below(failed)
    for one in case.targets:
        for stretch in case.machine.done:
            if stretch.name == one.name:
                assert all(case.ended(need.name) <= stretch.begin for need in one.needed())


@settings(max_examples=50, deadline=None)
@given(cases())
def test_what_is_told_of_a_target_is_what_happens_to_it(case: Case) -> None:
    told: dict[str, list[str]] = {}
    for change in case.run():
        told.setdefault(change.name, []).append(change.state)
        if change.state == "waiting":
            assert change.detail.startswith("waiting for")
    for name, states in told.items():
        stretches = [one for one in case.machine.done if one.name == name]
        assert states.count("started") == len(stretches)
        assert states[-1] in ("done", "failed", "dropped")
        assert [state for state in states if state not in ("started", "waiting", "dropped")] == [
            one.outcome for one in stretches
        ]


@settings(max_examples=50, deadline=None)
@given(cases())
def test_two_changes_of_a_target_lie_ten_restarts_apart(case: Case) -> None:
    """But where a node goes."""
    case.machine.dying.clear()
    case.run()
    for one in case.machine.done:
        if one.outcome == "paused":
            assert one.end - one.begin >= CALM_SECONDS


def test_a_target_that_was_changed_is_not_soon_changed_back() -> None:
    """The other that takes one of its two GPUs fails after five minutes, and the long one behind that is not made."""
    machine = Machine({"long": 40 * HOUR, "other": 300.0, "next": 40 * HOUR}, (Node("a", Resources(4, 2)),))
    machine.others, machine.failing = {"other": HOUR}, frozenset(["other"])
    other = target("other", world_sizes=(1,))
    Case(machine, [target("long", world_sizes=(1, 2)), other, target("next", [other], world_sizes=(1,))]).run()
    long = [one for one in machine.done if one.name == "long"]
    assert [len(one.nodes) for one in long] == [2, 1, 2]
    assert BACK_SECONDS <= long[1].end - long[1].begin <= BACK_SECONDS + 2


@settings(max_examples=50, deadline=None)
@given(cases(), st.sampled_from([0.0, 3.0, 95.0, HOUR]))
def test_stopping_starts_nothing_more_and_waits_for_what_runs(case: Case, stop_at: float) -> None:
    case.machine.stop_at = stop_at
    case.run()
    assert all(one.begin < stop_at for one in case.machine.done)
    assert case.machine.running == {}


def test_what_another_driver_makes_is_waited_for_and_keeps_no_room() -> None:
    shared = target("shared")
    machine = Machine({"shared": HOUR, "child": HOUR, "own": HOUR}, others={"shared": HOUR / 2})
    changes = Case(machine, [shared, target("child", [shared]), target("own")]).run()
    assert next(change.detail for change in changes if change.name == "shared") == "waiting for another driver"
    assert next(change.name for change in changes if change.state == "started") == "own"
    assert {one.name: HOUR / 2 <= one.begin <= HOUR / 2 + 5 for one in machine.done if one.name == "shared"} == {
        "shared": True
    }
    assert {one.name for one in machine.done} == {"shared", "child", "own"}


def test_a_long_chain_gets_the_gpus_that_let_it_end_with_the_others() -> None:
    chain = target("chain")
    others = [target(f"other {number}") for number in range(4)]
    machine = Machine({"chain": 4 * HOUR, "next": 4 * HOUR} | {one.name: 2 * HOUR for one in others})
    Case(machine, [chain, target("next", [chain]), *others]).run()
    assert next(len(one.nodes) for one in machine.done if one.name == "chain") == 4
    assert machine.clock == pytest.approx(2 * HOUR, rel=0.1), "16 hours of work on 8 GPUs"


def test_a_target_is_widened_where_others_end_and_keeps_what_it_has_done() -> None:
    short = [target(f"short {number}", world_sizes=(1,)) for number in range(3)]
    machine = Machine({"long": 8 * HOUR} | {one.name: HOUR for one in short}, TWO_NODES[:1])
    Case(machine, [target("long", kind="prediction"), *short]).run()
    assert [len(one.nodes) for one in machine.done if one.name == "long"] == [1, 4]
    assert machine.clock == pytest.approx(11 / 4 * HOUR, rel=0.01), "11 hours of work on 4 GPUs"


def test_equal_targets_do_not_take_turns() -> None:
    """The one that waits has the longer path as soon as the other has begun."""
    targets = [target(f"target {number}", world_sizes=(1,)) for number in range(3)]
    ends = [target(f"end {number}", world_sizes=(), resources=Resources(1, 0)) for number in range(9)]
    machine = Machine({one.name: 20 * HOUR for one in targets}, (Node("a", Resources(13, 2)),))
    machine.length |= {one.name: 200.0 * number for number, one in enumerate(ends, 1)}
    Case(machine, targets + ends).run()
    assert {one.outcome for one in machine.done} == {"done"}


def test_a_clock_that_cannot_be_put_on_to_the_next_look_is_put_on_all_the_same() -> None:
    began, now = 172.3, math.nextafter(172.3 + CALM_SECONDS, 0)
    assert 0 < CALM_SECONDS - (now - began) < 1e-9
    one, other = target("one"), target("other")
    paths = Paths.of({"one": one, "other": other}, lambda *_: HOUR)
    running = {"one": Running(("a",), began)}
    nodes = (Node("a", RANK),)
    assert decide(Situation({"one": one, "other": other}, running, nodes, paths, now)).patience >= 1


def test_where_nothing_is_missing_nothing_is_made() -> None:
    assert Case(Machine({}), []).run() == []


def test_nothing_is_started_again_for_less_than_that_costs() -> None:
    machine = Machine({"one": 100.0, "other": 60.0})
    Case(machine, [target("one"), target("other")]).run()
    assert [one.outcome for one in machine.done] == ["done", "done"]


def test_a_rate_that_turns_out_otherwise_divides_the_room_anew() -> None:
    lengths = {"slow": 8 * HOUR, "other": 8 * HOUR}
    machine = Machine(lengths, (Node("a", Resources(8, 3)),), slow=frozenset(["slow"]))
    changes = Case(machine, [target("other", world_sizes=(1, 2)), target("slow", world_sizes=(1, 2))]).run()
    assert "paused" in {change.state for change in changes}


def test_predictions_wait_for_trainings_that_something_waits_for() -> None:
    machine = Machine(dict.fromkeys(["prediction", "training", "child"], HOUR), (Node("a", RANK),))
    machine.length["prediction"] = 9 * HOUR
    parent = target("training")
    targets = [target("prediction", kind="prediction"), parent, target("child", [parent])]
    Case(machine, targets).run()
    assert [one.name for one in machine.done] == ["training", "child", "prediction"]


def test_ranks_stand_on_as_few_nodes_as_possible() -> None:
    nodes = (Node("a", Resources(8, 4)), Node("b", Resources(16, 8)), Node("c", Resources(8, 4)))
    machine = Machine({"eight": HOUR, "four": HOUR}, nodes)
    Case(machine, [target("eight", world_sizes=(8,)), target("four", world_sizes=(4,))]).run()
    assert {one.name: len(set(one.nodes)) for one in machine.done} == {"eight": 1, "four": 1}


def test_a_wide_target_gets_its_turn_among_small_ones() -> None:
    small = [target(f"small {number}", world_sizes=()) for number in range(40)]
    machine = Machine({one.name: HOUR * (1 + number % 3) for number, one in enumerate(small)} | {"wide": 30 * HOUR})
    wide = target("wide", [small[0]], world_sizes=(8,))
    Case(machine, [*small, wide]).run()
    begins = sorted((one.begin, one.name) for one in machine.done)
    assert begins.index(next(one for one in begins if one[1] == "wide")) < 25


def test_what_stands_on_a_node_that_is_about_to_go_is_stopped_and_goes_on_elsewhere() -> None:
    machine = Machine({"job": 16 * HOUR}, dying={"b": HOUR})
    Case(machine, [target("job")]).run()
    first, *_, last = machine.done
    assert (first.outcome, first.end) == ("paused", HOUR + 1)
    assert (last.outcome, set(last.nodes)) == ("done", {"a"})


def test_a_node_that_comes_is_used() -> None:
    machine = Machine({"job": 80 * HOUR}, coming={"b": HOUR})
    Case(machine, [target("job")]).run()
    assert [len(one.nodes) for one in machine.done] == [4, 8]


def test_a_cluster_that_grows_is_asked_for_what_has_no_room() -> None:
    machine = Machine({"one": HOUR, "two": HOUR}, (Node("head", Resources(8, 0)), Node("b", Resources(8, 4))))
    machine.coming, machine.could_start = {"b": HOUR}, (Resources(8, 4),)
    Case(machine, [target("one", world_sizes=(1,)), target("two", world_sizes=(1,))]).run()
    assert machine.wanted == [[RANK, RANK], []]


def test_a_need_that_is_not_among_the_targets_is_made_already() -> None:
    machine = Machine({"child": 1})
    assert [c.state for c in Case(machine, [target("child", [target("of an earlier run")])]).run()] == [
        "started",
        "done",
    ]


def test_whoever_watches_is_told_after_every_wait() -> None:
    machine = Machine({"long": 3, "short": 1})
    changes = execute({name: target(name, world_sizes=()) for name in ("long", "short")}, machine)
    assert [change and change.state for change in changes] == ["started", "started", "done", None, "done", None]


def waits(nodes: Sequence[Node], *targets: Target) -> dict[str, str]:
    by_name = {one.name: one for one in targets}
    paths = Paths.of(by_name, lambda target, size: HOUR / size)
    running = {"busy": Running(("a",), 0.0)} if "busy" in by_name else {}
    return dict(decide(Situation(by_name, running, nodes, paths)).waiting)


def test_it_is_said_what_each_target_waits_for() -> None:
    busy = target("busy", world_sizes=())
    wide = target("wide", world_sizes=(2,))
    assert waits([Node("a", Resources(4, 2))], busy, wide, target("child", [wide])) == {
        "wide": "waiting for 2 GPUs",
        "child": "waiting for wide",
    }
    many_cpus = target("job", world_sizes=(1,), resources=Resources(8, 1))
    assert waits([Node("a", Resources(9, 4))], busy, many_cpus) == {
        "job": "waiting for room: no node has 8 CPUs free beside a GPU"
    }
    on_cpus = target("job", world_sizes=(1,), resources=Resources(4, 0))
    assert waits([Node("a", Resources(4, 2))], busy, on_cpus) == {"job": "waiting for 4 CPUs"}


@pytest.mark.parametrize(
    ("nodes", "job", "words"),
    [
        ([Resources(1, 0)] * 2, target("job", resources=Resources(2, 0)), "job takes 2 CPUs.*the largest has 1 CPU"),
        (
            [Resources(4, 1)] * 2,
            target("job", resources=Resources(8, 1)),
            "8 CPUs and 1 GPU.*2 GPUs in all, and beside",
        ),
        ([Resources(8, 0)], target("job"), "job takes 2 CPUs and 1 GPU.*largest has 8 CPUs.*use_gpu = false"),
        ([Resources(8, 2)], target("job", world_sizes=(4,)), "job takes 4 ranks.*room for 2"),
        ([], target("job"), "there is none"),
    ],
)
def test_what_no_node_can_hold_is_refused_with_both_names(nodes: list[Resources], job: Target, words: str) -> None:
    with pytest.raises(Unreachable, match=f"(?s){words}"):
        check_room({"job": job}, [Node(f"node {number}", has) for number, has in enumerate(nodes)])


def test_a_rank_has_the_cpus_that_nodes_have_for_each_gpu_and_one_where_there_are_none() -> None:
    nodes = [Node("head", Resources(4, 0)), Node("a", Resources(26, 4)), Node("b", Resources(64, 8))]
    settings = (Cluster(), Cluster(use_gpu=False), Cluster(cpus_per_worker=3))
    assert [with_cpus(cluster, nodes).cpus_per_worker for cluster in settings] == [6, 1, 3]


def test_powers_of_two_end_at_the_most() -> None:
    assert [powers_of_two(most) for most in (0, 1, 2, 7, 8)] == [(), (1,), (1, 2), (1, 2, 4), (1, 2, 4, 8)]

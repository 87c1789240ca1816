"""What is left of a run on its way: of the plan, and of each of its targets.

What the run itself has shown counts first: the pace of its jobs, which neighbours on the same machine have slowed
already, and how long what has ended took.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from statistics import median

from aliprod.build.allot import RESTART_SECONDS
from aliprod.build.costs import cost_of
from aliprod.build.events import LOST, Standing, Task
from aliprod.build.graph import targets_on
from aliprod.build.room import Node, check_room
from aliprod.build.schedule import execute
from aliprod.build.target import Target, lacking
from aliprod.errors import Unreachable
from aliprod.forecast.rates import Estimates, speed_up
from aliprod.forecast.simulate import STARTING_SECONDS, Clock
from aliprod.plan.open import Opened
from aliprod.store import epochs

STARTING_ELSE = 2.0  # of what is no training: its process may have imported all it needs, as in the demo
_AT_LEAST = 0.1  # of what was expected is left of what takes longer


@dataclass(frozen=True)
class Left:
    """Seconds from now: until the plan ends, and until each target ends that is not made."""

    seconds: float
    ends: Mapping[str, float]

    def after(self, seconds: float) -> "Left":
        """The same, seen so many seconds later."""
        ends = {name: max(0.0, end - seconds) for name, end in self.ends.items()}
        return Left(max(0.0, self.seconds - seconds), ends)


class Outlook:
    """Looks at a run now and then. What there is to do it sees when the nodes are others than before."""

    def __init__(self, opened: Opened) -> None:
        self.opened, self.nodes = opened, tuple[Node, ...]()
        self.graph: dict[str, Target] = {}
        self.todo: dict[str, Target] = {}

    def left(self, standing: Standing, now: float) -> Left | None:
        """Estimate what is left at ``now``, in seconds since the epoch; None before any rate is known, and while there
        are no nodes that hold what is left."""
        estimates = Estimates(self.opened)
        if not standing.nodes or not estimates.paces:
            return None
        if self.nodes != standing.nodes:
            self.nodes, self.graph = standing.nodes, targets_on(self.opened, standing.nodes)
            self.todo = lacking(self.graph, self.opened.places.storage)
        try:
            check_room(self.todo, self.nodes)
        except Unreachable:  # others are to come
            return None
        tasks = {task.name: task for task in standing.tasks}
        lost = {name for name, state in standing.states.items() if state in LOST}  # their children are lost too
        todo = {name: one for name, one in self.todo.items() if name not in tasks or tasks[name].until is None}
        todo = {name: one for name, one in todo.items() if one.job is None or one.job.name not in lost}
        factors = {kind: self._factor(kind, tasks.values(), estimates) for kind in {one.kind for one in todo.values()}}
        running = {name: task for name, task in tasks.items() if name in todo}

        def seconds(target: Target, ranks: int) -> float:
            if target.name not in running:
                return factors[target.kind] * _whole(estimates, target, ranks)
            task = running[target.name]
            own = self._rest(estimates, target, factors[target.kind], task, now)
            return own * speed_up(task.world_size) / speed_up(ranks)

        clock = Clock(standing.nodes, seconds, 0.0, RESTART_SECONDS)
        places = {name: task.nodes for name, task in running.items()}
        for _ in execute(todo, clock, self.opened.plan.cluster.max_parallel_jobs, places):
            pass
        ends = {name: spans[-1].end for name, spans in clock.spans.items()}
        return Left(max(ends.values(), default=0.0), ends)

    def _factor(self, kind: str, tasks: Iterable[Task], estimates: Estimates) -> float:
        """How many times longer targets of a kind have taken in this run than expected; 1 before any has ended."""
        ended = [task for task in tasks if task.kind == kind and task.until and task.name in self.graph]
        took = [(task.until or task.since) - task.since for task in ended]
        expected = [_whole(estimates, self.graph[task.name], task.world_size) for task in ended]
        return median([own / one for own, one in zip(took, expected, strict=True)] or [1.0])

    def _rest(self, estimates: Estimates, target: Target, factor: float, task: Task, now: float) -> float:
        """Seconds that are left of a task: by its steps, where it tells its pace."""
        pace = epochs.pace(self.opened.job_folder(target.name)) if target.kind == "training" else None
        if pace is None:
            expected = factor * _whole(estimates, target, task.world_size)
            return max(expected - (now - task.since), _AT_LEAST * expected)
        rest = cost_of(target.owner, self.opened.read_catalogue(), pace["step"])
        validations = estimates.seconds(replace(target, cost=replace(rest, trained=0)), task.world_size)
        return float(rest.trained / pace["images_per_second"] + validations)


def _whole(estimates: Estimates, target: Target, ranks: int) -> float:
    """All that there is to do, the start included."""
    starting = STARTING_SECONDS if target.kind == "training" else STARTING_ELSE
    return starting + estimates.seconds(target, ranks)

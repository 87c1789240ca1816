"""Which task next: in the given order, as its needs are done, never more than there is.

It knows tasks by what they need and take, not by what they are; how they are started and waited for is given,
so it can be tested without a cluster.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Share:
    """CPUs and GPUs, of a task or of a cluster."""

    cpus: int
    gpus: int

    def __add__(self, other: "Share") -> "Share":
        return Share(self.cpus + other.cpus, self.gpus + other.gpus)

    def fits(self, room: "Share") -> bool:
        return self.cpus <= room.cpus and self.gpus <= room.gpus


@dataclass(frozen=True)
class Task:
    """Something to run.

    Attributes:
        needs: names of tasks that must be done before; one that is not among the tasks is done already.
        start: begins it and returns a handle.
    """

    name: str
    needs: tuple[str, ...]
    share: Share
    start: Callable[[], Any]


@dataclass(frozen=True)
class Change:
    """A task has been started, is done, has failed, or will not run since ``detail`` has failed."""

    name: str
    state: Literal["started", "done", "failed", "dropped"]
    detail: str = ""


Wait = Callable[[list[Any]], list[tuple[Any, str]]]


def execute(
    tasks: Sequence[Task],
    capacity: Callable[[], Share],
    wait: Wait,
    stopping: Callable[[], bool] = lambda: False,
    most: int | None = None,
) -> Iterator[Change | None]:
    """Run all tasks, the first ones first, several side by side.

    A task that does not fit now lets no later one pass it that would take its room: small tasks do not starve
    a wide one. One that fails drops those that need it, and nothing else.

    Args:
        capacity: of the whole cluster, asked anew each time.
        wait: waits a moment for any of the handles; returns those that ended, each with why it failed or ''.
        stopping: whether to start no more.
        most: tasks side by side.
    Yields:
        Each change, and None after each wait, for whoever watches the running tasks.
    """
    waiting = {task.name: task for task in tasks}
    running: dict[str, tuple[Task, Any]] = {}
    while waiting or running:
        if stopping():
            waiting.clear()
        for task in _admitted(waiting, running, capacity(), most):
            del waiting[task.name]
            running[task.name] = (task, task.start())
            yield Change(task.name, "started")
        if not running:
            if stopping():
                return
            yield None
            wait([])
            continue
        for handle, failure in wait([handle for _, handle in running.values()]):
            name = next(name for name, (_, running_handle) in running.items() if running_handle == handle)
            del running[name]
            yield Change(name, "failed" if failure else "done", failure)
            if failure:
                yield from (Change(lost, "dropped", name) for lost in _drop(name, waiting))
        yield None


def _admitted(
    waiting: dict[str, Task], running: dict[str, tuple[Task, Any]], capacity: Share, most: int | None
) -> list[Task]:
    taken = Share(0, 0)
    for task, _ in running.values():
        taken = taken + task.share
    admitted: list[Task] = []
    for task in waiting.values():
        if any(need in waiting or need in running for need in task.needs):
            continue
        full = most is not None and len(running) + len(admitted) >= most
        if full or not (taken + task.share).fits(capacity):
            break
        taken = taken + task.share
        admitted.append(task)
    return admitted


def _drop(failed: str, waiting: dict[str, Task]) -> list[str]:
    """Take out of ``waiting`` what needs a failed task, directly or not."""
    lost = [failed]
    for name, task in list(waiting.items()):  # needs come before those that need them
        if any(need in lost for need in task.needs):
            lost.append(name)
            del waiting[name]
    return lost[1:]

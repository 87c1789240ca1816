"""The scheduler: which target next, in the given order, as its needs are made, never more than there is.

How a target is started and waited for is given, so that the same policy runs on a cluster and on a simulated clock.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from aliprod.build.target import Resources, Target


class Runner(Protocol):
    """Whatever makes targets: a Ray cluster, or a clock."""

    def capacity(self) -> Resources:
        """Of the whole cluster."""

    def start(self, target: Target) -> Any:
        """Begin to make a target; a handle."""

    def wait(self, handles: list[Any]) -> list[tuple[Any, str]]:
        """Wait a moment for any of the handles; those that ended, each with why it failed or ''."""

    def stopping(self) -> bool:
        """Whether nothing more is to be started."""


@dataclass(frozen=True)
class Change:
    """A target has been started, is done, has failed, or will not be made since ``detail`` has failed."""

    name: str
    state: Literal["started", "done", "failed", "dropped"]
    detail: str = ""


def execute(targets: Mapping[str, Target], runner: Runner, most: int | None = None) -> Iterator[Change | None]:
    """Make all targets, the first ones first, several side by side.

    A target that does not fit now lets no later one pass it that would take its room: small targets do not starve a
    wide one. One that fails drops those that need it, and nothing else. A need that is not among the targets is made.

    Args:
        most: targets side by side.
    Yields:
        Each change, and None after each wait, for whoever watches what runs.
    """
    waiting, running = dict(targets), dict[str, Any]()
    while waiting or running:
        if runner.stopping():
            waiting.clear()
        taken = sum((targets[name].resources for name in running), Resources(0, 0))
        for target in _admitted(waiting, running, taken, runner.capacity(), most):
            del waiting[target.name]
            running[target.name] = runner.start(target)
            yield Change(target.name, "started")
        if not running:
            if runner.stopping():
                return
            yield None
            runner.wait([])
            continue
        for handle, failure in runner.wait(list(running.values())):
            name = next(name for name, running_handle in running.items() if running_handle == handle)
            del running[name]
            yield Change(name, "failed" if failure else "done", failure)
            if failure:
                yield from (Change(lost, "dropped", name) for lost in _drop(name, waiting))
        yield None


def _admitted(
    waiting: Mapping[str, Target], running: Mapping[str, Any], taken: Resources, capacity: Resources, most: int | None
) -> list[Target]:
    admitted: list[Target] = []
    for target in waiting.values():
        if any(need.name in waiting or need.name in running for need in target.needed()):
            continue
        full = most is not None and len(running) + len(admitted) >= most
        if full or not (taken + target.resources).fits(capacity):
            break
        taken += target.resources
        admitted.append(target)
    return admitted


def _drop(failed: str, waiting: dict[str, Target]) -> list[str]:
    """Take out of ``waiting`` what needs a failed target, directly or not."""
    lost = [failed]
    for name, target in list(waiting.items()):  # needs come before those that need them
        if any(need.name in lost for need in target.needed()):
            lost.append(name)
            del waiting[name]
    return lost[1:]

"""What a running plan reports: whoever iterates the driver prints it, sends it on, or ignores it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # whoever reads arguments imports this
    from aliprod.build.room import Node
    from aliprod.plan.open import Opened

JobState = Literal["waiting", "running", "finished", "failed", "not_run", "reused"]
DONE: tuple[JobState, ...] = ("finished", "reused")
LOST: tuple[JobState, ...] = ("failed", "not_run")


@dataclass(frozen=True)
class Began:
    """The jobs of the plan are known; nothing has been started yet."""

    opened: "Opened"


@dataclass(frozen=True)
class Changed:
    """A job has another state. ``detail``: why it failed or was not run. ``seconds``: from its start to its end,
    waiting for processes and room included; None where this run saw neither."""

    job: str
    state: JobState
    detail: str = ""
    record: Mapping[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    world_size: int = 1


@dataclass(frozen=True)
class Reported:
    """A running job has written a line of its metrics."""

    job: str
    line: Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """A target that is being made, or has been made. An event, too, at both ends of what is no training."""

    name: str
    kind: str
    job: str | None  # whose state its failure shows; None: the whole plan's
    nodes: tuple[str, ...]  # of each of its ranks
    since: float  # in seconds since the epoch, as until
    until: float | None = None  # None while it is being made
    gpus: int = 0  # of each rank

    @property
    def world_size(self) -> int:
        return len(self.nodes)


@dataclass(frozen=True)
class Standing:
    """How a run stands: what its file of states says, and an event about once a second."""

    states: Mapping[str, JobState] = field(default_factory=dict)  # of each job
    reasons: Mapping[str, str] = field(default_factory=dict)  # what a job waits for, or why it failed or was not run
    tasks: tuple[Task, ...] = ()  # what is being made, and what has been made, trainings included
    nodes: "tuple[Node, ...]" = ()  # of the cluster
    past: tuple[Task, ...] = ()  # attempts that ended before these, in earlier runs too
    page: str = ""  # where MLflow shows the jobs

    @property
    def running(self) -> list[Task]:
        return [task for task in self.tasks if task.until is None]


@dataclass(frozen=True)
class Said:
    """Something a person should read."""

    text: str


@dataclass(frozen=True)
class Ended:
    """The plan has come to its end; ``outcome`` is the object that ``aliprod run --json`` prints."""

    outcome: Mapping[str, Any]


Event = Began | Changed | Reported | Task | Standing | Said | Ended

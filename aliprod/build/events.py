"""What a running plan reports: whoever iterates the driver prints it, sends it on, or ignores it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

JobState = Literal["waiting", "running", "finished", "failed", "not_run", "reused"]
DONE: tuple[JobState, ...] = ("finished", "reused")


@dataclass(frozen=True)
class Changed:
    """A job has another state; ``detail`` says why it failed or was not run."""

    job: str
    state: JobState
    detail: str = ""
    record: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reported:
    """A running job has written a line of its metrics."""

    job: str
    line: Mapping[str, Any]


@dataclass(frozen=True)
class Said:
    """Something a person should read."""

    text: str


@dataclass(frozen=True)
class Ended:
    """The plan has come to its end; ``outcome`` is the object that ``aliprod run --json`` prints."""

    outcome: Mapping[str, Any]


Event = Changed | Reported | Said | Ended

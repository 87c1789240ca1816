"""A run on its way, for people: a line a minute in a log, a table in a terminal."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from aliprod.build.events import DONE, Standing
from aliprod.forecast.left import Left
from aliprod.plan.open import Opened
from aliprod.report.estimate import duration
from aliprod.store import epochs

_EARLY = 0.1  # of a run: the forecast of that time is compared with what it took
HEADER = ["", "ranks", "epoch", "top-1 error", "images/s", "for", "left"]


@dataclass(frozen=True)
class Doing:
    """What is being made.

    Attributes:
        what: its kind. epoch: those that are done, of all; '' for what is no training.
        error: of its newest epoch. seconds: since it began. left: until it ends, where that is known.
    """

    name: str
    what: str
    world_size: int
    seconds: float
    left: float | None
    epoch: str = ""
    error: float | None = None
    images_per_second: float | None = None


def doing(opened: Opened, standing: Standing, left: Left | None, now: float) -> list[Doing]:
    """What is being made at ``now``, in seconds since the epoch; trainings first."""
    ends = left.ends if left else {}
    found = []
    for task in sorted(standing.running, key=lambda task: task.kind != "training"):
        row = Doing(task.name, task.kind.replace("_", " "), task.world_size, now - task.since, ends.get(task.name))
        found.append(_training(opened, row) if task.kind == "training" else row)
    return found


def headline(standing: Standing, rows: Sequence[Doing], left: Left | None) -> str:
    """The run in short: ``3 of 16 jobs done, 2 running, 1 prediction; about 14 min 05 s left``."""
    return counts(standing, rows) + _left(left)


def minute(standing: Standing, rows: Sequence[Doing], left: Left | None) -> str:
    """The same with what each of them is at: one line, for a log."""
    jobs = "; ".join(_in_short(row) for row in rows)
    return counts(standing, rows) + (f" ({jobs})" if jobs else "") + _left(left)


def counts(standing: Standing, rows: Sequence[Doing]) -> str:
    """How many jobs and tasks are in which state."""
    states = Counter(standing.states.values())
    parts = [f"{sum(states[state] for state in DONE)} of {len(standing.states)} jobs done"]
    parts += [f"{states[name]} {name.replace('_', ' ')}" for name in ("running", "failed", "not_run") if states[name]]
    parts += [
        f"{count} x {kind}" for kind, count in Counter(row.what for row in rows if row.what != "training").items()
    ]
    parts += [f"{count} waiting for {why}" for why, count in waiting(standing).items()]
    return ", ".join(parts)


def compared(forecasts: Mapping[float, float], took: float) -> str:
    """Forecast and fact of a run that has ended, side by side.

    Args:
        forecasts: what it was said to take in all, by the seconds after which that was said.
    """
    if not forecasts:
        return f"It took {duration(took)}."
    said = max((second for second in forecasts if second <= _EARLY * took), default=min(forecasts))
    return f"Forecast after {duration(said)}: {duration(forecasts[said])} in all. It took {duration(took)}."


def cells(row: Doing) -> list[str]:
    """Of a row of the table, below `HEADER`."""
    return [
        row.name if row.what == "training" else f"{row.name} ({row.what})",
        str(row.world_size),
        row.epoch,
        "" if row.error is None else f"{row.error:.2%}",
        "" if row.images_per_second is None else f"{row.images_per_second:,.0f}",
        duration(row.seconds),
        "" if row.left is None else duration(row.left),
    ]


def waiting(standing: Standing) -> Counter[str]:
    """How many jobs wait for what, but for those that wait for another job, or for what is made of one."""
    found = (why for name, why in standing.reasons.items() if standing.states[name] == "waiting")
    return Counter(why for why in found if why.partition(" ")[0].removesuffix(",") not in standing.states)


def _left(left: Left | None) -> str:
    return "" if left is None else f"; about {duration(left.seconds)} left"


def _training(opened: Opened, row: Doing) -> Doing:
    lines, pace = opened.metrics(row.name), epochs.pace(opened.job_folder(row.name)) or {}
    last = lines[-1] if lines else {}
    return Doing(
        row.name,
        row.what,
        row.world_size,
        row.seconds,
        row.left,
        f"{len(lines)}/{opened.jobs[row.name].stage.epochs}",
        epochs.error(last)[0],
        pace.get("images_per_second", last.get("speed/images_per_second")),
    )


def _in_short(row: Doing) -> str:
    """A row in a line: ``resnet50/full x2 epoch 3/5 64 images/s, 3 min 05 s left``."""
    ranks = f" x{row.world_size}" if row.world_size > 1 else ""
    if row.what != "training":
        return f"{row.name} {row.what}{ranks} for {duration(row.seconds)}"
    speed = " starting" if row.images_per_second is None else f" {row.images_per_second:,.0f} images/s"
    left = "" if row.left is None else f", {duration(row.left)} left"
    return f"{row.name}{ranks} epoch {row.epoch}{speed}{left}"

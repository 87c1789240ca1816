"""A run on its way, printed: lines, one a minute at least; in a terminal a table below them that stays in its place."""

import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from threading import Thread
from typing import TYPE_CHECKING, Any

from aliprod.build.events import DONE, Began, Ended, Event, Reported, Standing, Task
from aliprod.cli.flags import as_json, say
from aliprod.forecast.left import Left, Outlook
from aliprod.plan.open import Opened
from aliprod.report import status
from aliprod.report.estimate import duration
from aliprod.shown import lines

if TYPE_CHECKING:
    from rich.live import Live

_LINE_SECONDS, _WAITING_SECONDS = 60.0, 15.0  # between two lines; before one that says anew what is waited for
_LOOK_SECONDS = 5.0
_SHARE = 0.05  # of the time at most is spent on looking at what is left
_EARLY = 0.1  # of a run: the forecast of that time is compared with what it took
HEADER = ["", "ranks", "epoch", "top-1 error", "images/s", "for", "left"]


@dataclass(frozen=True)
class Doing:
    """What is being made. ``seconds``: since it began. ``left``: until it ends, where that is known. ``job``: of a
    training, as `aliprod status` tells it."""

    task: Task
    seconds: float
    left: float | None
    job: Mapping[str, Any] | None

    @property
    def what(self) -> str:
        """Its kind, in words."""
        return self.task.kind.replace("_", " ")

    @property
    def epoch(self) -> str:
        """Those that are done, of all; '' for what is no training."""
        return f"{self.job['epoch']}/{self.job['epochs']}" if self.job else ""

    def cells(self) -> list[str]:
        """A row of the table, below `HEADER`."""
        job = self.job or {}
        error, speed = job.get("top1_error"), job.get("images_per_second")
        return [
            self.task.name if self.job else f"{self.task.name} ({self.what})",
            str(self.task.world_size),
            self.epoch,
            "" if error is None else f"{error:.2%}",
            "" if speed is None else f"{speed:,.0f}",
            duration(self.seconds),
            "" if self.left is None else duration(self.left),
        ]

    def in_short(self) -> str:
        """In a line: ``resnet50/full x2 epoch 3/5 64 images/s, 3 min 05 s left``."""
        name, ranks = self.task.name, f" x{self.task.world_size}" if self.task.world_size > 1 else ""
        if self.job is None:
            return f"{name} {self.what}{ranks} for {duration(self.seconds)}"
        speed, left = self.job["images_per_second"], "" if self.left is None else f", {duration(self.left)} left"
        pace = "starting" if speed is None else f"{speed:,.0f} images/s"
        return f"{name}{ranks} epoch {self.epoch} {pace}{left}"


def doing(opened: Opened, standing: Standing, left: Left | None, now: float) -> list[Doing]:
    """What is being made at ``now``, in seconds since the epoch; trainings first."""
    ends, found = left.ends if left else {}, list[Doing]()
    for task in sorted(standing.running, key=lambda task: task.kind != "training"):
        job = status.state(opened, task.name, standing) if task.kind == "training" else None
        found.append(Doing(task, now - task.since, ends.get(task.name), job))
    return found


def headline(standing: Standing, rows: Sequence[Doing], left: Left | None, each: str = "") -> str:
    """The run in short, ``each`` behind the counts: ``3 of 16 jobs done, 2 running; about 14 min 05 s left``."""
    states = Counter(standing.states.values())
    parts = [f"{sum(states[state] for state in DONE)} of {len(standing.states)} jobs done"]
    parts += [f"{states[name]} {name.replace('_', ' ')}" for name in ("running", "failed", "not_run") if states[name]]
    parts += [f"{count} x {kind}" for kind, count in Counter(row.what for row in rows if not row.job).items()]
    parts += [f"{count} waiting for {why}" for why, count in waiting(standing).items()]
    return ", ".join(parts) + each + ("" if left is None else f"; about {duration(left.seconds)} left")


def minute(standing: Standing, rows: Sequence[Doing], left: Left | None) -> str:
    """The same with what each of them is at: one line, for a log."""
    return headline(standing, rows, left, f" ({'; '.join(row.in_short() for row in rows)})" if rows else "")


def compared(forecasts: Mapping[float, float], took: float) -> str:
    """Forecast and fact of a run that has ended, side by side. ``forecasts``: what it was said to take in all, by the
    seconds after which that was said."""
    if not forecasts:
        return f"It took {duration(took)}."
    said = max((second for second in forecasts if second <= _EARLY * took), default=min(forecasts))
    return f"Forecast after {duration(said)}: {duration(forecasts[said])} in all. It took {duration(took)}."


def waiting(standing: Standing) -> Counter[str]:
    """How many jobs wait for what, but for those that wait for another job, or for what is made of one."""
    found = (why for name, why in standing.reasons.items() if standing.states[name] == "waiting")
    return Counter(why for why in found if why.partition(" ")[0].removesuffix(",") not in standing.states)


def watched(events: Iterable[Event]) -> Iterator[Event]:
    """Print events as they come, and pass them on."""
    terminal = (sys.stderr if as_json() else sys.stdout).isatty()
    with _table() if terminal else nullcontext() as table:
        watch = _Watch(table)
        for event in events:
            watch.see(event)
            yield event


class _Watch:
    """What was seen of a run so far. ``forecasts``: as `compared` takes them."""

    def __init__(self, table: "Live | None") -> None:
        self.table, self.began, self.said = table, time.monotonic(), time.monotonic()
        self.outlook: Outlook | None = None
        self.left: Left | None = None
        self.looked, self.pause, self.looking = 0.0, _LOOK_SECONDS, Thread()
        self.forecasts: dict[float, float] = {}
        self.waiting = Counter[str]()

    def see(self, event: Event) -> None:
        """Print what an event says."""
        match event:
            case Began():
                self.outlook = Outlook(event.opened)
            case Standing() if self.outlook is not None and (event.tasks or waiting(event)):
                self._look(self.outlook, event)
                self._show(self.outlook.opened, event)
            case Ended():
                self._print(compared({**self.forecasts}, time.monotonic() - self.began))
        if not (self.table and isinstance(event, Reported)):  # the table has it
            self._print(status.line(event))

    def _look(self, outlook: Outlook, standing: Standing) -> None:
        """Ask what is left, not too often, and beside the run: for a thousand jobs the answer takes half a minute."""
        if time.monotonic() - self.looked >= self.pause and not self.looking.is_alive():
            self.looking = Thread(target=self._ask, args=(outlook, standing), daemon=True)
            self.looking.start()

    def _ask(self, outlook: Outlook, standing: Standing) -> None:
        begin = time.monotonic()
        self.left, self.looked = outlook.left(standing, time.time()), begin
        self.pause = max(_LOOK_SECONDS, (time.monotonic() - begin) / _SHARE)
        if self.left is not None:
            self.forecasts[begin - self.began] = begin - self.began + self.left.seconds

    def _show(self, opened: Opened, standing: Standing) -> None:
        if not self.table and time.monotonic() - self.said < self._pause(standing):
            return
        left = self.left.after(time.monotonic() - self.looked) if self.left else None
        rows = doing(opened, standing, left, time.time())
        if self.table:
            self.table.update(_drawn(standing, rows, left), refresh=True)
        else:
            self.said, self.waiting = time.monotonic(), waiting(standing)
            self._print(status.stamped(minute(standing, rows, left)))

    def _pause(self, standing: Standing) -> float:
        return _LINE_SECONDS if waiting(standing) == self.waiting else _WAITING_SECONDS

    def _print(self, text: str) -> None:
        text = lines(text)
        if text and self.table:
            self.table.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif text:
            say(text)


def _table() -> "Live":
    from rich.console import Console
    from rich.live import Live

    return Live(console=Console(stderr=as_json()), auto_refresh=False, transient=True)


def _drawn(standing: Standing, rows: Sequence[Doing], left: Left | None) -> Any:
    from rich import box
    from rich.table import Table

    drawn = Table(*HEADER, box=box.SIMPLE_HEAD, caption=headline(standing, rows, left), caption_justify="left")
    for column in drawn.columns[1:]:
        column.justify = "right"
    for row in rows:
        drawn.add_row(*row.cells())
    return drawn

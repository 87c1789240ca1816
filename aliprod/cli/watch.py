"""A run on its way, printed: lines, one a minute at least; in a terminal a table below them that stays in its place."""

import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from threading import Thread
from typing import TYPE_CHECKING, Any

from aliprod.build.events import Began, Ended, Event, Reported, Standing
from aliprod.cli.flags import as_json, say
from aliprod.forecast.left import Left, Outlook
from aliprod.plan.open import Opened
from aliprod.report import live, status
from aliprod.shown import lines

if TYPE_CHECKING:
    from rich.live import Live

_LINE_SECONDS, _WAITING_SECONDS = 60.0, 15.0  # between two lines; before one that says anew what is waited for
_LOOK_SECONDS = 5.0
_SHARE = 0.05  # of the time at most is spent on looking at what is left


def watched(events: Iterable[Event]) -> Iterator[Event]:
    """Print events as they come, and pass them on."""
    terminal = (sys.stderr if as_json() else sys.stdout).isatty()
    with _table() if terminal else nullcontext() as table:
        watch = _Watch(table)
        for event in events:
            watch.see(event)
            yield event


def _table() -> "Live":
    from rich.console import Console
    from rich.live import Live

    return Live(console=Console(stderr=as_json()), auto_refresh=False, transient=True)


class _Watch:
    """What was seen of a run so far.

    Attributes:
        forecasts: what the run was expected to take in all, by the seconds after which that was said.
    """

    def __init__(self, table: "Live | None") -> None:
        self.table, self.began, self.said = table, time.monotonic(), time.monotonic()
        self.opened: Opened | None = None
        self.outlook: Outlook | None = None
        self.left: Left | None = None
        self.looked, self.pause, self.looking = 0.0, _LOOK_SECONDS, Thread()
        self.forecasts: dict[float, float] = {}
        self.waiting = Counter[str]()

    def see(self, event: Event) -> None:
        """Print what an event says."""
        match event:
            case Began():
                self.opened, self.outlook = event.opened, Outlook(event.opened)
            case Standing() if self.opened is not None and (event.tasks or live.waiting(event)):
                self._look(event)
                self._show(self.opened, event)
            case Ended():
                self._print(live.compared({**self.forecasts}, time.monotonic() - self.began))
        if not (self.table and isinstance(event, Reported)):  # the table has it
            self._print(status.line(event))

    def _look(self, standing: Standing) -> None:
        """Ask what is left, not too often, and beside the run: for a thousand jobs the answer takes half a minute."""
        resting = time.monotonic() - self.looked < self.pause
        if self.outlook is not None and not resting and not self.looking.is_alive():
            self.looking = Thread(target=self._ask, args=(self.outlook, standing), daemon=True)
            self.looking.start()

    def _ask(self, outlook: Outlook, standing: Standing) -> None:
        begin = time.monotonic()
        self.left, self.looked = outlook.left(standing, time.time()), begin
        self.pause = max(_LOOK_SECONDS, (time.monotonic() - begin) / _SHARE)
        if self.left is not None:
            self.forecasts[begin - self.began] = begin - self.began + self.left.seconds

    def _show(self, opened: Opened, standing: Standing) -> None:
        left = self.left.after(time.monotonic() - self.looked) if self.left else None
        if self.table:
            rows = live.doing(opened, standing, left, time.time())
            self.table.update(_drawn(standing, rows, left), refresh=True)
        elif time.monotonic() - self.said >= self._pause(standing):
            self.said, self.waiting = time.monotonic(), live.waiting(standing)
            rows = live.doing(opened, standing, left, time.time())
            self._print(status.stamped(live.minute(standing, rows, left)))

    def _pause(self, standing: Standing) -> float:
        """Seconds from one line to the next."""
        return _LINE_SECONDS if live.waiting(standing) == self.waiting else _WAITING_SECONDS

    def _print(self, text: str) -> None:
        text = lines(text)
        if text and self.table:
            self.table.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif text:
            say(text)


def _drawn(standing: Standing, rows: list[live.Doing], left: Left | None) -> Any:
    """The table of what is being made."""
    from rich import box
    from rich.table import Table

    caption = live.headline(standing, rows, left)
    drawn = Table(*live.HEADER, box=box.SIMPLE_HEAD, caption=caption, caption_justify="left")
    for column in drawn.columns[1:]:
        column.justify = "right"
    for row in rows:
        drawn.add_row(*live.cells(row))
    return drawn

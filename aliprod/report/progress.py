"""How far a long command is, on stderr: one line that is renewed on a terminal, a line now and then in a log."""

import sys
import time
from collections.abc import Iterable

from aliprod.ingest.prepare import PreparedCatalogue, PrepareProgress

_LOG_SECONDS = 30.0  # between two lines of a log
_TERMINAL_SECONDS = 0.2


def prepared(events: Iterable[PrepareProgress | PreparedCatalogue]) -> PreparedCatalogue:
    """Show each PrepareProgress; what comes at the end."""
    began, terminal = time.monotonic(), sys.stderr.isatty()
    due, renewed = began, False
    for event in events:
        now = time.monotonic()
        if isinstance(event, PreparedCatalogue):
            sys.stderr.write("\n" if renewed else "")
            return event
        if now >= due or event.images == event.of:
            sys.stderr.write(f"\r{event.line(now - began)}\033[K" if terminal else f"{event.line(now - began)}\n")
            sys.stderr.flush()
            due, renewed = now + (_TERMINAL_SECONDS if terminal else _LOG_SECONDS), terminal
    raise ValueError("nothing was prepared")

"""What tells a run to stop: Ctrl-C, `ray job stop` (SIGTERM), a terminal that is closed (SIGHUP)."""

import os
import signal
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Signals:
    """Whether a run was told to stop.

    Attributes:
        told: it was.
        gently: something runs that takes a checkpoint first: one signal sets ``told``, another raises
            KeyboardInterrupt, as all do while nothing runs.
    """

    def __init__(self) -> None:
        self.told, self.gently = False, False
        main = threading.current_thread() is threading.main_thread()
        self.heeded = [one for one in _SIGNALS if main and signal.getsignal(one) != signal.SIG_IGN]  # else: nohup

    def listen(self) -> None:
        """Heed the signals from now on."""
        for number in self.heeded:
            signal.signal(number, self._hear)

    @contextmanager
    def starting_others(self) -> Iterator[None]:
        """Have processes that are started outlive a closed terminal until they are told to end; ray.init sets handlers
        of its own besides."""
        if signal.SIGHUP in self.heeded:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what they inherit
        try:
            yield
        finally:
            self.listen()

    def _hear(self, number: int, _: object) -> None:
        if number == signal.SIGHUP:
            _leave_terminal()
        at_once = self.told or not self.gently
        self.told = True
        if at_once:
            raise KeyboardInterrupt


def _leave_terminal() -> None:
    """Let go of a terminal that is gone: whatever is written to it fails."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        if stat.S_ISCHR(os.fstat(descriptor).st_mode):  # isatty() is false once it is gone
            os.dup2(nowhere, descriptor)

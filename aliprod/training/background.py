"""One write at a time, beside the training."""

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

log = logging.getLogger(__name__)


class Background:
    """A thread for writes; leaving the context waits for the one under way.

    What a write raised is raised once: by the next `check`, `start` or `wait`, or by a context that ends well.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._write: Future[None] | None = None

    def start(self, prepare: Callable[[], Callable[[], None]]) -> None:
        """Wait for the write before, call ``prepare`` here, and what it returns in the thread.

        Two writes never wait behind each other: ``prepare`` makes copies, and memory has room for one set.
        """
        if self._write is not None and not self._write.done():
            log.info("The checkpoint before is still being written: training waits for it.")
        self.wait()
        self._write = self._thread.submit(prepare())

    def check(self) -> None:
        """Raise what a write that has ended raised. Takes a microsecond."""
        if self._write is not None and self._write.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the write under way."""
        write, self._write = self._write, None
        if write is not None:
            write.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._thread.shutdown()
        if kind is None:
            self.wait()

"""One write at a time, beside the training."""

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager

log = logging.getLogger(__name__)


class Background:
    """A thread for writes. An error of a write is raised once: by the next `check`, `start` or `wait`."""

    def __init__(self, thread: Executor) -> None:
        self._thread = thread
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
        """Raise the error of a write that has ended. Takes a microsecond."""
        if self._write is not None and self._write.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the write under way."""
        write, self._write = self._write, None
        if write is not None:
            write.result()


@contextmanager
def background() -> Iterator[Background]:
    """A thread for writes. Leaving the context waits for the one under way; leaving it well raises its error, too."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint") as thread:
        writer = Background(thread)
        yield writer
    writer.wait()

"""Processes that read pictures side by side, and end when one of them dies."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import active_children, get_context
from multiprocessing.process import BaseProcess
from typing import TypeVar

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Pool:
    """``bystanders``: processes of this one that were there before."""

    executor: ProcessPoolExecutor
    bystanders: frozenset[BaseProcess]

    def submit(self, work: Callable[[Asked], Answer], asked: Asked) -> "Future[Answer]":
        return self.executor.submit(work, asked)

    def result(self, future: "Future[Answer]") -> Answer:
        """What came of it, however long it takes.

        Raises:
            BrokenProcessPool: a process died; the others are ended.
        """
        try:
            return future.result()
        except BrokenProcessPool:
            for process in set(active_children()) - self.bystanders:
                process.kill()  # CPython 3.11 else waits for ever for one that was just being started
            raise


@contextmanager
def pool(processes: int, begin: Callable[[], None] | None = None) -> Iterator[Pool]:
    """So many processes, each of which calls ``begin`` first; at the end what is being worked on is finished."""
    bystanders = frozenset(active_children())
    executor = ProcessPoolExecutor(processes, get_context("spawn"), begin)
    try:
        yield Pool(executor, bystanders)
    finally:
        executor.shutdown(cancel_futures=True)

"""Work that processes and threads do side by side, and the memory that they keep."""

import ctypes
import fcntl
import logging
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

from aliprod.errors import Failed, Refused

Task = TypeVar("Task")
Result = TypeVar("Result")

log = logging.getLogger(__name__)
_AT_ONCE = 32  # images that may come together, a while after the start
_READERS = 32  # threads that read side by side
_MALLOC = {  # of glibc (malloc.h, mallopt(3)): a variable, its number, a value
    "MALLOC_MMAP_THRESHOLD_": (-3, 2**30),
    "MALLOC_TRIM_THRESHOLD_": (-1, 2**31 - 1),
    "MALLOC_ARENA_MAX": (-8, 1),
}
KEEPING = {name: str(value) for name, (_, value) in _MALLOC.items()}  # variables, for processes that are not yet there


def keep_freed_memory() -> None:
    """Keep what this process frees, for itself: all threads that are not yet there and the first one share one heap.

    A step on CPUs frees gigabytes that the next one needs. glibc would give them back to the system, which clears each
    page anew: up to a half of the CPU's time (benchmarks/freed_memory.py). Another C library is left as it is.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        for number, value in _MALLOC.values():
            mallopt(number, value)


@contextmanager
def locked(file: IO[Any], wait: bool = True) -> Iterator[None]:
    """Hold the lock of a file, which the system takes back when this process ends, however it ends; close it then.
    Refused: another process holds it, and we do not wait."""
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise Refused("another process is at work here.", Path(file.name).parent, "Wait until it ends.") from error
        except OSError:  # a mount without locks: two writers waste time, and one commit wins
            log.warning("%s cannot be locked: start one process at a time.", file.name)
        yield


@dataclass(frozen=True)
class ReadProgress:
    """So many images ``of`` all are done, ``found`` of them by an earlier call that was cut short."""

    images: int
    of: int
    found: int
    broken: int

    def line(self, seconds: float) -> str:
        """For a terminal, after so many seconds."""
        here = self.images - self.found
        known = here >= _AT_ONCE or self.images == self.of
        left = f"{seconds * (self.of - self.images) / max(1, here):,.0f} s left" if known else "..."
        found = f", {self.found:,} found" if self.found else ""
        return f"{self.images:,} of {self.of:,} images{found}, {self.broken:,} unreadable, {left}"


class Ahead(Generic[Task, Result]):
    """Reads side by side what is asked for before it is taken: a server far away answers after 20 to 100 ms."""

    def __init__(self, read: Callable[[Task], Result]) -> None:
        self.read, self.asked = read, dict[Task, Future[Result]]()
        self.threads = ThreadPoolExecutor(_READERS)

    def ask(self, tasks: Iterable[Task]) -> None:
        """Begin to read, without waiting."""
        self.asked |= {task: self.threads.submit(self.read, task) for task in tasks}

    def take(self, task: Task) -> Result:
        """What was asked for, or is read now. It raises as ``read`` does."""
        asked = self.asked.pop(task, None)
        return asked.result() if asked else self.read(task)


def ordered_map(
    work: Callable[[Task], Result], tasks: Iterable[Task], processes: int, where: Callable[[Task], str], advice: str
) -> Iterator[Result]:
    """Results in the order of the tasks, of so many processes that start afresh ("spawn"), or of this one alone; never
    more tasks in flight than they need. Whoever stops early waits for what is being worked on.

    Raises:
        Failed: a process died; ``where`` names the first task without a result. The others are ended.
    """
    if processes <= 1:
        yield from map(work, tasks)
        return
    bystanders, ahead = set(active_children()), deque[tuple[Task, Future[Result]]]()
    executor = ProcessPoolExecutor(processes, get_context("spawn"), _follow_parent)
    try:
        for task in tasks:
            ahead.append((task, executor.submit(work, task)))
            if len(ahead) > 2 * processes:
                yield ahead[0][1].result()
                ahead.popleft()
        while ahead:
            yield ahead[0][1].result()
            ahead.popleft()
    except BrokenProcessPool as error:
        for process in set(active_children()) - bystanders:
            process.kill()  # CPython 3.11 else waits for ever for one that was just being started
        advice = f"Was it out of memory? {advice}"
        raise Failed("A process died at its work.", where(ahead[0][0] if ahead else task), advice) from error
    finally:
        executor.shutdown(cancel_futures=True)


def _follow_parent() -> None:
    """End when the parent was killed, and leave to it what Ctrl-C means."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if parent := parent_process():
        threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def _end_after(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)

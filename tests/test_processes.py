"""processes: results in order, few tasks in flight, and whoever dies is named."""

import os
import platform
import subprocess
import sys
from collections.abc import Iterator

import pytest

from aliprod.errors import Failed
from aliprod.processes import ordered_map


@pytest.mark.parametrize("processes", [1, 2])
def test_results_come_in_the_order_of_the_tasks_and_few_are_in_flight(processes: int) -> None:
    pulled = []

    def tasks() -> Iterator[int]:
        for number in range(50):
            pulled.append(number)
            yield -number

    for number, result in enumerate(ordered_map(abs, tasks(), processes, str, "")):
        assert result == number
        assert len(pulled) <= number + 2 * processes + 1
    assert len(pulled) == 50


def test_an_error_of_the_work_arrives_as_it_is() -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        list(ordered_map(int, ["1", "x"], 2, str, ""))


def test_what_a_process_died_of_is_named_with_the_advice() -> None:
    with pytest.raises(Failed, match="Take it out") as failed:
        list(ordered_map(os._exit, [7, 8], 2, lambda task: f"task {task}", "Take it out."))
    assert failed.value.where == "task 7"


TOUCH = """
import resource, sys, threading
from aliprod.processes import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def touch(): b"1" * (100 << 20)
def count():
    touch()
    before = faults()
    touch()
    print(faults() - before)
count()
thread = threading.Thread(target=count)
thread.start()
thread.join()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library is left as it is")
def test_pages_of_freed_memory_are_not_cleared_again_whichever_thread_has_freed_them() -> None:
    def counted(how: str) -> list[int]:
        return [int(line) for line in subprocess.check_output([sys.executable, "-c", TOUCH, how], text=True).split()]

    assert min(counted("freed")) > 10_000  # of 4 KB
    assert max(counted("kept")) < 1_000

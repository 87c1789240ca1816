"""processes: results in order, few tasks in flight, and whoever dies is named."""

import os
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

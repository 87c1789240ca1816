"""processes: results in order, few tasks in flight, and whoever dies is named."""

import os
from collections.abc import Iterator

import pytest

from aliprod.errors import Failed
from aliprod.processes import pool


@pytest.mark.parametrize("processes", [1, 2])
def test_results_come_in_the_order_of_the_tasks_and_few_are_in_flight(processes: int) -> None:
    pulled = []

    def tasks() -> Iterator[int]:
        for number in range(50):
            pulled.append(number)
            yield -number

    with pool(processes) as workers:
        for number, result in enumerate(workers.ordered_map(abs, tasks(), str, "")):
            assert result == number
            assert len(pulled) <= number + 2 * processes + 1
    assert len(pulled) == 50


def test_one_pool_serves_several_maps_and_an_error_of_the_work_arrives_as_it_is() -> None:
    with pool(2) as workers:
        assert list(workers.ordered_map(len, ["a", "bc"], str, "")) == [1, 2]
        with pytest.raises(ValueError, match="invalid literal"):
            list(workers.ordered_map(int, ["1", "x"], str, ""))
        assert list(workers.ordered_map(int, ["3"], str, "")) == [3]


def test_what_a_process_died_of_is_named_with_the_advice() -> None:
    with pool(2) as workers, pytest.raises(Failed, match="Take it out") as failed:
        list(workers.ordered_map(os._exit, [7, 8], lambda task: f"task {task}", "Take it out."))
    assert failed.value.where == "task 7"

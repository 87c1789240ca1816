"""A forecast in words."""

from typing import Any

import pytest

from aliprod.report.estimate import HEADER, cells, duration, lines

ESTIMATE: dict[str, Any] = {
    "gpus": 8,
    "seconds": 36_000.0,
    "gpu_hours": 70.0,
    "lower_bound_seconds": 31_500.0,
    "prediction_seconds": 3600.0,
    "devices": ["NVIDIA H100"],
    "missing": [],
}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (7500, "2 h 05 min"), (273_600, "3 d 4 h")],
)
def test_a_duration_is_said_in_its_two_largest_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_total_is_told_beside_what_no_schedule_goes_below() -> None:
    [total] = lines(ESTIMATE, True, "")
    assert "8 GPUs: 10 h 00 min, 70.00 GPU-hours" in total
    assert "less than 8 h 45 min" in total


def test_a_job_whose_ranks_change_tells_the_first_and_the_last() -> None:
    job = {"seconds": 60.0, "begin": 0.0, "end": 60.0, "ranks": (2, 8), "images_per_second": 9.0, "source": "x"}
    assert cells(job)[HEADER.index("ranks")] == "2, then 8"


def test_rates_of_a_cpu_are_told_apart_where_gpus_are_asked_for() -> None:
    of_cpu = ESTIMATE | {"devices": ["NVIDIA H100", "cpu"]}
    assert "CPU" in list(lines(of_cpu, True, ""))[-1]
    [total] = lines(of_cpu, False, "")
    assert "8 ranks" in total


def test_what_is_missing_is_named_with_the_command_that_measures_it() -> None:
    unknown = dict.fromkeys(ESTIMATE) | {"missing": ["net/full", "net/full hashes"]}
    first, second = lines(unknown, True, "aliprod benchmark train plan.toml")
    assert "net/full" in first
    assert first.endswith("aliprod benchmark train plan.toml")
    assert "Hashes" in second


def test_a_finished_job_has_empty_cells_and_one_without_a_rate_says_so() -> None:
    job = {"seconds": 0.0, "begin": None, "end": None, "ranks": (), "images_per_second": None, "source": None}
    assert cells(job) == [""] * len(HEADER)
    assert cells(job | {"seconds": None})[-1] == "not measured"

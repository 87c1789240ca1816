"""What the doctor makes of what one machine cannot show: clocks, GPUs, memory, other packages, full disks."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aliprod.cluster import doctor
from aliprod.cluster.facts import Facts, facts, software
from aliprod.forecast.demand import Demand

FACTS = Facts(software(), (), None, 0, 64 << 30, 32 << 30, 8 << 30, 1 << 30, 65536, False)
A10 = "NVIDIA A10G, 580.65.06, 23028 MiB"


def clocks(ahead: float, *trips: float) -> tuple[Callable[[], float], Callable[[], float]]:
    """The clock of a node, and ours. trips: seconds on the way there and back of each question."""
    ours, ways = [1000.0], [trip / 2 for trip in trips for _ in range(2)]

    def now() -> float:
        ours[0] += ways.pop(0)
        said = ours[0] + ahead
        ours[0] += ways.pop(0)
        return said

    return now, lambda: ours[0]


@pytest.mark.parametrize("ahead", [-200.0, -0.5, 0.0, 90.0])
def test_a_clock_is_judged_by_its_quickest_answer(ahead: float) -> None:
    found, error = doctor._skew(*clocks(ahead, 3.0, 0.25, 1.0))
    assert found == pytest.approx(ahead)
    assert error == pytest.approx(0.125)
    check = doctor._clock("n", found, error)
    assert check.ok == (abs(ahead) < 60)
    assert ("NTP" in check.advice) is not check.ok
    assert f"{abs(ahead):.3f} s {'ahead of' if ahead > 0 else 'behind'}" in check.found


def test_a_slow_answer_accuses_no_clock() -> None:
    assert doctor._clock("n", 61.0, 2.0).ok


@pytest.mark.parametrize(
    ("gpus", "cuda", "visible", "counted", "advice"),
    [
        ((), None, 0, 0, ""),
        ((A10,) * 4, "13.0", 4, 4, ""),
        ((), "13.0", 0, 4, "nvidia-smi names none"),
        ((A10,) * 4, None, 0, 4, "without CUDA"),
        ((A10,) * 4, "13.0", 0, 4, "torch is built for CUDA 13.0: update the driver"),
    ],
)
def test_gpus_that_ray_counts_are_found_by_torch(
    gpus: tuple[str, ...], cuda: str | None, visible: int, counted: int, advice: str
) -> None:
    check = doctor._gpus("n", replace(FACTS, gpus=gpus, cuda=cuda, visible=visible), counted)
    assert check.ok == (not advice)
    assert advice in check.advice
    assert ("4 x NVIDIA A10G, 580.65.06" in check.found) == (len(gpus) == 4)


@pytest.mark.parametrize("package", ["ray", "python", "torch"])
def test_another_version_is_named_with_ours(package: str) -> None:
    own = software()
    assert doctor._software("n", own, own).ok
    check = doctor._software("n", own | {package: "1.2.3"}, own)
    assert (check.ok, check.found) == (False, f"{package} 1.2.3 and not {own[package]}")
    assert "one image" in check.advice


@pytest.mark.parametrize(
    ("spoilt", "name"),
    [
        ({"free_memory": 10**9}, "memory"),
        ({"shared_memory": 64 << 20}, "shared memory"),
        ({"open_files": 256}, "open files"),
    ],
)
def test_what_a_node_lacks_is_named_and_nothing_else(spoilt: dict[str, Any], name: str) -> None:
    assert all(check.ok for check in doctor._limits("n", FACTS))
    assert [check.name for check in doctor._limits("n", replace(FACTS, **spoilt)) if not check.ok] == [name]


def test_a_plan_that_is_larger_than_the_disk_is_told_apart_from_one_that_fits(tmp_path: Path) -> None:
    resume = {"a": 3e18, "b": 1e18, "c": 2e18}
    fits = doctor._disk(tmp_path / "new", Demand({}, {"a": 1e3}, {"a": 1e3}, 0, {}), 1)
    assert fits.ok, fits
    check = doctor._disk(tmp_path / "new", Demand({}, {"a": 5e18}, resume, 0, {}), 2)
    assert not check.ok
    assert (
        "the plan takes 5,000,000,000.0 GB, and its checkpoints 5,000,000,000.0 GB" in check.found
    )  # of the two largest
    assert doctor._disk(tmp_path, Demand({}, {"a": float("nan")}, {}, 0, {}), 1).ok


def test_facts_are_those_of_this_machine_without_ray(tmp_path: Path) -> None:
    (tmp_path / "driver").write_text("token")
    found = facts(tmp_path, "me", 1 << 20, tmp_path)
    assert (found.seen, found.storage, (tmp_path / "me").read_text()) == ("token", "", "token")
    assert min(found.write, found.read, found.sync) > 0
    assert 0 < found.free_memory < found.memory
    assert found.catalogue
    assert found.software["aliprod"] == "0.1.0"
    gone = facts(tmp_path / "gone", "me", 1 << 20, None)
    assert (gone.storage, gone.write, gone.catalogue) == ("No such file or directory", 0.0, False)

"""Measurements and the forecast that is made of them."""

from pathlib import Path

import pytest
from shop import Shop, aliprod, answer, refusal

from aliprod.cli.experiments import _verdict
from aliprod.cluster.tune import Found, Trial
from aliprod.forecast.simulate import STARTING_SECONDS


@pytest.mark.parametrize("part", ["loader", "step", "train"])
def test_benchmark_tells_how_fast_and_what_limits(photos: Path, part: str) -> None:
    flags = ("--network", "test_resnet", "--crop", "32", "--batch-size", "4", "--steps", "2")
    found = answer("benchmark", part, photos, *flags)
    assert found["images_per_second"] > 0
    assert 0 <= found["data_wait_share"] <= 1
    assert found["limited_by"] in ("loader", "step")
    assert "images/s on cpu" in aliprod("benchmark", part, photos, *flags).output


def test_a_measured_plan_has_a_forecast_and_one_that_is_not_names_the_command(shop: Shop) -> None:
    flags = ("--set", "defaults.batch_size=4", "--set", "cluster.use_gpu=false")
    before = answer("plan", shop.plan, *flags, "--gpus", "2")["estimate"]
    assert (before["seconds"], before["missing"]) == (None, ["net/full", "net/accuracy", "net/accuracy test"])
    said = aliprod("plan", shop.plan, *flags, "--gpus", "2").stdout
    assert f"aliprod benchmark train {shop.plan} --set defaults.batch_size=4" in said
    measured = answer("benchmark", "train", shop.plan, *flags, "--steps", "1")["measured"]
    assert [(found["part"], found["jobs"]) for found in measured] == [
        ("train", ["net/full"]),
        ("train", ["net/accuracy"]),
        ("center", ["net/full", "net/accuracy"]),
        ("ten_crop", ["net/accuracy"]),
    ]
    found = answer("plan", shop.plan, *flags, "--gpus", "1")["estimate"]  # nothing runs beside it
    full, accuracy = found["jobs"]
    assert full["images_per_second"] == pytest.approx(measured[0]["images_per_second"])
    assert 0 == full["begin"] < full["end"] == accuracy["begin"] < accuracy["end"] < found["seconds"]
    worked = found["seconds"] - 2 * STARTING_SECONDS  # of two trainings, one behind the other
    assert found["lower_bound_seconds"] == pytest.approx(worked), "a chain"
    assert "On 2 ranks: " in aliprod("plan", shop.plan, *flags, "--gpus", "2").stdout


def test_plan_without_gpus_estimates_nothing(shop: Shop) -> None:
    assert answer("plan", shop.plan)["estimate"] is None


def test_benchmark_refuses_flags_that_a_plan_says_itself_and_those_of_a_plan_for_a_catalogue(shop: Shop) -> None:
    assert "--batch-size" in refusal(2, "benchmark", "step", shop.plan, "--batch-size", "4")
    assert "--set" in refusal(2, "benchmark", "step", "photos", "--set", "seed=1")


def test_benchmark_names_the_network_that_is_meant(photos: Path) -> None:
    result = aliprod("benchmark", "step", photos, "--network", "resnet5")
    assert result.exit_code == 2
    assert "resnet50" in result.stderr


@pytest.mark.parametrize(
    ("own", "best", "offered"),
    [(0.30, 0.20, True), (0.23, 0.20, False), (0.20, 0.20, False), (None, 0.20, True), (None, None, False)],
)
def test_rates_are_offered_where_they_gain_more_than_a_standard_error(
    own: float | None, best: float | None, offered: bool
) -> None:
    theirs, plans = Trial(0.1, 1.0, best), Trial(0.01, 0.1, own)
    said = _verdict(Found("net/full", (theirs, plans), plans, images=100), "rates")  # 100 images: 4 points
    assert ("--set 'rates'" in said) == offered

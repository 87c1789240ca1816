"""Measurements and the forecast that is made of them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from shop import Shop, aliprod, answer, refusal

from aliprod.cli.experiments import _tables, _verdict
from aliprod.cluster.trials import Trial
from aliprod.cluster.tune import Found
from aliprod.ensemble.compare import Gain
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


def found(own: float, *gains: tuple[float, float, float], **said: Any) -> Found:
    """What a search of seven others has found, whose finalists had these gains."""
    trials = tuple(Trial("", {"lr.heads": 0.1 * number}, 0, (own,), ended=True) for number in range(8))
    judged = [Gain((0.2, 0.3), gain, (low, high)) for gain, low, high in gains]
    finalists = tuple(zip(trials[1:], judged, strict=False))
    said = {"override": None, "left": 0, "failed": (), "hours": 0.1} | said
    return Found(job="net/full", own=trials[0], trials=trials, epochs=1, finalists=finalists, **said)


def test_a_gain_beyond_its_interval_is_told_with_what_to_paste() -> None:
    shown = _verdict(found(0.3, (0.5, -0.1, 1.1), (0.013, 0.004, 0.022), override={}), "the line", "[the table]")
    assert (
        "Gain 1.3 points (95 %: 0.4 to 2.2), with 2 other seeds: a top-1 error of 25.00% on val, not of 26.30%" in shown
    )
    assert "--set 'the line'\nor in the plan:\n\n[the table]\n" in shown


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (found(0.3), "the plan's own settings had 30.00%, and none of 7 others had less"),
        (found(0.3, (0.003, -0.005, 0.011)), "the best of 7 others gained 0.3 points (95 %: -0.5 to 1.1)"),
        (found(0.3, left=3), "3 trials were not begun: tune.hours is spent."),
        (
            found(0.3, failed=("out of memory", "x")),
            "2 came to no end, and are tried by the same command again: out of",
        ),
    ],
)
def test_where_nothing_is_beyond_it_nothing_is_offered_and_it_is_said_why(said: Found, words: str) -> None:
    shown = _verdict(said, None, None)
    assert shown.startswith("Nothing beat what you have: ")
    assert "--set" not in shown
    assert words in shown


def test_trials_are_shown_with_what_varies_and_where_they_ended() -> None:
    stopped = Trial("", {"lr.heads": 0.1, "objective.smoothing": None}, 0, (0.5,), ended=True)
    diverged = Trial("", {"lr.heads": 9.0, "objective.smoothing": 0.2}, 0, (), ended=True, diverged=True)
    shown = _tables(replace(found(0.3), own=stopped, trials=(stopped, diverged))).split("\n")
    assert shown[0].split() == ["lr.heads", "objective.smoothing", "top-1", "error", "on", "val"]
    assert shown[2].split() == ["0.1", "-", "50.00%", "after", "1", "epoch"]
    assert shown[3].split() == ["9.0", "0.2", "diverged", "after", "0", "epochs"]

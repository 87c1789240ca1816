"""A run on its way, in one line and in the rows of a table."""

import json
from pathlib import Path

import pytest

from aliprod.build.events import Standing, Task
from aliprod.cli import watch
from aliprod.forecast.left import Left
from aliprod.plan.jobs import jobs_of
from aliprod.plan.load import load
from aliprod.plan.open import Opened
from aliprod.plan.places import resolve

PLAN = """\
format = 1
name = "shop"
catalogue = { path = "pictures" }
backbones = { net = "resnet18.a1_in1k" }
stages = { full = { epochs = 4 }, accuracy = { start = "full", epochs = 2 }, dcl = { start = "full" } }
jobs = { net = ["full", "accuracy", "dcl"] }
ensemble = { members = ["net/accuracy"] }
"""
STANDING = Standing(
    states={"net/full": "reused", "net/accuracy": "running", "net/dcl": "waiting"},
    reasons={"net/dcl": "2 GPUs"},
    tasks=(
        Task("net/full test", "prediction", "net/full", ("a",), 1000.0),
        Task("net/full val", "prediction", "net/full", ("a",), 1000.0, 1020.0),
        Task("net/accuracy", "training", "net/accuracy", ("a", "b"), 1000.0),
    ),
)


@pytest.fixture
def opened(tmp_path: Path) -> Opened:
    (tmp_path / "plan.toml").write_text(PLAN)
    plan = load(tmp_path / "plan.toml")
    return Opened(plan, PLAN, resolve(plan, tmp_path / "runs", None, None), None, jobs_of(plan, "0" * 64))


def told(opened: Opened, **pace: float) -> None:
    """As a job that is in its second epoch."""
    folder = opened.job_folder("net/accuracy")
    (folder / "resume").mkdir(parents=True)
    line = {"epoch": 0, "time_ms": 1, "val/top1_error": 0.25, "speed/images_per_second": 80.0}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    (folder / "resume" / "pace.json").write_text(json.dumps(pace))


def test_a_line_says_what_is_done_what_runs_and_what_is_left(opened: Opened) -> None:
    left = Left(870.0, {"net/accuracy": 185.0})
    rows = watch.doing(opened, STANDING, left, now=1065.0)
    assert watch.minute(STANDING, rows, left) == (
        "1 of 3 jobs done, 1 running, 1 x prediction, 1 waiting for 2 GPUs (net/accuracy x2 epoch 0/2 starting, "
        "3 min 05 s left; net/full test prediction for 1 min 05 s); about 14 min 30 s left"
    )
    told(opened, step=7, images_per_second=1064.4)
    training, prediction = watch.doing(opened, STANDING, None, now=1065.0)
    assert training.cells() == ["net/accuracy", "2", "1/2", "25.00%", "1,064", "1 min 05 s", ""]
    assert prediction.cells() == ["net/full test (prediction)", "1", "", "", "", "1 min 05 s", ""]
    assert "net/accuracy x2 epoch 1/2 1,064 images/s; net" in watch.minute(STANDING, [training, prediction], None)


def test_a_job_that_waits_for_room_is_told_and_one_that_waits_for_another_is_not() -> None:
    assert watch.waiting(STANDING) == {"2 GPUs": 1}
    for of_a_job in ("net/full", "net/full, net/accuracy", "net/full soft labels of all images"):
        assert watch.waiting(Standing(STANDING.states, {"net/dcl": of_a_job})) == {}


def test_the_forecast_of_the_first_tenth_stands_beside_what_it_took() -> None:
    forecasts = {50.0: 700.0, 95.0: 640.0, 105.0: 610.0}
    assert watch.compared(forecasts, 600.0) == "Forecast after 50 s: 11 min 40 s in all. It took 10 min 00 s."
    assert watch.compared(forecasts, 1000.0) == "Forecast after 1 min 35 s: 10 min 40 s in all. It took 16 min 40 s."
    assert watch.compared({90.0: 700.0}, 600.0).startswith("Forecast after 1 min 30 s"), "there was none before"
    assert watch.compared({}, 12.0) == "It took 12 s."


def test_what_is_left_passes_with_the_time() -> None:
    assert Left(100.0, {"a": 10.0, "b": 50.0}).after(20.0) == Left(80.0, {"a": 0.0, "b": 30.0})

"""When what was made: with arithmetic written out."""

from pathlib import Path

import pytest

from aliprod.build.events import Standing, Task
from aliprod.build.room import Node
from aliprod.build.target import Resources
from aliprod.catalogue import sources
from aliprod.catalogue.catalogue import Catalogue
from aliprod.plan.jobs import jobs_of
from aliprod.plan.load import load
from aliprod.plan.open import Opened
from aliprod.plan.places import resolve
from aliprod.report.course import course, end, rank_hours

PLAN = """\
format = 1
name = "shop"
catalogue = { path = "photos" }
backbones = { net = "resnet18.a1_in1k" }
defaults = { batch_size = 4, resize = 72, crop = 64 }
stages = { full = { epochs = 3 }, accuracy = { start = "full", epochs = 2 } }
jobs = { net = ["full", "accuracy"] }
ensemble = { members = ["net/accuracy"] }
"""
TRAINING = Task("net/full", "training", "net/full", ("a", "a"), 100.0, 160.0)
NODES = (Node("a", Resources(2, 0)),)


@pytest.fixture
def opened(packages: Catalogue, tmp_path: Path) -> Opened:
    (tmp_path / "photos").symlink_to(packages.root)
    (tmp_path / "plan.toml").write_text(PLAN)
    plan, catalogue = load(tmp_path / "plan.toml"), sources.read(packages.root)
    places = resolve(plan, tmp_path / "runs", None, None)
    return Opened(plan, PLAN, places, catalogue, jobs_of(plan, catalogue.fingerprint))


def test_time_in_which_nothing_was_made_is_left_out_and_what_runs_lasts_until_now(opened: Opened) -> None:
    beside = Task("net/accuracy", "training", "net/accuracy", ("a",), 130.0, 170.0)
    week_later = Task("ensemble", "ensemble", None, ("a",), 600_000.0)
    found = course(opened, Standing(tasks=(week_later,), past=(beside, TRAINING)), 600_010.0)
    assert found.fact == {"net/full": [(0, 60, 2)], "net/accuracy": [(30, 70, 1)], "ensemble": [(70, 80, 1)]}
    assert (end(found.fact), end(found.forecast), found.now) == (80, 0, 80)
    assert found.forecast == {}  # no rate is known


def test_the_forecast_is_of_all_targets_on_the_nodes_that_the_run_had(opened: Opened) -> None:
    folder = opened.job_folder("net/full")
    folder.mkdir(parents=True)
    line = '{"epoch": 0, "speed/images_per_second": 10.0, "speed/ranks": 1, "device": "cpu"}'
    (folder / "metrics.jsonl").write_text(line)
    found = course(opened, Standing(tasks=(TRAINING,), nodes=NODES), 200.0).forecast
    assert {"net/full", "net/accuracy", "net/accuracy test", "ensemble"} <= set(found)
    assert found["net/full"][-1].end <= found["net/accuracy"][0].begin
    none = course(opened, Standing(tasks=(TRAINING,), nodes=(Node("a", Resources(0, 0)),)), 200.0)
    assert none.forecast == {}  # it would wait for ever


def test_hours_count_each_rank_and_attempt_and_gpus_alone_where_there_are_any() -> None:
    again = Task("net/full", "training", "net/full", ("a",), 200.0)
    assert rank_hours([TRAINING, again], 260.0) == {"net/full": (2 * 60 + 60) / 3600}
    on_gpus = Task("net/dcl", "training", "net/dcl", ("a",) * 4, 0.0, 900.0, gpus=1)
    assert rank_hours([on_gpus, TRAINING], 0.0) == {"net/dcl": 1.0, "net/full": 0.0}

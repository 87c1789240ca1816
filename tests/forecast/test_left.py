"""What is left of a run: by what the run has shown, with arithmetic written out."""

import json
from pathlib import Path

import pytest

from aliprod.build.events import JobState, Standing, Task
from aliprod.build.room import Node
from aliprod.build.target import Resources
from aliprod.catalogue import sources
from aliprod.forecast.left import STARTING_ELSE, Left, Outlook
from aliprod.forecast.simulate import STARTING_SECONDS
from aliprod.plan.jobs import jobs_of
from aliprod.plan.load import load
from aliprod.plan.open import Opened
from aliprod.plan.places import resolve

PLAN = """\
format = 1
name = "shop"
catalogue = { path = "photos" }
backbones = { net = "test_resnet.r160_in1k", other = "resnet18.a1_in1k" }
defaults = { batch_size = 4, resize = 72, crop = 64 }
stages = { full = { epochs = 3 }, dcl = { start = "full", objective = { name = "dcl", parts = 2 } } }
jobs = { net = ["full", "dcl"], other = ["full"] }
ensemble = { members = ["net/dcl", "other/full"], views = "center" }
"""
NOW = 5000.0
NODES = (Node("node", Resources(2, 0)),)
TRAINED, VAL, TEST = 20, 12, 20  # images, as the catalogue below has them; an epoch has five steps


@pytest.fixture
def opened(tmp_path: Path, photos: Path) -> Opened:
    (tmp_path / "photos").symlink_to(photos)
    (tmp_path / "plan.toml").write_text(PLAN)
    plan, catalogue = load(tmp_path / "plan.toml"), sources.read(photos)
    assert (len(catalogue.train), len(catalogue.val), len(catalogue.test)) == (TRAINED, VAL, TEST)
    places = resolve(plan, tmp_path / "runs", None, None)
    return Opened(plan, PLAN, places, catalogue, jobs_of(plan, catalogue.fingerprint))


def paced(opened: Opened, name: str, step: int, speed: float) -> None:
    """As a job in its first epoch tells it."""
    folder = opened.job_folder(name) / "resume"
    folder.mkdir(parents=True, exist_ok=True)
    pace = {"step": step, "images_per_second": speed, "ranks": 1, "device": "cpu", "time_ms": 0}
    (folder / "pace.json").write_text(json.dumps(pace))


def training(name: str, since: float, until: float | None = None) -> Task:
    return Task(name, "training", name, ("node",), since, until)


def left(opened: Opened, *tasks: Task) -> Left:
    found = Outlook(opened).left(Standing(tasks=tasks, nodes=NODES), NOW)
    assert found is not None
    return found


def test_nothing_is_said_before_a_rate_is_known(opened: Opened) -> None:
    assert Outlook(opened).left(Standing(tasks=(training("net/full", NOW),), nodes=NODES), NOW) is None


def test_nothing_is_said_while_no_node_holds_what_is_left(opened: Opened) -> None:
    paced(opened, "net/full", 5, 10.0)
    outlook = Outlook(opened)
    assert outlook.left(Standing(nodes=(Node("head", Resources(0, 0)),)), NOW) is None
    assert outlook.left(Standing(nodes=NODES), NOW) is not None


def test_what_nobody_has_measured_is_guessed_by_its_pixels(opened: Opened) -> None:
    paced(opened, "net/full", 5, 10.0)
    found = left(opened, training("net/full", NOW - 30), training("other/full", NOW))
    full = 3 * (TRAINED / 10 + VAL / 30)  # to look at an image takes a third
    dcl = STARTING_SECONDS + 2 * TRAINED / 10 + (2 * VAL + TRAINED) / 30  # an epoch of two views, scored twice
    assert found.ends["net/full"] == pytest.approx(2 / 3 * full)
    assert found.ends["other/full"] == pytest.approx(STARTING_SECONDS + full)
    assert found.ends["net/dcl"] - found.ends["net/full"] == pytest.approx(dcl)
    assert found.ends["net/dcl test"] - found.ends["net/dcl"] == pytest.approx(STARTING_ELSE + TEST / 30)
    assert found.seconds == max(found.ends.values())


def test_a_job_is_as_far_as_its_pace_says(opened: Opened) -> None:
    for step, epochs in ((2, 3), (5, 2), (10, 1), (14, 1), (15, 0)):
        paced(opened, "net/full", step, 10.0)
        rest = left(opened, training("net/full", NOW - 100)).ends["net/full"]
        assert rest == pytest.approx((15 - step) * 4 / 10 + epochs * VAL / 30)


def test_a_job_that_goes_slower_now_takes_longer(opened: Opened) -> None:
    line = {"epoch": 0, "time_ms": 1, "speed/images_per_second": 10.0}
    (opened.job_folder("net/full")).mkdir(parents=True)
    (opened.job_folder("net/full") / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    paced(opened, "net/full", 5, 5.0)
    rest = left(opened, training("net/full", NOW - 30)).ends["net/full"]
    assert rest == pytest.approx(10 * 4 / 5 + 2 * VAL / 30), "its epochs so far went at 10 images/s"


def test_what_has_ended_says_how_far_the_rest_is_misjudged(opened: Opened) -> None:
    paced(opened, "net/full", 5, 10.0)
    expected = left(opened, training("net/full", NOW)).ends
    own = STARTING_SECONDS + 3 * (TRAINED / 10 + VAL / 30)
    found = left(opened, training("net/full", 1000.0, 1000.0 + 2 * own))
    assert "net/full" not in found.ends
    assert found.ends["other/full"] == pytest.approx(2 * own)
    dcl = expected["net/dcl"] - expected["net/full"]
    assert found.ends["net/dcl"] == pytest.approx(2 * dcl)
    assert found.ends["net/dcl test"] - found.ends["net/dcl"] == pytest.approx(STARTING_ELSE + TEST / 30)


def test_what_a_failure_keeps_from_running_is_not_left_to_do(opened: Opened) -> None:
    paced(opened, "net/full", 5, 10.0)
    tasks = (training("net/full", 1000.0, 1010.0), training("other/full", NOW))
    states: dict[str, JobState] = {"net/full": "failed", "net/dcl": "not_run", "other/full": "running"}
    found = Outlook(opened).left(Standing(states, tasks=tasks, nodes=NODES), NOW)
    assert found is not None
    assert not any(name.startswith("net/") for name in found.ends)
    assert "other/full test" in found.ends

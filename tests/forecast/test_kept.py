"""The forecast that a run begins with, held against its facts in the report."""

from pathlib import Path

import pytest

from aliprod.build.room import Node
from aliprod.build.target import Resources
from aliprod.catalogue import sources
from aliprod.catalogue.catalogue import Catalogue
from aliprod.forecast.simulate import keep, kept
from aliprod.plan.jobs import jobs_of
from aliprod.plan.load import load
from aliprod.plan.open import Opened
from aliprod.plan.places import resolve

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
NODES = (Node("a", Resources(2, 0)),)


@pytest.fixture
def folder(packages: Catalogue, tmp_path: Path) -> Path:
    (tmp_path / "photos").symlink_to(packages.root)
    (tmp_path / "plan.toml").write_text(PLAN)
    return tmp_path


def opened(folder: Path, *sets: str) -> Opened:
    plan, catalogue = load(folder / "plan.toml", sets), sources.read(folder / "photos")
    places = resolve(plan, folder / "runs", None, None)
    return Opened(plan, PLAN, places, catalogue, jobs_of(plan, catalogue.fingerprint))


def trained(of: Opened, images_per_second: float) -> None:
    folder = of.job_folder("net/full")
    folder.mkdir(parents=True, exist_ok=True)
    line = f'{{"epoch": 0, "speed/images_per_second": {images_per_second}, "speed/ranks": 1, "device": "cpu"}}'
    (folder / "metrics.jsonl").write_text(line)


def test_it_is_of_all_targets_and_stays_as_it_was_whatever_is_known_later(folder: Path) -> None:
    plan = opened(folder)
    trained(plan, 10.0)
    keep(plan, NODES)
    first = kept(plan)
    assert first is not None
    assert {"net/full", "net/accuracy", "net/accuracy test", "ensemble"} <= set(first.spans)
    assert first.spans["net/full"][-1].end <= first.spans["net/accuracy"][0].begin
    trained(plan, 1000.0)
    keep(plan, NODES)
    assert kept(plan) == first


def test_another_plan_has_another(folder: Path) -> None:
    plan, longer = opened(folder), opened(folder, "stages.full.epochs=9")
    trained(plan, 10.0)
    keep(plan, NODES)
    trained(longer, 10.0)
    assert kept(longer) is None
    keep(longer, NODES)
    found = kept(longer)
    assert found is not None
    assert "net/full" in found.spans
    assert kept(plan) is None


def test_none_is_kept_without_a_rate_or_where_the_plan_has_no_room(folder: Path) -> None:
    plan = opened(folder)
    keep(plan, NODES)
    assert kept(plan) is None
    trained(plan, 10.0)
    keep(plan, (Node("a", Resources(0, 0)),))
    assert kept(plan) is None  # it would wait for ever


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"plan": 1, "time": 0, "spans": 3}'])
def test_a_file_that_is_damaged_is_none(text: str, folder: Path) -> None:
    plan = opened(folder)
    (plan.folder).mkdir(parents=True)
    (plan.folder / "forecast.json").write_text(text)
    assert kept(plan) is None

"""A whole plan is made without Ray: each target is a plain function of what it needs."""

import json
from collections.abc import Iterator

import pyarrow.parquet as pq
import pytest
import torch

from aliprod.build.graph import Chosen, targets
from aliprod.build.outputs import scores
from aliprod.build.target import Site, Target, lacking
from aliprod.catalogue import sources
from aliprod.plan.load import load
from aliprod.plan.open import Opened, Request, open_plan
from aliprod.plan.places import resolve
from aliprod.store import commit
from aliprod.synth.synth import synthesise

PLAN = """\
format = 1
name = "shop"
catalogue = { path = "photos" }
backbones = { net = "test_resnet.r160_in1k", other = "test_efficientnet.r160_in1k" }
defaults = { resize = 40, crop = 32, batch_size = 8, augmentation = ["random_crop", "flip"] }
[stages]
full = {}
filtered = { start = "full", duplicates = "drop" }
labelled = { start = "full", pseudo_labels = { by = ["net/full"], threshold = 0.01 } }
student = { start = "full", objective = "distillation", teachers = ["other/full"] }
soup = { soup = { of = ["filtered", "labelled"] } }
[jobs]
net = ["full", "filtered", "labelled", "student", "soup"]
other = ["full"]
[ensemble]
members = ["net/soup", "net/student"]
views = "center"
score = "val"
"""


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    folder = tmp_path_factory.mktemp("shop")
    synthesise(folder / "photos", classes=3, images=30, seed=0)
    (folder / "plan.toml").write_text(PLAN)
    plan = load(folder / "plan.toml")
    return open_plan(Request(plan, PLAN, resolve(plan, folder / "runs", None, None)))


@pytest.fixture(scope="module", autouse=True)
def as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def missing(opened: Opened, **chosen: Chosen) -> dict[str, Target]:
    return lacking(targets(opened, False, chosen), opened.places.storage)


def make_all(opened: Opened) -> list[str]:
    """Make what is missing, the first that has all it needs; the names in order."""
    site = Site.of(opened)
    made = []
    while todo := missing(opened):
        target = next(t for t in todo.values() if not any(need.name in todo for need in t.needed()))
        assert target.folder(site.storage).parent  # known by now
        for metrics in target.make(target, site):
            assert metrics["epoch"] >= 0
        assert target.record(site.storage) is not None, f"{target.name} is there"
        made.append(target.name)
    return made


@pytest.fixture(scope="module")
def made(shop: Opened) -> list[str]:
    return make_all(shop)


def test_every_target_is_made_once_behind_what_it_needs(shop: Opened, made: list[str]) -> None:
    assert set(made) == set(targets(shop, False))
    assert len(made) == len(set(made))
    assert made.index("net/filtered kept rows") < made.index("net/filtered")
    assert make_all(shop) == [], "finished is finished"


def test_the_submission_names_every_test_image_and_the_errors_are_of_val(shop: Opened, made: list[str]) -> None:
    catalogue = sources.read(shop.read_catalogue().root)
    header, *lines = (shop.folder / "ensemble" / "submission.csv").read_text().splitlines()
    assert header == "id,predicted"
    assert {line.split(",")[0] for line in lines} == set(catalogue.test.ids.to_pylist())
    errors = scores(shop.folder / "ensemble-val")
    assert set(errors["members"]) == {"net/soup", "net/student"}
    assert 0 <= errors["ensemble"] <= 1


def test_what_is_made_says_what_it_was_made_of(shop: Opened, made: list[str]) -> None:
    found = targets(shop, False)
    for target in found.values():
        assert json.loads(json.dumps(target.facts)) == target.facts
    labels = pq.read_table(found["net/labelled pseudo labels"].folder(shop.places.storage) / "pseudo_labels.parquet")
    assert labels.num_rows > 0
    [val] = [target for name, target in found.items() if name == "net/soup val"]
    assert val.record(shop.places.storage) == val.facts
    record = commit.read(shop.folder / "ensemble") or {}
    assert record["target"] == found["ensemble"].key

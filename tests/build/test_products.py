"""A whole plan is made without Ray: each target is a plain function of what it needs."""

import json
from dataclasses import replace

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from aliprod.build.graph import Chosen, targets
from aliprod.build.target import Site, Target, lacking
from aliprod.catalogue import sources
from aliprod.ensemble.guesses import read_predictions
from aliprod.errors import Refused
from aliprod.inference.metrics import score
from aliprod.inference.probabilities import open_store
from aliprod.plan.jobs import jobs_of
from aliprod.plan.load import load
from aliprod.plan.open import Opened, Request, open_plan
from aliprod.plan.places import resolve
from aliprod.store import commit, lineage
from aliprod.synth.synth import synthesise

MEMBERS = ("net/soup", "net/student")
pytestmark = pytest.mark.usefixtures("torch_as_before")
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


def prints(opened: Opened) -> tuple[str, str]:
    catalogue = opened.read_catalogue()
    return catalogue.fingerprint, catalogue.tree_fingerprint


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
    stores = [open_store(next(shop.places.storage.glob(f"jobs/{name}/*/probabilities/*-val-*"))) for name in MEMBERS]
    errors = {store.name: (score(store.labels, store.predicted()) or {})["top1_error"] for store in stores}
    found = lineage.comparison(shop.places.storage, "shop")
    assert found is not None
    assert (found["split"], found["views"], found["combine"]) == ("val", "center", "sum")
    assert {name: one["top1_error"] for name, one in found["members"].items()} == errors
    summed = read_predictions(shop.folder / "ensemble-val")
    labels = stores[0].labels.take(pc.index_in(summed.ids, value_set=stores[0].ids))
    assert found["ensemble"]["top1_error"] == (score(labels, summed.predicted) or {})["top1_error"]
    best = min(errors, key=lambda name: errors[name])
    assert found["best"] == {"member": best, "split": "val", "views": "center"}


@pytest.mark.parametrize("combine", ["greedy", "weights"])
def test_weights_are_fitted_on_val_and_change_the_ensemble_alone(shop: Opened, made: list[str], combine: str) -> None:
    plan = load(shop.folder.parents[1] / "plan.toml", [f'ensemble.combine="{combine}"', 'ensemble.score="auto"'])
    assert jobs_of(plan, *prints(shop)) == shop.jobs, "no job has another key"
    other = replace(shop, plan=plan.model_copy(update={"name": combine}))
    before = {name: target.key for name, target in targets(shop, False).items()}
    assert set(make_all(other)) == {"weights", "ensemble", "comparison"}, "val and test were predicted for the sum"
    found, fitted = targets(other, False), commit.read(other.folder / "ensemble") or {}
    assert found["ensemble"].key != before["ensemble"]
    told = lineage.comparison(other.places.storage, combine) or {}
    assert (told["split"], told["best"]["split"], told["best"]["views"]) == ("test", "val", "center")
    [*folds, last] = json.loads((other.folder / "weights" / "weights.json").read_text())
    assert len(folds) == 5
    assert [one["weight"] for one in told["members"].values()] == last["weights"]
    counted = {one["job"]: (one["weight"], one["temperature"]) for one in fitted["members"]}
    assert counted == {n: (one["weight"], one["temperature"]) for n, one in told["members"].items() if one["weight"]}


def test_a_plan_that_fits_weights_on_a_val_of_few_images_is_refused(shop: Opened) -> None:
    plan = load(shop.folder.parents[1] / "plan.toml", ['ensemble.combine="greedy"'])
    catalogue = shop.read_catalogue()
    few = replace(catalogue, val=catalogue.val.take(np.arange(4)))
    with pytest.raises(Refused, match='combine = "greedy" is fitted on val, which has 4 images'):
        targets(replace(shop, plan=plan, catalogue=few), False)


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

"""A whole plan is made without Ray: each target is a plain function of what it needs."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from aliprod.build.graph import Chosen, targets
from aliprod.catalogue import sources
from aliprod.ensemble.guesses import read_predictions
from aliprod.errors import Refused
from aliprod.inference.metrics import score
from aliprod.inference.probabilities import open_store
from aliprod.plan.jobs import jobs_of
from aliprod.plan.load import load
from aliprod.plan.open import Opened
from aliprod.store import commit, lineage
from aliprod.synth.synth import synthesise
from tests.conftest import make_all, open_file

MEMBERS = ("net/soup", "net/student")
TWICE = "another-label.jpg"  # a picture that stands under two labels
pytestmark = pytest.mark.usefixtures("torch_as_before")
PLAN = """\
format = 1
name = "shop"
catalogue = { path = "photos" }
backbones = { net = "test_resnet.r160_in1k", other = "test_efficientnet.r160_in1k" }
defaults = { resize = 40, crop = 32, batch_size = 8, augmentation = ["random_crop", "flip"] }
[stages]
full = {}
bbn = { start = "full", objective = "bbn" }
classifier = { start = "full", trains = "classifier", sampler = "class_balanced" }
filtered = { start = "full", duplicates = "drop" }
labelled = { start = "full", pseudo_labels = { by = ["net/full", "other/full"], threshold = 0.3, per_class = 2 } }
student = { start = "full", objective = "distillation", teachers = ["other/full", "net/bbn"] }
soup = { soup = { of = ["filtered", "labelled"] } }
[jobs]
net = ["full", "bbn", "classifier", "filtered", "labelled", "student", "soup"]
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
    show_twice(folder / "photos")
    (folder / "plan.toml").write_text(PLAN)
    return open_file(folder / "plan.toml", folder / "runs")


def show_twice(catalogue: Path) -> None:
    """Put the first picture of the first class under the second class too."""
    listed = json.loads((catalogue / "train.json").read_text())
    first = listed["images"][0]
    other = next(row["class_id"] for row in listed["images"] if row["class_id"] != first["class_id"])
    [picture] = catalogue.glob(f"train/*/{first['image_id']}")
    shutil.copy(picture, catalogue / "train" / f"{int(other):05d}" / TWICE)
    listed["images"].append({"image_id": TWICE, "class_id": other})
    (catalogue / "train.json").write_text(json.dumps(listed))


def folder_of(opened: Opened, job: str) -> Path:
    [found] = (opened.places.storage / "jobs" / job).iterdir()
    return found


def weights_of(opened: Opened, job: str) -> dict[str, torch.Tensor]:
    return load_file(folder_of(opened, job) / "weights" / "model.safetensors")


def prints(opened: Opened) -> tuple[str, str]:
    catalogue = opened.read_catalogue()
    return catalogue.fingerprint, catalogue.tree_fingerprint


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
    [val] = [target for name, target in found.items() if name == "net/soup val"]
    assert val.record(shop.places.storage) == val.facts
    record = commit.read(shop.folder / "ensemble") or {}
    assert record["target"] == found["ensemble"].key


@pytest.mark.usefixtures("made")
def test_pseudo_labels_are_what_the_labellers_together_are_sure_of(shop: Opened) -> None:
    labellers = ("net/full", "other/full")
    stores = [open_store(next(folder_of(shop, job).glob("probabilities/*-test*"))) for job in labellers]
    mean = sum(store.take(np.arange(len(store))).astype(np.float64) for store in stores) / 2
    folder = folder_of(shop, "net/labelled") / "pseudo_labels"
    labelled = pq.read_table(folder / "pseudo_labels.parquet").to_pylist()
    places = {image: row for row, image in enumerate(stores[0].ids.to_pylist())}
    for row in labelled:
        assert row["probability"] == pytest.approx(mean[places[row["image_id"]]].max(), rel=1e-6)
        assert row["class_id"] == stores[0].classes[mean[places[row["image_id"]]].argmax()]
    sure = [np.sum(mean[mean.argmax(1) == column].max(1, initial=0) >= 0.3) for column in range(len(stores[0].classes))]
    assert len(labelled) == sum(min(2, count) for count in sure) > 0
    assert (commit.read(folder) or {})["labellers"] == {job: folder_of(shop, job).name for job in labellers}


@pytest.mark.usefixtures("made")
def test_the_picture_under_two_labels_is_dropped_and_said_to_be(shop: Opened) -> None:
    folder = folder_of(shop, "net/filtered") / "kept"
    dropped = pq.read_table(folder / "dropped.parquet")["image_id"].to_pylist()
    assert any(TWICE in image for image in dropped)
    assert len(np.load(folder / "kept.npy")) + len(dropped) == len(shop.read_catalogue().train)


@pytest.mark.usefixtures("made")
def test_a_classifier_is_trained_on_a_backbone_that_does_not_move(shop: Opened) -> None:
    before, after = weights_of(shop, "net/full"), weights_of(shop, "net/classifier")
    assert all(torch.equal(before[name], after[name]) for name in before if name != "classifier.weight")
    assert not torch.equal(before["classifier.weight"], after["classifier.weight"])


@pytest.mark.usefixtures("made")
def test_a_soup_is_the_mean_of_its_ingredients(shop: Opened) -> None:
    one, other, soup = (weights_of(shop, f"net/{name}") for name in ("filtered", "labelled", "soup"))
    for name in ("classifier.weight", "backbone.conv1.0.weight"):
        mean = ((one[name].double() + other[name].double()) / 2).float()
        torch.testing.assert_close(soup[name], mean, rtol=0, atol=0)


@pytest.mark.usefixtures("made")
def test_bbn_predicts_with_both_branches(shop: Opened) -> None:
    plain, branched = weights_of(shop, "net/full"), weights_of(shop, "net/bbn")
    assert branched["classifier.weight"].shape == (3, 2 * plain["classifier.weight"].shape[1])
    assert json.loads((folder_of(shop, "net/bbn") / "weights" / "config.json").read_text())["branches"] == 2


@pytest.mark.usefixtures("made")
def test_an_alias_moved_by_hand_changes_no_student(shop: Opened) -> None:
    """The teachers' best weights count, by their keys."""
    chosen = {"other/full": Chosen(folder_of(shop, "other/full").name, "0" * 64)}
    for name in ("net/student", "net/labelled", "net/soup"):
        assert targets(shop, False, chosen)[name].record(shop.places.storage) is not None

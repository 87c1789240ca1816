"""Jobs that learn from other jobs, on a real Ray: teachers, labellers, soups, branches, filters of duplicates."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from aliprod.catalogue import sources
from aliprod.inference import probabilities
from aliprod.store import commit

PLAN = """\
format = 1
name = "methods"

[catalogue]
path = "catalogue"

[backbones]
resnet = "test_resnet.r160_in1k"
efficientnet = "test_efficientnet.r160_in1k"

[defaults]
resize = 72
crop = 64
augmentation = ["random_crop", "flip"]
batch_size = 8
lr = { backbone = 0.02, heads = 0.02 }

[stages.full]
epochs = 2

[stages.bbn]
start = "full"
objective = "bbn"

[stages.classifier]
start = "full"
trains = "classifier"
sampler = "class_balanced"

[stages.filtered]
start = "full"
duplicates = "drop"

[stages.pseudo]
start = "full"
pseudo_labels = { by = ["resnet/full", "efficientnet/full"], threshold = 0.3, per_class = 2 }

[stages.student]
start = "full"
objective = { name = "distillation", temperature = 2.0 }
teachers = ["efficientnet/full", "resnet/bbn"]

[stages.soup]
soup = { of = ["pseudo", "student"] }

[jobs]
resnet = ["full", "bbn", "classifier", "filtered", "pseudo", "student", "soup"]
efficientnet = ["full"]

[ensemble]
members = ["resnet/bbn", "resnet/soup"]
score = "val"

[cluster]
use_gpu = false
poll_seconds = 0.2
"""
JOBS = {f"resnet/{name}" for name in ("full", "bbn", "classifier", "filtered", "pseudo", "student", "soup")} | {
    "efficientnet/full"
}
TWICE = "another-label.jpg"  # a picture that stands under two labels


@dataclass(frozen=True)
class Run:
    plan: Path
    storage: Path
    outcome: dict[str, Any]

    def folder(self, job: str) -> Path:
        [found] = (self.storage / "jobs" / job).iterdir()
        return found

    def weights(self, job: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder(job) / "weights" / "model.safetensors")


@pytest.fixture(scope="module")
def methods(cluster: Any, plan: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("methods")
    shutil.copytree(plan.parent / "catalogue", folder / "catalogue")
    _show_twice(folder / "catalogue")
    (folder / "methods.toml").write_text(PLAN)
    ran = cluster.aliprod("run", folder / "methods.toml", "--storage", folder / "storage", "--json")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return Run(folder / "methods.toml", folder / "storage", json.loads(ran.stdout.splitlines()[-1]))


def _show_twice(catalogue: Path) -> None:
    """Put the first picture of the first class under the second class too."""
    listed = json.loads((catalogue / "train.json").read_text())
    first = listed["images"][0]
    other = next(row["class_id"] for row in listed["images"] if row["class_id"] != first["class_id"])
    [picture] = catalogue.glob(f"train/*/{first['image_id']}")
    folder = next(catalogue.glob(f"train/{int(other):05d}"))
    shutil.copy(picture, folder / TWICE)
    listed["images"].append({"image_id": TWICE, "class_id": other})
    (catalogue / "train.json").write_text(json.dumps(listed))


def test_every_method_is_a_job_of_the_graph(methods: Run) -> None:
    assert set(methods.outcome["trained"]) == JOBS
    assert methods.outcome["ensemble"]["split"] == "val"


def test_pseudo_labels_are_what_the_labellers_together_are_sure_of(methods: Run) -> None:
    labellers = ("resnet/full", "efficientnet/full")
    stores = [probabilities.open_store(next(methods.folder(job).glob("probabilities/*-test"))) for job in labellers]
    mean = sum(store.rows(0, len(store)).astype(np.float64) for store in stores) / 2
    labelled = pq.read_table(methods.folder("resnet/pseudo") / "pseudo_labels" / "pseudo_labels.parquet").to_pylist()
    places = {image: row for row, image in enumerate(stores[0].ids.to_pylist())}
    for row in labelled:
        assert row["probability"] == pytest.approx(mean[places[row["image_id"]]].max(), rel=1e-6)
        assert row["class_id"] == stores[0].classes[mean[places[row["image_id"]]].argmax()]
    best = {
        label: np.sort(mean[mean.argmax(1) == column].max(1))[::-1] for column, label in enumerate(stores[0].classes)
    }
    assert len(labelled) == sum(min(2, int((sure >= 0.3).sum())) for sure in best.values())
    record = commit.read(methods.folder("resnet/pseudo") / "pseudo_labels") or {}
    assert record["labellers"] == {job: methods.folder(job).name for job in labellers}


def test_the_picture_under_two_labels_is_dropped_and_said_to_be(methods: Run) -> None:
    dropped = pq.read_table(methods.folder("resnet/filtered") / "kept" / "dropped.parquet")["image_id"].to_pylist()
    assert any(TWICE in image for image in dropped)
    kept = np.load(methods.folder("resnet/filtered") / "kept" / "kept.npy")
    assert len(kept) + len(dropped) == len(sources.read(methods.plan.parent / "catalogue").train)


def test_a_classifier_is_trained_on_a_backbone_that_does_not_move(methods: Run) -> None:
    before, after = methods.weights("resnet/full"), methods.weights("resnet/classifier")
    assert all(torch.equal(before[name], after[name]) for name in before if name != "classifier.weight")
    assert not torch.equal(before["classifier.weight"], after["classifier.weight"])


def test_a_soup_is_the_mean_of_its_ingredients(methods: Run) -> None:
    one, other, soup = (methods.weights(f"resnet/{name}") for name in ("pseudo", "student", "soup"))
    for name in ("classifier.weight", "backbone.conv1.0.weight"):
        torch.testing.assert_close(
            soup[name], ((one[name].double() + other[name].double()) / 2).float(), rtol=0, atol=0
        )


def test_bbn_predicts_with_both_branches(methods: Run) -> None:
    classes = len(sources.read(methods.plan.parent / "catalogue").classes)
    plain, branched = methods.weights("resnet/full"), methods.weights("resnet/bbn")
    assert branched["classifier.weight"].shape == (classes, 2 * plain["classifier.weight"].shape[1])
    assert json.loads((methods.folder("resnet/bbn") / "weights" / "config.json").read_text())["branches"] == 2


def test_an_alias_moved_by_hand_changes_no_student(methods: Run, cluster: Any) -> None:
    """The teachers' best weights count, by their keys."""
    from aliprod.tracking.server import reach

    client = reach(f"sqlite:///{methods.storage / 'mlflow.db'}").client
    versions = client.search_model_versions("name = 'methods.efficientnet.full'")
    other = max(versions, key=lambda version: version.tags["checkpoint"] == "last")
    client.set_registered_model_alias("methods.efficientnet.full", "member", other.version)
    ran = cluster.aliprod("run", methods.plan, "--storage", methods.storage, "--json")
    outcome = json.loads(ran.stdout.splitlines()[-1])
    assert outcome["trained"] == []
    assert set(outcome["reused"]) == JOBS


def test_an_error_on_images_with_pseudo_labels_is_refused(methods: Run, cluster: Any) -> None:
    ran = cluster.aliprod("run", methods.plan, "--storage", methods.storage, "--set", "ensemble.score='auto'")
    assert ran.returncode == 2
    assert 'Say score = "val" in [ensemble].' in ran.stderr

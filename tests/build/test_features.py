"""Features are made once, and what is trained on them is what is trained on the images that they are of."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize

from aliprod.build.graph import targets
from aliprod.build.target import Site, Target, lacking
from aliprod.catalogue.decode import decode
from aliprod.data.augment import eval_view, normalise
from aliprod.data.features import open_features, write_features
from aliprod.errors import Failed, Refused
from aliprod.inference.probabilities import open_store
from aliprod.models.classifier import normalisation
from aliprod.plan.load import load
from aliprod.plan.open import Opened, Request, open_plan
from aliprod.plan.places import resolve
from aliprod.synth.synth import synthesise
from aliprod.training.loop import train

NETWORK = "test_efficientnet.r160_in1k"
pytestmark = pytest.mark.usefixtures("torch_as_before")
PLAN = f"""\
format = 1
name = "shop"
catalogue = {{ path = "photos" }}
backbones = {{ net = "{NETWORK}" }}
[defaults]
pretrained = "weights"
resize = 40
crop = 40  # so that augmentation = ["resize"] shows what inference sees
batch_size = 8
epochs = 3
trains = "classifier"
augmentation = ["resize"]
precision = "float32"
ema = 0.9
[stages.probe]
features = "cached"
[stages.computed]
[stages.balanced]
features = "cached"
images = {{ per_class = 5 }}
lr = {{ heads = 0.3 }}
[stages.nearest]
features = "cached"
neighbours = {{ k = 5 }}
[stages.tuned]
trains = "all"
epochs = 1
[stages.retrained]
start = "tuned"
features = "cached"
[jobs]
net = ["probe", "computed", "balanced", "nearest", "tuned", "retrained"]
[ensemble]
members = ["net/tuned", "net/nearest"]
score = "val"
"""


def opened_in(folder: Path, *sets: str) -> Opened:
    plan = load(folder / "plan.toml", list(sets))
    return open_plan(Request(plan, PLAN, resolve(plan, folder / "runs", None, None)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shop")
    synthesise(folder / "photos", classes=3, images=30, seed=0)
    (folder / "weights").mkdir()
    torch.manual_seed(0)
    backbone = timm.create_model(NETWORK.split(".")[0], num_classes=0)
    save_file(backbone.state_dict(), folder / "weights" / f"{NETWORK}.safetensors")
    (folder / "plan.toml").write_text(PLAN.replace('"weights"', json.dumps(str(folder / "weights"))))
    return folder


@pytest.fixture(scope="module")
def shop(folder: Path) -> Opened:
    return opened_in(folder)


@pytest.fixture(scope="module")
def made(shop: Opened) -> list[str]:
    """What is missing is made, the first that has all it needs; the names in order."""
    site, made = Site.of(shop), []
    while todo := lacking(targets(shop, False), site.storage):
        target = next(t for t in todo.values() if not any(need.name in todo for need in t.needed()))
        list(target.make(target, site))
        assert target.record(site.storage) is not None, f"{target.name} is there"
        made.append(target.name)
    return made


def features_of(opened: Opened, job: str) -> list[Target]:
    return list(targets(opened, False)[job].needs["features"])


def tensors(opened: Opened, job: str, kind: str = "weights") -> dict[str, torch.Tensor]:
    return load_file(opened.job_folder(job) / kind / "model.safetensors")


def test_stages_that_begin_with_the_same_weights_read_the_same_features(shop: Opened, made: list[str]) -> None:
    assert len([name for name in made if "features of" in name]) == 4, "train and val, of two sets of weights"
    keys = {
        name: [target.key for target in features_of(shop, f"net/{name}")]
        for name in ("probe", "balanced", "nearest", "retrained")
    }
    assert keys["probe"] == keys["balanced"] == keys["nearest"] != keys["retrained"]


def test_trying_other_settings_of_the_head_looks_at_no_image_again(folder: Path, shop: Opened, made: list[str]) -> None:
    other = opened_in(folder, "stages.probe.lr.heads=0.01", "stages.balanced.images.per_class=4")
    assert list(lacking(targets(other, False), other.places.storage)) == ["net/probe", "net/balanced", "comparison"]
    resized = opened_in(folder, "stages.probe.resize=44")
    assert features_of(resized, "net/probe")[0].key != features_of(shop, "net/probe")[0].key


def test_features_are_what_the_network_makes_of_the_view_of_inference(
    folder: Path, shop: Opened, made: list[str]
) -> None:
    """float16 rounds by 2**-11 at most."""
    backbone = timm.create_model(NETWORK.split(".")[0], num_classes=0).eval()
    backbone.load_state_dict(load_file(folder / "weights" / f"{NETWORK}.safetensors"))
    mean, std, interpolation = normalisation(NETWORK)
    catalogue = shop.read_catalogue()
    for target, images in zip(features_of(shop, "net/probe"), (catalogue.train, catalogue.val), strict=True):
        pictures = [torch.from_numpy(np.array(decode(images.source(row)))).movedim(2, 0) for row in range(len(images))]
        seen = torch.stack([eval_view(picture, 40, 40, interpolation) for picture in pictures])
        with torch.inference_mode():
            expected = backbone(normalise(seen, mean, std))
        found = open_features(target.folder(shop.places.storage), images).take(np.arange(len(images)))
        torch.testing.assert_close(found.float(), expected, rtol=2**-10, atol=1e-6)


def test_a_classifier_trained_on_cached_features_is_the_one_trained_on_the_images(
    shop: Opened, made: list[str]
) -> None:
    """To a thousandth of its weights: a step sees features that are rounded to float16."""
    cached, computed = (tensors(shop, f"net/{name}", "weights") for name in ("probe", "computed"))
    lines = [shop.metrics(f"net/{name}") for name in ("probe", "computed")]
    for one, other in zip(*lines, strict=True):
        assert one["train/loss"] == pytest.approx(other["train/loss"], rel=1e-3)
        assert one["val/top1_error"] == other["val/top1_error"]
    assert cached.keys() == computed.keys()
    for name, tensor in cached.items():
        if name != "classifier.weight":
            assert torch.equal(tensor, computed[name]), f"{name} is that of the backbone, untouched"
    apart = (cached["classifier.weight"] - computed["classifier.weight"]).norm()
    assert apart < 1e-3 * computed["classifier.weight"].norm()


def test_the_nearest_training_images_vote_as_the_paper_says(shop: Opened, made: list[str]) -> None:
    """Ten crops of val by a member that is a bank, its centre crop's error by cached features."""
    catalogue, storage = shop.read_catalogue(), shop.places.storage
    train, val = (
        open_features(target.folder(storage), images).take(np.arange(len(images))).double()
        for target, images in zip(features_of(shop, "net/nearest"), (catalogue.train, catalogue.val), strict=True)
    )
    cosines, labels = normalize(val) @ normalize(train).T, torch.from_numpy(catalogue.train.labels)
    wrong = torch.zeros(catalogue.num_classes)
    for row, truth in enumerate(catalogue.val.labels.tolist()):
        nearest = sorted(range(len(labels)), key=lambda other: -cosines[row, other])[:5]  # noqa: B023
        shares = torch.zeros(catalogue.num_classes, dtype=torch.float64)
        for other in nearest:
            shares[labels[other]] += torch.exp(cosines[row, other] / 0.07)
        wrong[truth] += int(shares.argmax()) != truth
    counts = np.bincount(catalogue.val.labels, minlength=catalogue.num_classes)
    record = shop.record("net/nearest") or {}
    assert record["top1_error"] == pytest.approx(float((wrong / counts).mean()))
    kept = tensors(shop, "net/nearest")
    assert torch.equal(kept["classifier.weight"].double(), train), "the bank holds what was cached"
    assert kept["classifier.labels"].tolist() == labels.tolist()
    store = open_store(next(storage.glob("jobs/net/nearest/*/probabilities/*-val")))
    assert np.isfinite(store.rows(0, len(store))).all()


def test_a_stage_on_few_images_of_a_class_reads_their_features_alone(shop: Opened, made: list[str]) -> None:
    stage, catalogue = shop.jobs["net/balanced"].stage, shop.read_catalogue()
    from aliprod.data.training_set import training_set
    from aliprod.recipe import Inputs

    folders = tuple(target.folder(shop.places.storage) for target in features_of(shop, "net/balanced"))
    data = training_set(catalogue, stage, Inputs(features=folders))
    assert data.features is not None
    whole = open_features(folders[0], catalogue.train)
    rows = [catalogue.train.ids.to_pylist().index(name) for name in data.images.ids.to_pylist()]
    assert len(rows) < len(catalogue.train)
    assert torch.equal(data.features.take(np.arange(len(rows))), whole.take(np.array(rows)))

"""Features are made once, and what is trained on them is what is trained on the images that they are of."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize

from aliprod.build.graph import targets
from aliprod.build.making import inputs_of
from aliprod.build.target import Site, Target, lacking
from aliprod.catalogue.decode import decode
from aliprod.cluster.tune import _wrong
from aliprod.data.augment import eval_view, normalise
from aliprod.data.training_set import open_features, training_set, write_features
from aliprod.errors import Failed, Refused
from aliprod.inference.probabilities import open_store
from aliprod.models.classifier import normalisation
from aliprod.plan.load import load
from aliprod.plan.open import Opened
from aliprod.recipe import Inputs, Machine
from aliprod.store import commit, lineage
from aliprod.synth.synth import synthesise
from aliprod.training.candidates import Candidate
from aliprod.training.learner import set_up
from tests.conftest import open_file

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
    return open_file(folder / "plan.toml", folder / "runs", sets)


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
        target.make(target, site)
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
    todo = lacking(targets(other, False), other.places.storage)
    assert {target.kind for target in todo.values()} == {"training", "prediction", "comparison"}
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


@pytest.mark.parametrize("job", ["net/probe", "net/computed"])
def test_a_search_counts_the_rows_that_a_stage_has_wrong_as_it_is_scored(
    shop: Opened, made: list[str], job: str
) -> None:
    target, catalogue = targets(shop, False)[job], shop.read_catalogue()
    data = training_set(catalogue, target.owner.stage, inputs_of(target, Site.of(shop)))
    setup = set_up(target.owner.stage, NETWORK, catalogue, Machine(), data)
    wrong = _wrong(setup, Candidate(0, "raw", None, tensors(shop, job)))
    errors = setup.top1_errors()["val/top1_error_per_image"]
    assert len(wrong) == pytest.approx(errors * len(catalogue.val))


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
        nearest = sorted(range(len(labels)), key=lambda other: -cosines[row, other])[:5]
        shares = torch.zeros(catalogue.num_classes, dtype=torch.float64)
        for other in nearest:
            shares[labels[other]] += torch.exp(cosines[row, other] / 0.07)
        wrong[truth] += int(shares.argmax()) != truth
    counts = torch.bincount(torch.from_numpy(catalogue.val.labels))
    record = shop.record("net/nearest") or {}
    assert record["top1_error"] == pytest.approx(float((wrong / counts).mean()))
    kept = tensors(shop, "net/nearest")
    assert torch.equal(kept["classifier.weight"].double(), train), "the bank holds what was cached"
    assert kept["classifier.labels"].tolist() == labels.tolist()
    store = open_store(next(storage.glob("jobs/net/nearest/*/probabilities/*-val")))
    assert np.isfinite(store.take(np.arange(len(store)))).all()


def test_a_stage_on_few_images_of_a_class_reads_their_features_alone(shop: Opened, made: list[str]) -> None:
    stage, catalogue = shop.jobs["net/balanced"].stage, shop.read_catalogue()
    folders = tuple(target.folder(shop.places.storage) for target in features_of(shop, "net/balanced"))
    data = training_set(catalogue, stage, Inputs(features=folders))
    assert data.features is not None
    whole = open_features(folders[0], catalogue.train)
    rows = [catalogue.train.ids.to_pylist().index(name) for name in data.images.ids.to_pylist()]
    assert len(rows) < len(catalogue.train)
    assert torch.equal(data.features.take(np.arange(len(rows))), whole.take(np.array(rows)))


def test_the_ensemble_is_compared_with_its_floors(shop: Opened, made: list[str]) -> None:
    """Stages on cached features of pretrained weights, that are no members."""
    told = lineage.comparison(shop.places.storage, "shop") or {}
    assert list(told["floors"]) == ["net/probe", "net/balanced"]
    for name, floor in told["floors"].items():
        store = open_store(next(shop.places.storage.glob(f"jobs/{name}/*/probabilities/*-val")))
        predicted, labels = store.predicted(), store.labels.to_numpy()
        errors = [(predicted[labels == one] != one).mean() for one in np.unique(labels)]
        assert floor["top1_error"] == pytest.approx(np.mean(errors))
        assert floor["gain"] == floor["top1_error"] - told["ensemble"]["top1_error"]
        assert floor["interval"][0] <= floor["top1_error"] <= floor["interval"][1]


def test_a_floor_that_is_lost_holds_no_comparison_back(shop: Opened) -> None:
    graph = targets(shop, False, lost=["net/probe"])
    [floor] = graph["comparison"].needs["floors"]
    assert floor.owner.name == "net/balanced"
    assert "net/probe" in graph, "it is tried again"
    assert graph["comparison"].key != targets(shop, False)["comparison"].key, "and compared with then"


class Killed(Exception):
    """What a process is told by SIGKILL."""


def test_features_that_were_broken_off_or_made_in_parts_are_the_same_bytes(
    shop: Opened, made: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards of eight rows in place of 8192: the images are few."""
    monkeypatch.setattr("aliprod.data.training_set.SHARD_ROWS", 8)
    images = shop.read_catalogue().train
    whole = torch.randn(len(images), 5, generator=torch.Generator().manual_seed(0))

    def blocks(missing: np.ndarray, until: int = len(images)) -> Iterator[torch.Tensor]:
        for low in range(0, len(missing), 4):
            if missing[low] >= until:
                raise Killed
            yield whole[missing[low : low + 4]]

    write_features(tmp_path / "whole", images, blocks, {"kind": "features"})
    with pytest.raises(Killed):
        write_features(tmp_path / "killed", images, lambda missing: blocks(missing, 20), {"kind": "features"})
    asked = list[int]()
    write_features(
        tmp_path / "killed", images, lambda missing: asked.extend(missing) or blocks(missing), {"kind": "features"}
    )
    assert asked == list(range(16, len(images))), "two shards were finished"
    for part in (1, 0):
        write_features(tmp_path / "parts", images, blocks, {"kind": "features"}, (part, 2))
    files = sorted(file.name for file in (tmp_path / "whole").iterdir() if file.name != commit.MANIFEST)
    assert len(files) == 5
    for folder in ("killed", "parts"):
        for file in files:
            assert (tmp_path / folder / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    found = open_features(tmp_path / "parts", images)
    rows = np.array([29, 0, 8, 7, 7])
    assert torch.equal(found.of(rows).take(np.arange(5)), whole[rows].half())
    with pytest.raises(Refused, match="features of other images"):
        open_features(tmp_path / "parts", replace(images, ids=images.ids[::-1]))


def test_features_beyond_float16_are_refused_and_name_the_image(shop: Opened, tmp_path: Path) -> None:
    images = shop.read_catalogue().train
    large = torch.ones(len(images), 3)
    large[7, 1] = 70_000
    with pytest.raises(Failed, match=f"features of train image {images.ids[7].as_py()} do not fit float16"):
        write_features(tmp_path / "large", images, lambda missing: [large[missing]], {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ('stages.probe.trains="all"', 'cached features are those of a frozen backbone: say trains = "classifier"'),
        ('stages.probe.augmentation=["resize"]', "cached features are of one view of each image, that of inference"),
        ("stages.probe.pretrained=false", "needs a backbone that has learned something"),
        ('stages.probe.objective="mixup"', 'objective mixup looks at the images: say features = "computed"'),
        ('stages.probe.objective={ name = "dcl", parts = 1 }', "objective dcl looks at the images"),
        ('stages.probe.objective="bbn"', "objective bbn looks at the images"),
        ('stages.probe.pseudo_labels={ by = ["net/tuned"] }', "cached features are of training images alone"),
        ('stages.nearest.features="computed"', 'neighbours are sought among cached features: say features = "cached"'),
        ('stages.retrained.start="nearest"', '"net/nearest" has neighbours in place of a classifier'),
        ("stages.nearest.epochs=3", "neighbours train nothing: leave soup, teachers and epochs out"),
        ("stages.nearest.neighbours.k=0", "stages.nearest.neighbours.k = 0 must be at least 1"),
    ],
)
def test_what_cached_features_cannot_do_is_refused_with_what_to_say(folder: Path, said: str, sentence: str) -> None:
    with pytest.raises(Refused) as refused:
        load(folder / "plan.toml", [said])
    assert sentence in str(refused.value)

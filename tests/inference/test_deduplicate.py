"""deduplicate: real photographs that were saved again under other labels, and pictures that only look alike."""

import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from aliprod.catalogue.catalogue import Catalogue, Integers
from aliprod.catalogue.decode import decode
from aliprod.catalogue.sources import read
from aliprod.data.duplicates import Rule, write_hashes
from aliprod.inference.deduplicate import write_kept_rows
from aliprod.models import weights
from aliprod.models.classifier import normalisation
from aliprod.recipe import LearningRate, Stage
from aliprod.store import commit
from aliprod.training.loop import train

NETWORK = "test_efficientnet.r160_in1k"


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


def kept_rows(folder: Path, rule: Rule, catalogue: Catalogue, hashed: Path, start: Path | None) -> Integers:
    write_kept_rows(folder, rule, catalogue, hashed, start, processes=0)
    rows: Integers = np.load(folder / "kept.npy")
    return rows


@pytest.fixture(scope="module")
def parent(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that know the photographs of ``tiny``, from clean labels."""
    catalogue = read(shared / "data" / "tiny")
    lr = LearningRate(backbone=0.05, heads=0.1, schedule="cosine")
    stage = Stage(resize=64, crop=64, batch_size=16, epochs=8, lr=lr, augmentation=("resize", "flip"))
    *_, last = train(stage, NETWORK, catalogue)
    assert last.last is not None
    config = weights.Config(NETWORK, *normalisation(NETWORK), 64, 64)
    classes = weights.Classes(tuple(catalogue.classes.tolist()), catalogue.names)
    folder = tmp_path_factory.mktemp("parent") / "weights"
    commit.write(folder, partial(weights.save, tensors=last.last.tensors, config=config, classes=classes))
    return folder


def doubled(tiny: Path, folder: Path, seed: int) -> Catalogue:
    """``tiny``, its rows shuffled, with six more pictures.

    A photograph of the first class is there thrice; one of the second twice, and under the third's label; one of the
    fourth again as the fifth's; and one of the sixth, with red and blue exchanged, as the seventh's.
    """
    shutil.copytree(tiny, folder, copy_function=shutil.copyfile)
    rows = json.loads((tiny / "train.json").read_text())["images"]
    classes = sorted({row["class_id"] for row in rows}, key=int)
    first = [min(row["image_id"] for row in rows if row["class_id"] == class_id) for class_id in classes]
    for name, of, label in (
        ("a1.jpg", 0, 0), ("a2.jpg", 0, 0), ("b1.jpg", 1, 1), ("b2.jpg", 1, 2), ("c1.jpg", 3, 4), ("d1.jpg", 5, 6),
    ):  # fmt: skip
        picture = decode(folder / "train" / f"{int(classes[of]):05d}" / first[of])
        there = folder / "train" / f"{int(classes[label]):05d}" / name
        (exchanged(picture) if name == "d1.jpg" else smaller(picture)).save(there, quality=60 + 10 * int(name[1]))
        rows.append({"image_id": name, "class_id": classes[label]})
    random.Random(seed).shuffle(rows)
    (folder / "train.json").write_text(json.dumps({"images": rows}))
    return read(folder)


def smaller(picture: Image.Image) -> Image.Image:
    return picture.resize((picture.width * 3 // 4, picture.height * 3 // 4), Image.Resampling.BICUBIC)


def exchanged(picture: Image.Image) -> Image.Image:
    red, green, blue = picture.split()
    return Image.merge("RGB", (blue, green, red))


@pytest.fixture(scope="module")
def shop(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    return doubled(shared / "data" / "tiny", tmp_path_factory.mktemp("shop") / "shop", 0)


@pytest.fixture(scope="module")
def hashed(shop: Catalogue, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hashed") / "hashes"
    write_hashes(folder, shop.train, 0)
    return folder


def original(shop: Catalogue, label: int) -> str:
    """The photograph of a class that was copied."""
    own = [shop.train.ids[int(row)].as_py() for row in np.flatnonzero(shop.train.labels == label)]
    return min(name for name in own if name[0] not in "abcd")


def dropped(shop: Catalogue, kept: np.ndarray) -> set[str]:
    ids = shop.train.ids.to_pylist()
    return {ids[row] for row in set(range(len(ids))) - set(kept.tolist())}


# What is dropped of each group besides the copies; digits come before letters, so of equals the original stays.
RULES: list[tuple[Rule, set[str], set[int]]] = [
    ("drop", {"a1.jpg", "a2.jpg", "b1.jpg", "b2.jpg", "c1.jpg"}, {1, 3}),
    ("majority", {"a1.jpg", "a2.jpg", "b1.jpg", "b2.jpg", "c1.jpg"}, {3}),
    ("teacher", {"a1.jpg", "a2.jpg", "b1.jpg", "b2.jpg", "c1.jpg"}, set()),
]


@pytest.mark.parametrize(("rule", "copies", "originals"), RULES, ids=[rule for rule, *_ in RULES])
def test_pictures_under_two_labels_go_as_the_rule_says_and_look_alikes_stay(
    shop: Catalogue, hashed: Path, parent: Path, tmp_path: Path, rule: Rule, copies: set[str], originals: set[int]
) -> None:
    kept = kept_rows(tmp_path / "kept", rule, shop, hashed, parent)
    assert np.array_equal(kept, np.unique(kept))
    gone = copies | {original(shop, label) for label in originals}
    assert dropped(shop, kept) == gone
    listed = pq.read_table(tmp_path / "kept" / "dropped.parquet").to_pydict()
    assert set(listed["image_id"]) == gone
    groups = [{original(shop, 0), "a1.jpg", "a2.jpg"}, {original(shop, 1), "b1.jpg", "b2.jpg"}]
    groups.append({original(shop, 3), "c1.jpg"})
    for name, like in zip(listed["image_id"], listed["like"], strict=True):
        assert any({name, like} <= group for group in groups)
    record = commit.read(tmp_path / "kept")
    assert record == {"kept": len(kept), "dropped": len(gone), "rule": rule}


def test_without_a_parent_look_alikes_are_taken_for_the_same_picture(
    shop: Catalogue, hashed: Path, tmp_path: Path
) -> None:
    kept = kept_rows(tmp_path / "kept", "drop", shop, hashed, None)
    assert dropped(shop, kept) >= {"d1.jpg", original(shop, 5)}


@pytest.mark.parametrize("rule", ["drop", "teacher"])
def test_what_stays_and_what_is_told_of_the_rest_does_not_hang_on_the_order_of_the_file(
    shop: Catalogue, hashed: Path, parent: Path, shared: Path, tmp_path: Path, rule: Rule
) -> None:
    other = doubled(shared / "data" / "tiny", tmp_path / "other", 1)
    assert other.fingerprint == shop.fingerprint
    assert not other.train.ids.equals(shop.train.ids)
    write_hashes(tmp_path / "hashes", other.train, 0)
    kept = kept_rows(tmp_path / "kept", rule, shop, hashed, parent)
    again = kept_rows(tmp_path / "again", rule, other, tmp_path / "hashes", parent)
    assert dropped(shop, kept) == dropped(other, again)
    listed, relisted = (pq.read_table(tmp_path / name / "dropped.parquet") for name in ("kept", "again"))
    assert listed.equals(relisted)
    first = {"a1.jpg": 0, "a2.jpg": 0, "b1.jpg": 1, "b2.jpg": 1, "c1.jpg": 3}  # digits come before letters
    told = dict(zip(*listed.to_pydict().values(), strict=True))
    assert {name: told[name] for name in first} == {name: original(shop, label) for name, label in first.items()}


def test_where_no_two_pictures_are_alike_all_stay(packages: Catalogue, parent: Path, tmp_path: Path) -> None:
    few = replace(packages, train=packages.train.take(np.arange(2)))
    write_hashes(tmp_path / "hashes", few.train, 0)
    assert kept_rows(tmp_path / "kept", "drop", few, tmp_path / "hashes", parent).tolist() == [0, 1]

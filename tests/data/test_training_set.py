"""training_set: which images a stage trains on, and what is known of each beside its label."""

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from aliprod.catalogue.catalogue import Catalogue
from aliprod.catalogue.decode import decode
from aliprod.catalogue.sources import read
from aliprod.data.augment import square
from aliprod.data.loader import Feed, TrainBatches
from aliprod.data.selection import balanced
from aliprod.data.training_set import (
    base_rows,
    read_pseudo_labels,
    spread,
    training_set,
    write_pseudo_labels,
    write_soft_labels,
)
from aliprod.errors import Refused
from aliprod.ingest.prepare import Settings, prepare
from aliprod.recipe import Inputs, PerClass, PseudoLabels, Stage
from aliprod.store import commit
from aliprod.store.resumable import ResumableRows

FEED = Feed(torch.device("cpu"), (0.5,) * 3, (0.25,) * 3, "bicubic")
PSEUDO = Stage(resize=40, crop=32, batch_size=7, pseudo_labels=PseudoLabels(by=("net/full",), weight=0.25))
ADDED, CLASSES = [31, 4, 9], [2, 0, 2]  # test rows, and what they are taken for


@pytest.fixture
def labels(packages: Catalogue, tmp_path: Path) -> Path:
    write_pseudo_labels(
        tmp_path / "labels", packages.test.ids.take(pa.array(ADDED)), packages.classes[CLASSES], np.full(3, 0.9), {}
    )
    return tmp_path / "labels"


def test_without_further_ado_a_stage_trains_on_the_training_images_themselves(packages: Catalogue) -> None:
    data = training_set(packages, Stage())
    assert data.images.ids.equals(packages.train.ids)
    assert (data.weights, data.teacher) == (None, None)


def test_a_balanced_stage_chooses_among_the_images_that_a_filter_left(packages: Catalogue, tmp_path: Path) -> None:
    stage = Stage(images=PerClass(per_class=3), seed=4)
    kept = np.flatnonzero(np.arange(32) % 3 != 0)
    rows = base_rows(packages, stage, kept)
    left = packages.train.take(kept)
    chosen = left.ids.take(pa.array(balanced(left.labels, left.ids, packages.classes, 3, 4)))
    assert packages.train.ids.take(pa.array(rows)).equals(chosen)
    assert set(rows.tolist()) <= set(kept.tolist())
    np.save(tmp_path / "kept.npy", kept)
    assert training_set(packages, stage, Inputs(kept=tmp_path)).images.ids.equals(chosen)
    assert np.array_equal(base_rows(packages, Stage(), kept), kept)
    counts = Counter(left.labels.tolist())
    assert Counter(packages.train.labels[rows].tolist()) == {label: min(3, count) for label, count in counts.items()}


def test_pseudo_labelled_images_follow_the_training_images_with_a_weight_of_their_own(
    packages: Catalogue, labels: Path
) -> None:
    data = training_set(packages, PSEUDO, Inputs(pseudo_labels=labels))
    assert data.images.ids.to_pylist()[:32] == packages.train.ids.to_pylist()
    assert data.images.ids.to_pylist()[32:] == [f"test/{packages.test.ids[row].as_py()}" for row in ADDED]
    assert data.images.labels.tolist() == [*packages.train.labels.tolist(), *CLASSES]
    assert data.weights is not None
    assert data.weights.tolist() == [1.0] * 32 + [0.25] * 3
    for row in (0, 31):
        assert data.images.source(row) == packages.train.path(row)
    for place, row in enumerate(ADDED):
        assert data.images.source(32 + place) == packages.test.path(row)


def test_an_epoch_shows_the_pseudo_labelled_pictures_with_label_and_weight(packages: Catalogue, labels: Path) -> None:
    stage = PSEUDO.model_copy(update={"augmentation": ("resize",)})
    data = training_set(packages, stage, Inputs(pseudo_labels=labels))
    seen = {}
    for batch in TrainBatches(data, stage, FEED).epoch(0):
        assert batch.weights is not None
        for row, *what in zip(batch.rows.tolist(), batch.images, batch.labels.tolist(), batch.weights, strict=True):
            seen[row] = what
    assert sorted(seen) == list(range(35))
    for place, (row, label) in enumerate(zip(ADDED, CLASSES, strict=True)):
        image, shown, weight = seen[32 + place]
        pixels = square(decode(packages.test.path(row)), 32, "bicubic").float() / 255
        torch.testing.assert_close(image, (pixels - 0.5) / 0.25, rtol=0, atol=0.05)
        assert (shown, float(weight)) == (label, 0.25)
    assert {float(seen[row][2]) for row in range(32)} == {1.0}


def test_pseudo_labelled_images_of_a_prepared_catalogue_are_its_jpegs(
    packages: Catalogue, labels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALIPROD_CACHE", str(tmp_path / "cache"))
    *_, _ = prepare(packages.root, tmp_path / "prepared", Settings())
    catalogue = read(tmp_path / "prepared")
    data = training_set(catalogue, PSEUDO, Inputs(pseudo_labels=labels))
    stored = {f"test/{name}": row for row, name in enumerate(catalogue.test.ids.to_pylist())}
    for row in range(32, 35):
        source = data.images.source(row)
        assert isinstance(source, bytes)
        assert source == catalogue.test.source(stored[data.images.ids[row].as_py()])
    assert data.images.source(5) == catalogue.train.source(5)


def test_teachers_are_asked_about_the_images_of_the_stage(packages: Catalogue, tmp_path: Path) -> None:
    table = torch.rand(32, 4, generator=torch.Generator().manual_seed(0))
    table /= table.sum(dim=1, keepdim=True)
    write_soft_labels(
        ResumableRows(tmp_path / "soft", packages.train.ids, packages.classes, {}, 256), lambda rows: [table[rows]]
    )
    few = Stage(images=PerClass(per_class=2))
    data = training_set(packages, few, Inputs(teachers=(tmp_path / "soft",)))
    assert data.teacher is not None
    found = spread(*data.teacher.rows(np.arange(8)), 4)
    torch.testing.assert_close(found, table[base_rows(packages, few)], rtol=0, atol=1e-3)
    part = packages.train.ids.slice(1)
    write_soft_labels(ResumableRows(tmp_path / "part", part, packages.classes, {}, 256), lambda rows: [table[1:]])
    with pytest.raises(Refused, match="are soft labels of other images"):
        training_set(packages, Stage(), Inputs(teachers=(tmp_path / "part",)))


def labelled(folder: Path, ids: list[str], class_ids: list[int]) -> Path:
    count = len(ids)
    write_pseudo_labels(
        folder, pa.array(ids, pa.string()), np.array(class_ids, np.int64), np.full(count, 0.95), {"by": ["a"]}
    )
    return folder


def test_labels_come_back_as_rows_in_the_order_in_which_they_were_written(packages: Catalogue, tmp_path: Path) -> None:
    ids = packages.test.ids.to_pylist()
    chosen = [ids[30], ids[2], ids[17]]
    rows, labels = read_pseudo_labels(labelled(tmp_path / "a", chosen, packages.classes[[3, 0, 3]].tolist()), packages)
    assert rows.tolist() == [30, 2, 17]
    assert labels.tolist() == [3, 0, 3]
    assert commit.read(tmp_path / "a") == {"by": ["a"]}


def test_that_nobody_was_sure_of_any_image_is_no_fault(packages: Catalogue, tmp_path: Path) -> None:
    rows, labels = read_pseudo_labels(labelled(tmp_path / "a", [], []), packages)
    assert (len(rows), len(labels)) == (0, 0)


@pytest.mark.parametrize(("image", "class_id"), [("gone.jpg", None), (None, 10**6), (None, -1)])
def test_labels_of_other_images_or_classes_are_refused(
    packages: Catalogue, tmp_path: Path, image: str | None, class_id: int | None
) -> None:
    ids = [packages.test.ids[0].as_py(), image or packages.test.ids[1].as_py()]
    first = int(packages.classes[0])
    folder = labelled(tmp_path / "a", ids, [first, first if class_id is None else class_id])
    with pytest.raises(Refused, match="a: are pseudo labels of another catalogue"):
        read_pseudo_labels(folder, packages)


def test_a_folder_without_pseudo_labels_is_refused(packages: Catalogue, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="none: holds no pseudo labels"):
        read_pseudo_labels(tmp_path / "none", packages)

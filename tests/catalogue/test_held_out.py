"""held_out: a share of each class, the same for the same seed, copies on one side."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from aliprod.catalogue.held_out import chosen
from aliprod.catalogue.sources import Reading, read
from aliprod.ingest.prepare import Settings, prepare


@given(st.data(), st.integers(1, 60), st.floats(0.01, 0.5))
def test_groups_stay_whole_and_no_class_is_emptied(data: st.DataObject, count: int, share: float) -> None:
    def numbers(most: int) -> np.ndarray:
        return np.array(data.draw(st.lists(st.integers(0, most), min_size=count, max_size=count)), np.int64)

    groups, labels, order = numbers(count), numbers(4), numbers(1000).tolist()
    held = chosen(groups, labels, order, share)
    out = np.isin(np.arange(count), held)
    for group in np.unique(groups):
        members = groups == group
        assert len(set(out[members].tolist())) == 1, "copies on both sides"
        assert not out[members].any() or len(set(labels[members].tolist())) == 1, "a disputed picture judges"
    assert set(labels[~out].tolist()) == set(labels.tolist())


@given(st.integers(2, 400), st.floats(0.01, 0.5), st.integers(0, 1000))
def test_without_copies_the_share_of_each_class_is_exact(count: int, share: float, seed: int) -> None:
    labels = np.repeat([0, 1], [count, 2])
    order = np.random.default_rng(seed).integers(0, 2**32, len(labels)).tolist()
    held = np.bincount(labels[chosen(np.arange(len(labels)), labels, order, share)], minlength=2)
    assert held.tolist() == [min(count - 1, max(1, round(share * count))), 1]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for label in ("a", "b"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for number in range(10):
            Image.effect_noise((64, 64), 20 + number).save(tmp_path / "photos" / label / f"{number}.png")
    return tmp_path / "photos"


def test_a_seed_is_a_split_and_a_new_picture_moves_no_old_one(photos: Path) -> None:
    def val(seed: int, share: float = 0.2) -> set[str]:
        return set(read(photos, Reading(val=share, seed=seed, kept=photos.parent / "kept")).val.paths.to_pylist())

    first = val(0)
    assert len(first) == 4
    assert first == val(0)
    assert len({frozenset(val(seed)) for seed in range(4)}) > 1
    assert val(0, 0) == set()
    Image.effect_noise((64, 64), 90).save(photos / "a" / "new.png")
    assert len(first - val(0)) <= 1


@pytest.mark.parametrize("seed", range(4))
def test_what_cannot_be_read_is_not_held_out_in_place_of_what_can(photos: Path, seed: int) -> None:
    reading = Reading(val=0.2, seed=seed, kept=photos.parent / "kept")
    whole = {path for path in read(photos, reading).val.paths.to_pylist() if path < "b"}
    for label in "acd":
        (photos / label).mkdir(exist_ok=True)
        (photos / label / "broken.png").touch()
    (photos / "d" / "empty.png").touch()
    Image.effect_noise((64, 64), 99).save(photos / "c" / "0.png")
    for number in range(6):
        (photos / "b" / f"{number}.png").write_bytes(b"")
    found = read(photos, reading)
    val, train = set(found.val.paths.to_pylist()), set(found.train.paths.to_pylist())
    assert {path for path in val if path < "b"} == whole
    assert len([path for path in val if path > "b"]) == 1, "of the four in b that are left"
    assert not any((photos / path).stat().st_size == 0 for path in val)
    assert "c/0.png" in train


def test_only_what_is_said_is_held_out_of_a_catalogue_with_splits(photos: Path) -> None:
    (photos / "b").rename(photos.parent / "b")
    (photos / "train").mkdir()
    (photos / "a").rename(photos / "train" / "a")
    (photos.parent / "b").rename(photos / "train" / "b")
    kept = photos.parent / "kept"
    assert len(read(photos, Reading(kept=kept)).val) == 0
    found = read(photos, Reading(val=0.1, kept=kept))
    assert len(found.val) == 2
    assert found.fingerprint != read(photos).fingerprint
    (photos / "val" / "a").mkdir(parents=True)
    (photos / "train" / "a" / "0.png").rename(photos / "val" / "a" / "0.png")
    found = read(photos, Reading(val=0.1, kept=kept))
    assert len(found.val) == 1
    assert any("nothing is held out" in note for note in found.notes)


def test_a_split_of_a_prepared_catalogue_has_a_fingerprint_of_its_own(photos: Path) -> None:
    *_, _ = prepare(photos, photos.parent / "out", Settings(), reading=Reading(val=0))
    whole = read(photos.parent / "out")
    some = [read(photos.parent / "out", Reading(val=0.2, seed=seed, kept=photos.parent / "k")) for seed in (0, 0, 1)]
    assert [len(one.val) for one in (whole, *some)] == [0, 4, 4, 4]
    assert len({one.fingerprint for one in (whole, *some)}) == 3

"""A rendered catalogue: what its numbers, files and pictures promise."""

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from aliprod.errors import Refused, StorageFull
from aliprod.synth.packages import face, family_of, look
from aliprod.synth.synth import Counts, class_sizes, synthesise

CLASSES, IMAGES = 5, 60


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synth") / "catalogue"
    synthesise(out, CLASSES, IMAGES, seed=3)
    return out


def rows(catalogue: Path, name: str) -> list[dict[str, str]]:
    images: list[dict[str, str]] = json.loads((catalogue / name).read_text())["images"]
    return images


def contents(catalogue: Path) -> dict[str, bytes]:
    return {p.relative_to(catalogue).as_posix(): p.read_bytes() for p in catalogue.rglob("*") if p.is_file()}


def pictures_of(catalogue: Path, split: str, number: int) -> list[bytes]:
    """In the order of rendering, which is that of the rows."""
    mine = [row["image_id"] for row in rows(catalogue, f"{split}.json") if row["class_id"] == str(number)]
    return [(catalogue / split / f"{number:05}" / name).read_bytes() for name in mine]


def test_the_counts_are_those_of_the_files(tmp_path: Path) -> None:
    counts = synthesise(tmp_path / "out", 2, 11, seed=0)
    assert counts == Counts(str(tmp_path / "out"), classes=2, train=11, val=12, test=20)
    for split, count in (("train", 11), ("val", 12), ("test", 20)):
        assert len(list((tmp_path / "out" / split).rglob("*.jpg"))) == count


@given(st.integers(2, 400), st.integers(0, 5000), st.integers(0, 2**63))
def test_class_sizes_sum_to_the_images_and_fall_by_a_factor_of_five_at_most(classes: int, more: int, seed: int) -> None:
    sizes = class_sizes(classes, 5 * classes + more, seed)
    assert sum(sizes) == 5 * classes + more
    assert min(sizes) >= 5
    assert max(sizes) - 1 <= 5 * (min(sizes) + 1)  # rounded by up to one at both ends


def test_the_tail_is_geometric_where_there_are_images_enough() -> None:
    sizes = sorted(class_sizes(10, 100_000, seed=1), reverse=True)
    ratios = [larger / smaller for larger, smaller in pairwise(sizes)]
    assert ratios == pytest.approx([5 ** (1 / 9)] * 9, rel=1e-3)
    assert sizes[0] / sizes[-1] == pytest.approx(5, rel=1e-3)


def test_the_quickstarts_catalogue_has_the_measured_ones_tail() -> None:
    sizes = class_sizes(8, 212, seed=0)  # there: 10 to 48 a class
    assert 9 <= min(sizes) <= 11
    assert 43 <= max(sizes) <= 53


def test_every_row_has_its_file_and_every_file_its_row(catalogue: Path) -> None:
    expected = {"train.json", "val.json", "test.json", "test_labels.json", "product_tree.json"}
    for split in ("train", "val"):
        expected |= {f"{split}/{int(r['class_id']):05}/{r['image_id']}" for r in rows(catalogue, f"{split}.json")}
    expected |= {f"test/{row['image_id']}" for row in rows(catalogue, "test.json")}
    assert set(contents(catalogue)) == expected


def test_image_ids_are_unique_over_all_splits(catalogue: Path) -> None:
    ids = [row["image_id"] for name in ("train.json", "val.json", "test.json") for row in rows(catalogue, name)]
    assert len(set(ids)) == len(ids) == IMAGES + 16 * CLASSES


def test_val_and_test_are_balanced(catalogue: Path) -> None:
    for name, each in (("val.json", 6), ("test_labels.json", 10)):
        counts = Counter(row["class_id"] for row in rows(catalogue, name))
        assert counts == {str(number): each for number in range(CLASSES)}


def test_the_test_rows_tell_no_class(catalogue: Path) -> None:
    assert all(row.keys() == {"image_id"} for row in rows(catalogue, "test.json"))
    labels = [row["class_id"] for row in rows(catalogue, "test_labels.json")]
    neighbours_agree = sum(a == b for a, b in pairwise(labels))
    assert neighbours_agree < len(labels) / 2  # 1 in 5 by chance, 9 in 10 if they stood class by class


def test_pictures_are_rgb_jpegs_of_many_shapes(catalogue: Path) -> None:
    shapes = set()
    for path in catalogue.rglob("*.jpg"):
        with Image.open(path) as image:
            image.load()
            assert (image.format, image.mode) == ("JPEG", "RGB")
            assert all(100 <= side <= 160 for side in image.size)
            shapes.add(image.size)
    assert len(shapes) > 50


def leaves(node: dict[str, Any], above: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], str]]:
    if "class_id" in node:
        return [((*above, node["name"]), node["class_id"])]
    return [leaf for child in node["children"] for leaf in leaves(child, (*above, node["name"]))]


def test_the_tree_has_every_class_once_three_levels_below_its_root(catalogue: Path) -> None:
    found = leaves(json.loads((catalogue / "product_tree.json").read_text()))
    assert sorted(class_id for _, class_id in found) == [str(number) for number in range(CLASSES)]
    assert {len(path) for path, _ in found} == {4}
    assert len({path for path, _ in found}) == CLASSES
    families = {class_id: path[2] for path, class_id in found}
    assert families["0"] == families["1"] != families["2"] == families["3"]


def test_same_arguments_same_bytes_whatever_the_number_of_processes(catalogue: Path, tmp_path: Path) -> None:
    synthesise(tmp_path / "again", CLASSES, IMAGES, seed=3, processes=2)
    assert contents(tmp_path / "again") == contents(catalogue)


def test_another_seed_renders_other_packages(catalogue: Path, tmp_path: Path) -> None:
    synthesise(tmp_path / "other", CLASSES, IMAGES, seed=4)
    ours, other = set(contents(catalogue).values()), set(contents(tmp_path / "other").values())
    assert not ours & other


def test_no_picture_occurs_twice(catalogue: Path) -> None:
    pictures = [data for name, data in contents(catalogue).items() if name.endswith(".jpg")]
    assert len(set(pictures)) == len(pictures)


def test_a_class_keeps_its_pictures_in_a_larger_catalogue(catalogue: Path, tmp_path: Path) -> None:
    synthesise(tmp_path / "larger", CLASSES + 2, 2 * IMAGES, seed=3)
    for number in range(CLASSES):
        few, many = pictures_of(catalogue, "train", number), pictures_of(tmp_path / "larger", "train", number)
        both = min(len(few), len(many))
        assert few[:both] == many[:both]
        assert pictures_of(catalogue, "val", number) == pictures_of(tmp_path / "larger", "val", number)


@given(st.integers(0, 10**6))
def test_families_are_runs_of_two_to_four_classes(number: int) -> None:
    family, member = family_of(number)
    assert 0 <= member < 4
    assert family_of(number - member) == (family, 0)
    assert family_of(number + 1) in ((family, member + 1), (family + 1, 0))
    assert family_of(number - member + 1) == (family, 1)  # nobody is alone


@given(st.integers(0, 2**32), st.integers(0, 10**5))
def test_members_of_a_family_share_shape_and_colour_but_not_print(seed: int, number: int) -> None:
    first = number - family_of(number)[1]
    one, other = look(seed, first), look(seed, first + 1)
    assert (one.family, one.shape, one.layout, one.main) == (other.family, other.shape, other.layout, other.main)
    assert one.flavour != other.flavour
    assert one.amount != other.amount
    assert one.emblem != other.emblem
    assert one.pattern != other.pattern
    assert one.accent != other.accent


def test_faces_of_a_family_have_one_outline_and_those_of_neighbours_another() -> None:
    faces = [np.asarray(face(look(0, number)).resize((64, 88))) for number in range(4)]
    outlines = [pixels[..., 3] for pixels in faces]
    assert (outlines[0] == outlines[1]).all()
    assert (outlines[2] == outlines[3]).all()
    assert (outlines[0] != outlines[2]).any()
    assert (faces[0] != faces[1]).any()
    assert (faces[2] != faces[3]).any()


def test_no_two_of_as_many_classes_as_aliproducts_has_are_named_alike() -> None:
    names = {(one.family, one.flavour, one.amount) for one in (look(0, number) for number in range(50_030))}
    assert len(names) == 50_030


@pytest.mark.parametrize(("classes", "images", "advice"), [(1, 50, "2 or more"), (8, 39, "40 images")])
def test_numbers_that_make_no_catalogue_are_refused(tmp_path: Path, classes: int, images: int, advice: str) -> None:
    with pytest.raises(Refused, match=advice):
        synthesise(tmp_path / "out", classes, images, seed=0)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_in_it_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(Refused, match="new or empty folder"):
        synthesise(tmp_path / "out", 2, 10, seed=0)
    assert contents(tmp_path) == {"out/notes.txt": b"mine"}


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    synthesise(tmp_path / "out", 2, 10, seed=0)
    assert len(rows(tmp_path / "out", "train.json")) == 10
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_place_that_cannot_be_written_is_one_error_with_a_cure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageFull, match="cannot be written"):
        synthesise(tmp_path / "file" / "out", 2, 10, seed=0)


def started(out: Path, classes: int, images: int) -> subprocess.Popen[str]:
    """A process that renders, once its first class is on the disk."""
    call = f"from aliprod.synth.synth import *; synthesise(Path({str(out)!r}), {classes}, {images}, 0)"
    process = subprocess.Popen([sys.executable, "-c", call], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not list(out.parent.glob(".out.*.partial/val/00000/*.jpg")) and time.monotonic() < deadline:
        time.sleep(0.01)
    return process


def test_a_killed_rendering_leaves_no_catalogue_and_is_simply_repeated(tmp_path: Path) -> None:
    with started(tmp_path / "out", 50, 9000) as process:
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    synthesise(tmp_path / "out", 2, 10, seed=0)
    assert len(rows(tmp_path / "out", "train.json")) == 10


def test_what_appears_while_rendering_is_left_alone(tmp_path: Path) -> None:
    with started(tmp_path / "out", 8, 300) as process:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "notes.txt").write_text("mine")
        _, said = process.communicate()
    assert process.returncode == 1
    assert "there is something already" in said
    assert contents(tmp_path) == {"out/notes.txt": b"mine"}

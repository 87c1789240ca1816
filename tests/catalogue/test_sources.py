"""sources: three layouts become one catalogue, and whatever is wrong is said."""

import csv
import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aliprod.catalogue.catalogue import Catalogue, Images
from aliprod.catalogue.decode import Unreadable
from aliprod.catalogue.sources import read
from aliprod.errors import Refused


def write_rows(file: Path, rows: list[Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"images": rows}), encoding="utf-8")


def train_of(folder: Path, *rows: Any) -> Catalogue:
    write_rows(folder / "train.json", list(rows))
    return read(folder)


def listed(catalogue: Catalogue, images: Images) -> set[tuple[str, int]]:
    return set(zip(images.paths.to_pylist(), catalogue.classes[images.labels].tolist(), strict=True))


def test_grocery_and_tiny_are_read_whole(shared: Path) -> None:
    grocery, tiny = read(shared / "data/grocery"), read(shared / "data/tiny")
    assert [len(s) for s in (grocery.train, grocery.val, grocery.test)] == [1021, 144, 240]
    assert [len(s) for s in (tiny.train, tiny.val, tiny.test)] == [80, 24, 24]
    assert grocery.classes.tolist() == list(range(48))
    assert sorted(grocery.class_counts.tolist(), reverse=True)[:5] == [56, 53, 51, 48, 46]
    assert not grocery.problems
    assert not tiny.problems


def test_labels_paths_and_files_agree(shared: Path) -> None:
    tiny = read(shared / "data/tiny")
    for images in (tiny.train, tiny.val):
        for row in range(len(images)):
            assert images.path(row).is_file()
            assert int(images.path(row).parent.name) == tiny.classes[images.labels[row]]


def test_test_labels_stand_in_the_order_of_the_test_images(shared: Path) -> None:
    tiny = read(shared / "data/tiny")
    rows = json.loads((shared / "data/tiny/test_labels.json").read_text())["images"]
    truth = {row["image_id"]: int(row["class_id"]) for row in rows}
    assert tiny.test_labels is not None
    assert tiny.classes[tiny.test_labels].tolist() == [truth[image_id] for image_id in tiny.test.ids.to_pylist()]
    assert (tiny.test.labels == -1).all()


def test_every_row_of_broken_is_kept_or_named_with_its_reason(shared: Path) -> None:
    broken = read(shared / "data/broken")
    kept = {path for images in (broken.train, broken.val, broken.test) for path in images.paths.to_pylist()}
    named = " ".join(problem.path for problem in broken.problems)
    for case in json.loads((shared / "data/broken/expected.json").read_text())["cases"]:
        if case["expect"] in ("ignore", "report"):
            continue
        split, image_id = case["split"], case["image_id"]
        folder = split if case["class_id"] is None else f"{split}/{int(case['class_id']):05d}"
        if case["expect"] in ("read", "predict"):
            assert f"{folder}/{image_id}" in kept, case
        assert f"{folder}/{image_id}" in kept or f"/{image_id}" in named, case
    assert not any("outside" in path or "hostname" in path or "1100028" in path for path in kept)
    assert broken.classes.tolist() == [0, 1, 2, 3, 4]


def test_one_id_under_two_classes_is_two_images_and_a_row_twice_is_one(shared: Path) -> None:
    train = read(shared / "data/broken").train
    ids = train.ids.to_pylist()
    assert len(set(ids)) == len(ids)
    assert {"3/1100019.jpg", "4/1100019.jpg"} <= set(ids)
    assert ids.count("1100016.jpg") == 1


@pytest.mark.parametrize(
    ("name", "line", "says"),
    [
        ("cut_off", 3, "not JSON"),
        ("empty", None, "empty"),
        ("not_json", 1, "not JSON"),
        ("list", None, "a list at the top"),
        ("no_images_key", None, "annotations"),
        ("images_null", None, "null under images"),
        ("images_empty", None, "no row"),
        ("rows_are_lists", None, "row 1"),
        ("latin1", 1, "not UTF-8"),
        ("images_key_twice", 1, "images twice"),
    ],
)
def test_a_whole_annotation_file_is_refused_in_one_sentence(
    shared: Path, tmp_path: Path, name: str, line: int | None, says: str
) -> None:
    (tmp_path / "train.json").write_bytes((shared / f"data/broken/annotations/{name}.json").read_bytes())
    with pytest.raises(Refused, match=says) as refused:
        read(tmp_path)
    assert refused.value.where == str(tmp_path / "train.json") + (f", line {line}" if line else "")
    assert refused.value.advice


def test_a_byte_order_mark_is_no_error(shared: Path, tmp_path: Path) -> None:
    (tmp_path / "train.json").write_bytes((shared / "data/broken/annotations/bom.json").read_bytes())
    assert read(tmp_path).train.ids.to_pylist() == ["1000000.jpg"]


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"images": ' + "1" * 5000 + "}", "\x00", '{"images": [NaN]}', "{}", "7"]
)
def test_hostile_json_is_refused_and_never_a_traceback(tmp_path: Path, text: str) -> None:
    (tmp_path / "train.json").write_text(text)
    with pytest.raises(Refused):
        read(tmp_path)


@pytest.mark.parametrize("class_id", ["7", "00007", 7])
def test_seven_is_seven_however_it_is_written(tmp_path: Path, class_id: object) -> None:
    catalogue = train_of(tmp_path, {"image_id": "a.jpg", "class_id": class_id}, {"id": "b.jpg", "category_id": 7})
    assert catalogue.classes.tolist() == [7]
    assert catalogue.train.paths.to_pylist() == ["train/00007/a.jpg", "train/00007/b.jpg"]


@pytest.mark.parametrize(
    "class_id", [None, True, False, -1, 7.0, "", " 7", "7 ", "٧", "1" * 30, 10**30, [], {}, "banana", "../7"]
)
def test_what_is_no_class_id_costs_the_row_and_only_the_row(tmp_path: Path, class_id: object) -> None:
    catalogue = train_of(tmp_path, {"image_id": "a.jpg", "class_id": class_id}, {"image_id": "b.jpg", "class_id": 1})
    assert catalogue.train.ids.to_pylist() == ["b.jpg"]
    assert [problem.path for problem in catalogue.problems] == ["train/a.jpg"]


@given(st.one_of(st.text(), st.none(), st.integers(), st.text("./\\:ab\x00\ud800"), st.lists(st.text())))
def test_no_id_leads_out_of_its_folder(image_id: object) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name).resolve()
        catalogue = train_of(folder, {"image_id": image_id, "class_id": 1}, {"image_id": "known.jpg", "class_id": 1})
        for row in range(len(catalogue.train)):
            assert catalogue.train.path(row).parent == folder / "train" / "00001"
    assert len(catalogue.train) + len(catalogue.problems) == 2
    for problem in catalogue.problems:
        (problem.path + problem.problem).encode()


def test_a_key_that_a_row_says_twice_costs_the_row(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text(
        '{"images": [{"image_id": "a.jpg", "class_id": 1, "class_id": 2}, {"image_id": "b.jpg", "class_id": 2}]}'
    )
    catalogue = read(tmp_path)
    assert catalogue.train.ids.to_pylist() == ["b.jpg"]
    assert "class_id twice" in catalogue.problems[0].problem


def test_the_folder_of_a_class_may_be_its_number_without_padding(tmp_path: Path) -> None:
    (tmp_path / "train/7").mkdir(parents=True)
    (tmp_path / "train/8").mkdir()
    (tmp_path / "train/00008").mkdir()
    catalogue = train_of(tmp_path, *({"image_id": "a.jpg", "class_id": class_id} for class_id in (7, 8, 9)))
    assert catalogue.train.paths.to_pylist() == ["train/7/a.jpg", "train/00008/a.jpg", "train/00009/a.jpg"]


def test_validation_images_of_an_untrained_class_are_named_and_left_out(tmp_path: Path) -> None:
    write_rows(tmp_path / "val.json", [{"image_id": "v.jpg", "class_id": 77}, {"image_id": "w.jpg", "class_id": 1}])
    catalogue = train_of(tmp_path, {"image_id": "a.jpg", "class_id": 1})
    assert catalogue.val.ids.to_pylist() == ["w.jpg"]
    assert [(problem.path, "77" in problem.problem) for problem in catalogue.problems] == [("val/00077/v.jpg", True)]
    assert catalogue.problems[0].problem == "class 77 has no training image: left out"


def test_a_row_that_is_left_out_does_not_rename_the_one_that_stays(tmp_path: Path) -> None:
    write_rows(tmp_path / "val.json", [{"image_id": "v.jpg", "class_id": class_id} for class_id in (77, 1)])
    assert train_of(tmp_path, {"image_id": "a.jpg", "class_id": 1}).val.ids.to_pylist() == ["v.jpg"]


def test_a_link_out_of_the_catalogue_is_not_followed(tmp_path: Path) -> None:
    root, secret = tmp_path / "catalogue", tmp_path / "secret.jpg"
    secret.write_bytes(b"secret")
    (root / "train/00001").mkdir(parents=True)
    (root / "train/00001/out.jpg").symlink_to(secret)
    (root / "train/00001/kept.jpg").write_bytes(b"kept")
    (root / "train/00001/in.jpg").symlink_to("kept.jpg")
    catalogue = train_of(root, *({"image_id": f"{name}.jpg", "class_id": 1} for name in ("out", "in")))
    with pytest.raises(Unreadable, match="link"):
        catalogue.train.path(0)
    assert catalogue.train.path(1).read_bytes() == b"kept"


def image_folder(root: Path, *files: str) -> Path:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(b"")
    return root


def test_an_image_folder_has_its_classes_in_the_order_of_their_names(tmp_path: Path) -> None:
    files = ("train/pear/b.jpg", "train/apple/a.jpg", "train/apple/.hidden", "train/apple/notes.txt", "val/pear/a.PNG")
    catalogue = read(image_folder(tmp_path, *files, "val/plum/c.jpg", "test/t.jpg"))
    assert catalogue.names == ("apple", "pear")
    assert listed(catalogue, catalogue.train) == {("train/apple/a.jpg", 0), ("train/pear/b.jpg", 1)}
    assert listed(catalogue, catalogue.val) == {("val/pear/a.PNG", 1)}
    assert catalogue.test.ids.to_pylist() == ["t.jpg"]
    assert {problem.path for problem in catalogue.problems} == {"train/apple/notes.txt", "val/plum"}


def test_numbers_as_folder_names_are_the_class_ids(tmp_path: Path) -> None:
    catalogue = read(image_folder(tmp_path, "train/00007/a.jpg", "train/10/b.jpg"))
    assert catalogue.classes.tolist() == [7, 10]
    assert catalogue.names == ("", "")


def test_folders_that_are_links_out_of_the_catalogue_are_no_classes(tmp_path: Path) -> None:
    image_folder(tmp_path / "other", "x.jpg")
    root = image_folder(tmp_path / "catalogue", "train/1/a.jpg")
    (root / "train/2").symlink_to(tmp_path / "other")
    assert read(root).classes.tolist() == [1]


def write_csv(file: Path, *rows: tuple[str, ...]) -> None:
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows(rows)


def test_a_csv_names_paths_and_classes_by_number_or_by_word(tmp_path: Path) -> None:
    odd = "pictures/a \"quoted\", 'odd'\tname.jpg".replace("\t", " ")
    write_csv(tmp_path / "train.csv", ("class", "path"), ("pear", odd), ("apple", "pictures/b.jpg"))
    write_csv(tmp_path / "val.csv", ("path", "class"), ("pictures/c.jpg", "pear"), ("pictures/d.jpg", "plum"))
    write_csv(tmp_path / "test.csv", ("path",), ("e.jpg",))
    catalogue = read(tmp_path)
    assert catalogue.names == ("apple", "pear")
    assert listed(catalogue, catalogue.train) == {(odd, 1), ("pictures/b.jpg", 0)}
    assert listed(catalogue, catalogue.val) == {("pictures/c.jpg", 1)}
    assert catalogue.test.paths.to_pylist() == ["e.jpg"]
    assert ["line 3 of val.csv" in problem.problem for problem in catalogue.problems] == [True]


@pytest.mark.parametrize("path", ["../a.jpg", "a/../../b.jpg", "", "a//b.jpg", "a\\b.jpg", "./../a.jpg", "a/"])
def test_a_path_that_could_leave_the_catalogue_costs_its_row(tmp_path: Path, path: str) -> None:
    write_csv(tmp_path / "train.csv", ("path", "class"), (path, "1"), ("b.jpg", "00001"))
    catalogue = read(tmp_path)
    assert catalogue.train.paths.to_pylist() == ["b.jpg"]
    assert "line 2 of train.csv" in catalogue.problems[0].problem


@pytest.mark.parametrize(
    ("content", "line", "says"),
    [
        (b"", 1, "no column path"),
        (b"colour,size\na.jpg,1\n", 1, "colour, size"),
        (b"path,class\na.jpg,1\n/data/b.jpg,1\n", 3, "absolute"),
        (b"path,class\na.jpg,1\nC:\\photos\\b.jpg,1\n", 3, "absolute"),
        (b"path,class\na.jpg,1\nb.jpg\n", 3, "blank"),
        (b"path,class\n\xe4.jpg,1\n", 2, "UTF-8"),
        (b'path,class\na.jpg,"1"x\n', 2, "not CSV"),
        (b"path,class\n", None, "no row"),
    ],
)
def test_a_whole_csv_is_refused_with_its_line(tmp_path: Path, content: bytes, line: int | None, says: str) -> None:
    (tmp_path / "train.csv").write_bytes(content)
    with pytest.raises(Refused, match=says) as refused:
        read(tmp_path)
    assert refused.value.where == str(tmp_path / "train.csv") + (f", line {line}" if line else "")


def test_a_folder_without_a_catalogue_is_refused_with_the_three_layouts(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing", Path(__file__)):
        with pytest.raises(Refused, match=r"train\.json") as refused:
            read(path)
        assert refused.value.where == str(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_refused(tmp_path: Path) -> None:
    image_folder(tmp_path, "train/1/a.jpg")
    (tmp_path / "train/1").chmod(0)
    with pytest.raises(Refused, match="cannot be read"):
        read(tmp_path)


@given(st.permutations(range(12)))
def test_the_fingerprint_is_one_of_content_and_not_of_order_or_place(order: list[int]) -> None:
    rows = [{"image_id": f"{i}.jpg", "class_id": i % 3} for i in range(12)]
    with TemporaryDirectory() as one, TemporaryDirectory() as other:
        straight = train_of(Path(one), *rows)
        mixed = train_of(Path(other), *(rows[i] for i in order))
    assert straight.fingerprint == mixed.fingerprint


def test_a_name_forges_no_line_of_a_remark(tmp_path: Path) -> None:
    image_folder(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "train/a/2.heic\nError: all is lost.heic")
    told = "; ".join(read(tmp_path).remarks)
    assert "\n" not in told
    assert "all is lost" in told


def test_other_pictures_of_the_same_names_have_another_fingerprint(tmp_path: Path) -> None:
    names = [f"train/{label}/{image}.jpg" for label in "ab" for image in range(3)]
    cat, car = [9, 10, 11, 12, 13, 14], [29, 30, 31, 32, 33, 34]
    sizes = {"cats": cat, "copies of cats": cat, "cars": car, "swapped": cat[3:] + cat[:3]}
    for folder, of_each in sizes.items():
        for name, count in zip(names, of_each, strict=True):
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / name).write_bytes(b"." * count)
    cats, copies, cars, swapped = (read(tmp_path / folder) for folder in sizes)
    assert len({one.annotation for one in (cats, copies, cars, swapped)}) == 1
    assert cats.fingerprint == copies.fingerprint
    assert len({one.fingerprint for one in (cats, cars, swapped)}) == 3


def test_the_fingerprint_changes_with_an_id_a_label_a_class_and_a_split(tmp_path: Path) -> None:
    def fingerprint(name: str, *rows: tuple[str, int], val: tuple[tuple[str, int], ...] = ()) -> str:
        write_rows(tmp_path / name / "val.json", [{"image_id": i, "class_id": c} for i, c in val])
        return train_of(tmp_path / name, *({"image_id": i, "class_id": c} for i, c in rows)).fingerprint

    a, b, c = ("a.jpg", 0), ("b.jpg", 1), ("c.jpg", 1)
    prints = [
        fingerprint("base", a, b, c),
        fingerprint("id", a, b, ("d.jpg", 1)),
        fingerprint("label", a, b, ("c.jpg", 0)),
        fingerprint("class", a, ("b.jpg", 2), ("c.jpg", 2)),
        fingerprint("split", a, b, val=(c,)),
        fingerprint("joined", ("a.jpgb.jpg", 0), b, c),
    ]
    assert len(set(prints)) == len(prints)


def test_taking_rows_keeps_ids_labels_and_paths_together(shared: Path) -> None:
    train = read(shared / "data/tiny").train
    rows = np.array([5, 0, 79])
    taken = train.take(rows)
    assert [taken.ids[i].as_py() for i in range(3)] == [train.ids[int(row)].as_py() for row in rows]
    assert taken.labels.tolist() == train.labels[rows].tolist()
    assert [taken.path(i) for i in range(3)] == [train.path(int(row)) for row in rows]

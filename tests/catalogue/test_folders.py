"""folders: the names of splits, nested classes, and links that are followed or named."""

from pathlib import Path

import pytest
from PIL import Image

from aliprod.build.preflight import check_storage
from aliprod.catalogue.annotations import UNREAD
from aliprod.catalogue.catalogue import Catalogue
from aliprod.catalogue.decode import Unreadable
from aliprod.catalogue.folders import pictures_below
from aliprod.catalogue.sources import Reading, read
from aliprod.errors import Refused


def files(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(path.encode())
    return root


def said(catalogue: Catalogue) -> dict[str, str]:
    return {flaw.path: flaw.problem for flaw in catalogue.problems}


@pytest.mark.parametrize("name", ["val", "validation", "valid", "dev", "Validation"])
def test_val_has_many_names_and_its_own_is_said(tmp_path: Path, name: str) -> None:
    found = read(files(tmp_path, "train/a/1.jpg", f"{name}/a/2.jpg"))
    assert found.val.paths.to_pylist() == [f"{name}/a/2.jpg"]
    assert list(found.notes) == ([] if name == "val" else [f"{name}/ is read as val."])


def test_two_folders_for_one_split_are_a_question(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="dev and val both mean val"):
        read(files(tmp_path, "train/a/1.jpg", "val/a/2.jpg", "dev/a/3.jpg"))


def test_a_test_in_class_folders_is_labelled_and_loses_no_picture(tmp_path: Path) -> None:
    tests = ("test/a/1.jpg", "test/b/1.jpg", "test/c/1.jpg", "test/1.jpg")
    found = read(files(tmp_path, "train/a/1.jpg", "train/b/1.jpg", *tests))
    assert sorted(found.test.paths.to_pylist()) == sorted(tests)
    assert len(set(found.test.ids.to_pylist())) == 4
    assert found.test_labels is not None
    assert dict(zip(found.test.paths.to_pylist(), found.test_labels.tolist(), strict=True)) == dict(
        zip(tests, [0, 1, -1, -1], strict=True)
    )
    assert (found.test.labels == -1).all()
    assert list(said(found)) == ["test/c"]


@pytest.mark.parametrize("classes", [("apple", "pear"), ("5", "6")])
def test_no_two_pictures_of_a_split_have_one_id(tmp_path: Path, classes: tuple[str, str]) -> None:
    known = [f"test/{name}/1.jpg" for name in classes]
    odd = ["test/1.jpg", *(f"test/{name}/1.jpg" for name in ("0", "1", "5", "6", "-1", "-1/0", "plum"))]
    files(tmp_path, *(f"train/{name}/1.jpg" for name in classes), *known)
    before = read(tmp_path)
    files(tmp_path, *odd)
    found = read(tmp_path)
    ids = dict(zip(found.test.paths.to_pylist(), found.test.ids.to_pylist(), strict=True))
    assert len(set(ids.values())) == len(ids) == len({*known, *odd}) - 1, "-1/0 lies below pictures of -1"
    assert [ids[path] for path in known] == before.test.ids.to_pylist()
    assert ids["test/plum/1.jpg"] == "plum/1.jpg"


def test_two_pictures_of_one_name_in_two_folders_of_a_class_are_not_called_one(tmp_path: Path) -> None:
    found = read(files(tmp_path, "train/1/1.jpg", "train/2/1.jpg", "val/01/5.jpg", "val/01/6.jpg", "val/1/5.jpg"))
    assert found.val.paths.to_pylist() == ["val/01/5.jpg", "val/01/6.jpg"]
    assert list(said(found)) == ["val/1/5.jpg"]
    assert said(found)["val/1/5.jpg"].startswith("has the name and the class of val/01/5.jpg, which counts: not used")
    assert [flaw.skipped for flaw in found.problems] == [True]


def test_a_class_is_the_way_below_its_split(tmp_path: Path) -> None:
    found = read(
        files(tmp_path, "train/fruit/apple/1.jpg", "train/fruit/notes.txt", "train/nut/1.jpg", "val/nut/2.jpg")
    )
    assert found.names == ("fruit/apple", "nut")
    assert len(found.train) == 2


def test_what_lies_below_the_pictures_of_a_class_is_named(tmp_path: Path) -> None:
    found = read(files(tmp_path, "train/a/1.jpg", "train/a/old/2.jpg", "train/b/1.jpg"))
    assert (found.names, len(found.train)) == (("a", "b"), 2)
    assert "pictures of its own" in said(found)["train/a/old"]


def test_links_are_followed_inside_and_where_the_user_says(tmp_path: Path) -> None:
    root = files(tmp_path / "photos", "train/a/1.jpg", "store/b/2.jpg")
    files(tmp_path / "allowed", "c/3.jpg", "4.jpg")
    files(tmp_path / "secret", "d/5.jpg")
    for name, goal in (("b", "photos/store/b"), ("c", "allowed/c"), ("d", "secret/d")):
        (root / "train" / name).symlink_to(tmp_path / goal)
    (root / "train/a/4.jpg").symlink_to(tmp_path / "allowed/4.jpg")
    found = read(root)
    assert found.names == ("a", "b")
    assert sorted(said(found)) == ["train/c", "train/d"]
    with pytest.raises(Unreadable, match="link"):
        found.train.path(found.train.paths.to_pylist().index("train/a/4.jpg"))
    found = read(root, Reading(links=tmp_path / "allowed"))
    assert found.names == ("a", "b", "c")
    assert {found.train.path(row).read_bytes() for row in range(4)} == {
        b"train/a/1.jpg", b"store/b/2.jpg", b"c/3.jpg", b"4.jpg"
    }  # fmt: skip
    assert list(said(found)) == ["train/d"]


def test_links_in_a_ring_end(tmp_path: Path) -> None:
    root = files(tmp_path, "train/a/1.jpg", "train/group/b/2.jpg")
    for name, goal in (("group/up", ".."), ("group/twice", "../a"), ("again", "a"), ("self", "self")):
        (root / "train" / name).symlink_to(goal)
    found = read(root)
    assert "read already" in said(found)["train/group/up"]
    assert len(found.train) == 3, "one folder is read by one link"


def test_an_empty_class_is_named_and_not_made_up(tmp_path: Path) -> None:
    files(tmp_path, "train/a/1.jpg", "train/c/1.jpg")
    (tmp_path / "train/b").mkdir()
    found = read(tmp_path)
    assert found.names == ("a", "c")
    assert found.classes.tolist() == [0, 1], "as if the empty folder were not there"
    assert "no picture" in said(found)["train/b"]


@pytest.mark.parametrize("names", [("1", "2", "10"), ("a", "b", "c")])
def test_a_folder_without_a_picture_that_is_read_changes_no_class_id(tmp_path: Path, names: tuple[str, ...]) -> None:
    files(tmp_path, *(f"{split}/{name}/{split}.jpg" for name in names for split in ("train", "val")))
    before = read(tmp_path)
    for name in ("__MACOSX", "0", "02"):
        (tmp_path / "train" / name).mkdir()
    files(tmp_path, "train/aa/notes.txt", "train/bb/\x07.jpg", "val/aa/1.jpg")
    found = read(tmp_path)
    assert (found.classes.tolist(), found.fingerprint) == (before.classes.tolist(), before.fingerprint)
    assert {"train/__MACOSX", "train/0", "train/02", "train/aa", "train/bb", "val/aa"} < set(said(found))
    assert said(found)["val/aa"].startswith("the class has no picture in train: left out")


def test_a_storage_folder_in_a_catalogue_is_no_part_of_it(tmp_path: Path) -> None:
    for label in ("apple", "pear"):
        (tmp_path / label).mkdir()
        for number in range(3):
            Image.effect_noise((64, 64), 20 + number).save(tmp_path / label / f"{number}.png")
    reading = Reading(kept=tmp_path / "runs" / "held-out")
    check_storage(tmp_path / "runs")
    first = read(tmp_path, reading)
    files(tmp_path, "runs/jobs/net/train/weights/w.bin", "runs/mlartifacts/1/error.png", "runs/tiny/report/1.png")
    found = read(tmp_path, reading)
    assert (found.names, first.problems, found.problems) == (("apple", "pear"), (), ())
    assert found.fingerprint == first.fingerprint


@pytest.mark.parametrize("path", ["photos/train", "apple/train"])
def test_splits_below_another_folder_are_no_classes(tmp_path: Path, path: str) -> None:
    files(tmp_path, f"{path}/1.jpg", f"{path}/a/1.jpg", f"{path.partition('/')[0]}/val/1.jpg")
    with pytest.raises(Refused, match=f"has its splits below {path.partition('/')[0]}: {path}"):
        read(tmp_path)


@pytest.mark.parametrize("split", ["", "train/", "val/"])
def test_a_picture_beside_the_folders_of_classes_is_named(tmp_path: Path, split: str) -> None:
    whole = ("train/a/1.jpg", "val/a/2.jpg") if split else ("a/1.jpg",)
    found = read(files(tmp_path, *whole, f"{split}9.jpg", f"{split}README.md"), Reading(val=0))
    assert said(found) == {f"{split}9.jpg": "lies in no folder of a class: not used"}


def test_pictures_and_spreadsheets_beside_the_splits_are_named(tmp_path: Path) -> None:
    beside = ("b/3.jpg", "val_set/a/4.jpg", "notes/plan.txt", "labels.xlsx", "5.jpg")
    found = read(files(tmp_path, "train/a/1.jpg", "val/a/2.jpg", *beside))
    assert list(said(found)) == ["b", "val_set", "5.jpg", "labels.xlsx"]
    assert "its pictures are not used" in said(found)["b"]
    assert "its pictures are not used" in said(found)["val_set"]
    assert said(found)["5.jpg"].endswith("splits: not used")
    assert "save it as CSV" in said(found)["labels.xlsx"]


def test_a_picture_whose_name_is_refused_is_still_one_that_lies_there(tmp_path: Path) -> None:
    files(tmp_path, "b/1.jpg", "b/c/2\n.jpg", "b/.3.jpg", "b/runs/.leases/x", "b/runs/4.jpg")
    assert list(pictures_below(tmp_path, "b")) == ["b/1.jpg", "b/c/2\n.jpg"]


def test_photographs_of_telephones_are_named_with_what_to_do(tmp_path: Path) -> None:
    found = read(files(tmp_path, "train/a/1.jpg", "train/a/2.HEIC", "train/a/3.avif"))
    assert said(found) == dict.fromkeys(["train/a/2.HEIC", "train/a/3.avif"], UNREAD)


def test_photographs_of_telephones_above_the_folders_of_classes_are_named(tmp_path: Path) -> None:
    whole = files(tmp_path, "train/fruit/apple/1.jpg", "train/fruit/notes.txt", "val/fruit/apple/2.jpg")
    heic = ["train/fruit/I.heic", "val/fruit/I.HEIC"]
    found = read(files(whole, *heic))
    assert said(found) == dict.fromkeys(heic, UNREAD)
    assert all(flaw.skipped for flaw in found.problems)


@pytest.mark.parametrize(
    ("path", "what"),
    [("photos.zip", "is a zip"), ("list.xlsx", "is a spreadsheet"), ("val/a/1.jpg", "has val/, but no train/")],
)
def test_what_is_no_catalogue_is_said_by_its_kind(tmp_path: Path, path: str, what: str) -> None:
    with pytest.raises(Refused, match=what):
        read(files(tmp_path, path) / (path if "." in path.partition("/")[0] else ""))


def test_a_uri_is_sent_to_data_prepare() -> None:
    with pytest.raises(Refused, match="is a URI") as refused:
        read(Path("s3://bucket/photos"))
    assert refused.value.where == "s3://bucket/photos"
    assert "data prepare" in refused.value.advice

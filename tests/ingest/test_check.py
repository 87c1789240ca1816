"""check: every case of a catalogue in which nearly everything is wrong, and what is right is not blamed."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from aliprod.errors import Failed
from aliprod.ingest.check import Report, check


@pytest.fixture(scope="module")
def broken(shared: Path) -> Report:
    return check(shared / "data/broken", 1)


def cases(shared: Path, *expect: str) -> list[dict[str, Any]]:
    found = json.loads((shared / "data/broken/expected.json").read_text())["cases"]
    return [case for case in found if case["expect"] in expect]


def said_of(report: Report, case: dict[str, Any]) -> list[str]:
    """The problems of a case's file, or of its id where the row says no class that could be its folder."""
    folder = case["split"] if case["class_id"] is None else f"{case['split']}/{int(case['class_id']):05d}"
    exact = [p.problem for p in report.problems if p.path == f"{folder}/{case['image_id']}"]
    return exact or [p.problem for p in report.problems if p.path == f"{case['split']}/{case['image_id']}"]


REMARKS = {  # of pictures that are used all the same
    "animated GIF named .jpg": "animated",
    "row twice": "more than once",
    "one picture, two labels": "two labels",
    "one id, two classes": "several classes",
}


def test_what_is_to_be_skipped_is_named_with_its_reason(shared: Path, broken: Report) -> None:
    skipped = cases(shared, "skip")
    assert len(skipped) > 20
    for case in skipped:
        said = said_of(broken, case)
        assert said, case
        assert all(text.strip() for text in said), case


def test_what_is_to_be_read_is_blamed_for_nothing_but_what_the_readme_says(shared: Path, broken: Report) -> None:
    for case in cases(shared, "read"):
        said = said_of(broken, case)
        if case["case"] == "in train and in val":
            assert ["leak" in text for text in said] == ([True] if case["split"] == "val" else []), "told once"
        elif remark := REMARKS.get(case["case"]):
            assert any(remark in text for text in said), case
        else:
            assert not said, case


def test_what_is_readable_is_counted(shared: Path, broken: Report) -> None:
    certain, perhaps = len(cases(shared, "read")), len(cases(shared, "read or skip"))
    assert certain <= broken.readable <= certain + perhaps
    assert broken.readable < broken.images
    assert broken.classes == 5


def test_test_rows_are_named_and_said_to_be_predicted(shared: Path, broken: Report) -> None:
    for case in cases(shared, "predict"):
        assert any("predicted" in text for text in said_of(broken, case)), case


def test_pictures_beside_the_catalogue_are_counted(shared: Path, broken: Report) -> None:
    (ignored,) = cases(shared, "ignore")
    (said,) = [p.problem for p in broken.problems if "not listed" in p.problem]
    assert said.startswith("1 picture")
    assert ignored["image_id"] in said


def test_the_trees_faults_are_named(shared: Path, broken: Report) -> None:
    said = [p.problem for p in broken.problems if p.path == "product_tree.json"]
    for case in cases(shared, "report"):
        assert any(case["class_id"] in text for text in said), case


def test_a_pair_is_named_from_both_sides(broken: Report) -> None:
    said = {p.path: p.problem for p in broken.problems if "two labels" in p.problem}
    assert "1100018" in said["train/00003/1100017.jpg"]
    assert "1100017" in said["train/00004/1100018.jpg"]


def test_the_report_is_json_as_the_command_promises(broken: Report) -> None:
    text = json.loads(json.dumps(broken.as_json()))
    assert set(text) == {"images", "readable", "problems", "classes", "train", "val", "test", "notes"}
    assert text["images"] == text["train"] + text["val"] + text["test"]
    assert all(set(problem) == {"path", "problem"} for problem in text["problems"])


def test_healthy_photographs_have_no_problem_and_processes_change_nothing(shared: Path) -> None:
    alone, together = (check(shared / "data/tiny", processes) for processes in (1, 2))
    assert alone == together
    assert alone.images == alone.readable == 128
    assert alone.problems == ()


def test_broken_takes_less_than_a_minute_and_a_gigabyte(shared: Path) -> None:
    code = (  # the peak is not ru_maxrss, which begins with the parent's
        "import sys; from pathlib import Path; from aliprod.ingest.check import check; check(Path(sys.argv[1]), 1); "
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    began = time.monotonic()
    command = [sys.executable, "-W", "error", "-c", code, str(shared / "data/broken")]
    kilobytes = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert time.monotonic() - began < 60
    assert kilobytes < 1_000_000


def picture(path: Path, colour: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), colour).save(path, "PNG")


def test_the_kind_of_a_twin_is_told_apart(tmp_path: Path) -> None:
    for name, colour in (("train/1/a", "red"), ("train/1/b", "red"), ("train/1/c", "blue"), ("train/2/d", "blue")):
        picture(tmp_path / f"{name}.png", colour)
    for name, colour in (("train/2/e", "green"), ("test/f", "green"), ("train/2/g", "black"), ("train/2/h", "white")):
        picture(tmp_path / f"{name}.png", colour)
    said = {p.path: p.problem for p in check(tmp_path, 1).problems}
    assert said == {
        "train/1/a.png": "has the bytes of train/1/b.png: the same picture twice",
        "train/1/b.png": "has the bytes of train/1/a.png: the same picture twice",
        "train/1/c.png": "has the bytes of train/2/d.png: one picture, two labels",
        "train/2/d.png": "has the bytes of train/1/c.png: one picture, two labels",
        "test/f.png": "has the bytes of train/2/e.png: a leak between test and train",
    }


def test_pictures_of_a_storage_folder_are_not_missed_in_the_list(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "runs/mlartifacts/1/error.png", "old/c.png"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((64, 64), 20 + len(name)).save(tmp_path / "photos" / name)
    (tmp_path / "photos" / "runs" / ".leases").mkdir()
    (tmp_path / "train.csv").write_text("path,class\nphotos/a.png,a\nphotos/b.png,b\n")
    said = [flaw.problem for flaw in check(tmp_path, 1).problems if "not listed" in flaw.problem]
    assert said == ["1 picture is not listed and not used: photos/old/c.png"]


def test_a_class_of_which_nothing_can_be_read_is_named(tmp_path: Path) -> None:
    picture(tmp_path / "train/1/a.png", "red")
    (tmp_path / "train/2").mkdir()
    (tmp_path / "train/2/b.png").write_bytes(b"")
    said = {p.path: p.problem for p in check(tmp_path, 1).problems}
    assert said["train"].endswith(": 2")
    assert "empty" in said["train/2/b.png"]


def test_a_link_out_of_the_catalogue_is_named_and_not_followed(tmp_path: Path) -> None:
    picture(tmp_path / "other/secret.png", "red")
    picture(tmp_path / "catalogue/train/1/a.png", "blue")
    (tmp_path / "catalogue/train/1/b.png").symlink_to(tmp_path / "other/secret.png")
    report = check(tmp_path / "catalogue", 1)
    assert [p.path for p in report.problems] == ["train/1/b.png"]
    assert report.readable == 1


def test_a_process_that_dies_ends_the_check_in_one_sentence(shared: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        checked = pool.submit(check, shared / "data/tiny", 2)
        while len(children := multiprocessing.active_children()) < 2:
            time.sleep(0.01)
        os.kill(children[0].pid or 0, 9)
        with pytest.raises(Failed, match="fewer processes") as failed:
            checked.result(timeout=60)
    assert failed.value.where.startswith(str((shared / "data/tiny/train").resolve()))

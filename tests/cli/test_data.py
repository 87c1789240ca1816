"""Catalogues: made, checked."""

import json
from pathlib import Path

from shop import aliprod, answer, refusal


def test_data_synth_tells_what_it_rendered(tmp_path: Path) -> None:
    told = answer("data", "synth", tmp_path / "photos", "--classes", "2", "--images", "11", "--seed", "4")
    counts = {
        split: len(json.loads((tmp_path / "photos" / f"{split}.json").read_text())["images"])
        for split in ("train", "val", "test")
    }
    assert told == {"path": str(tmp_path / "photos"), "classes": 2, **counts}
    assert counts["train"] == 11


def test_data_check_lists_every_problem_and_succeeds(shared: Path) -> None:
    told = answer("data", "check", shared / "data" / "broken")
    assert set(told) == {"images", "readable", "problems", "classes", "train", "val", "test", "notes"}
    assert 0 < told["readable"] < told["images"]
    assert {frozenset(problem) for problem in told["problems"]} == {frozenset({"path", "problem"})}
    assert "problems." in aliprod("data", "check", shared / "data" / "broken").stdout.splitlines()[-1]


def test_data_check_of_what_is_no_catalogue_is_refused(tmp_path: Path) -> None:
    assert "holds no catalogue" in refusal(2, "data", "check", tmp_path)
    assert "is not there" in refusal(2, "data", "check", tmp_path / "none")


def test_data_synth_does_not_write_over_what_is_there(photos: Path) -> None:
    before = (photos / "train.json").read_bytes()
    assert str(photos) in refusal(2, "data", "synth", photos)
    assert (photos / "train.json").read_bytes() == before

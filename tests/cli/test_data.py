"""Catalogues: made, checked."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from shop import Shop, aliprod, answer, refusal

from aliprod.catalogue import sources
from aliprod.ensemble.add import write_ensemble
from aliprod.inference import probabilities


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


def test_data_check_is_told_how_to_read_and_strict_fails_on_a_problem(tmp_path: Path) -> None:
    for number in range(8):
        Image.effect_noise((32, 32), 20 + number).save(tmp_path / f"{number}.png")
    rows = "".join(f"{number}.png,{'ab'[number % 2]},x\n" for number in range(8))
    (tmp_path / "all.csv").write_text(f"what,shows,label\n{rows}")
    columns = ("--column", "path=what", "--column", "class=shows")
    told = answer("data", "check", tmp_path, *columns, "--val", "0.25", "--strict")
    assert (told["train"], told["val"], told["classes"], told["problems"]) == (6, 2, 2, [])
    assert "held out" in " ".join(told["notes"])
    (tmp_path / "0.png").write_bytes(b"")
    result = aliprod("data", "check", tmp_path, *columns, "--strict")
    assert (result.exit_code, result.stdout.splitlines()[-1].endswith(" 1 problem.")) == (1, True)
    assert "did you mean" in refusal(2, "data", "check", tmp_path, "--column", "path=wat").lower()
    assert "--column paht" in refusal(2, "data", "check", tmp_path, "--column", "paht=what")


def test_data_check_of_a_plan_names_the_labels_that_its_ensemble_doubts(shop: Shop, photos: Path) -> None:
    assert answer("data", "check", shop.plan) == answer("data", "check", photos)  # nothing is trained yet
    assert "[catalogue]" in refusal(2, "data", "check", shop.plan, "--val", "0.2")
    catalogue = sources.read(photos)
    truth = catalogue.test_labels
    assert truth is not None
    rows = np.full((len(truth), catalogue.num_classes), 0.1, np.float32)
    rows[np.arange(len(truth)), truth] = 0.8  # three classes
    rows[0] = np.roll(rows[0], 1)
    given = [torch.from_numpy(rows)]
    member = shop.folder / "member"
    probabilities.write(member, catalogue.test.ids.to_pylist(), catalogue.classes, lambda missing: given)
    write_ensemble(shop.storage / "shop" / "ensemble", [probabilities.open_store(member)], record={"split": "test"})
    told = answer("data", "check", shop.plan, "--storage", shop.storage, "--strict", status=1)["problems"][-1]
    own, other = (catalogue.name(int(label)) for label in (truth[0], rows[0].argmax()))
    assert told["path"] == catalogue.test.paths[0].as_py()
    assert told["problem"] == f"its label {own} may be wrong: the ensemble is 80% sure of {other}"


def test_data_check_of_a_plan_reads_the_table_that_the_plan_names(shop: Shop) -> None:
    for number in range(8):
        Image.effect_noise((32, 32), 20 + number).save(shop.folder / f"{number}.png")
    rows = [f"{number}.png,{'ab'[number % 2]},x\n" for number in range(8)]
    (shop.folder / "mine.csv").write_text("what,shows,label\n" + "".join(rows))
    (shop.folder / "train.csv").write_text("path,class\n" + "".join(row.rpartition(",")[0] + "\n" for row in rows[:3]))
    shop.write('path = "photos"', 'path = "mine.csv"\ncolumns = { path = "what", class = "shows" }\nval = 0.25')
    told = answer("data", "check", shop.plan)
    assert (told["train"], told["val"], told["classes"], told["problems"]) == (6, 2, 2, [])


@pytest.mark.parametrize("odd", ["\x1b[31m", "\r", "\n", "\x9b", "\u202e"])
def test_an_odd_name_of_a_picture_forges_no_line_and_such_a_class_is_refused(tmp_path: Path, odd: str) -> None:
    photos, shown = tmp_path / "photos", f"\\u{ord(odd[0]):04x}{odd[1:]}"
    for name in ("a", "b"):
        (photos / name).mkdir(parents=True)
        Image.effect_noise((32, 32), 20).save(photos / name / "one.png")
        (photos / name / f"x{odd}.png").write_bytes(b"no picture")
    told = aliprod("data", "check", photos).stdout
    assert f"x{shown}.png: " in told
    assert told.replace("\n", "").isprintable()
    assert "problems." in told.splitlines()[-1]
    (photos / "product_tree.json").write_text(json.dumps([{"name": f"tea{odd}", "class_id": 0}]))
    (photos / "train.csv").write_text("path,class\na/one.png,0\nb/one.png,1\n")
    if odd != "\u202e":  # a mark that languages need
        assert f"control character: tea{shown}" in refusal(2, "data", "check", photos)

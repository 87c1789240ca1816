"""A submission or a folder of probabilities against labels, in every form that each may have."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aliprod.catalogue.annotations import name_fault
from aliprod.ensemble.add import submission, write_ensemble
from aliprod.ensemble.evaluate import evaluate, fitted_on_these
from aliprod.errors import Refused
from aliprod.inference import probabilities
from aliprod.store import commit

IMAGES = ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]
LABELS = [3, 3, 3, 8]
PREDICTED = [3, 3, 8, 3]  # a third of class 3 is wrong, all of class 8
EXPECTED = {"top1_error": pytest.approx((1 / 3 + 1) / 2), "top1_error_per_image": 0.5, "images": 4, "classes": 2}


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    """As a catalogue has them, in another order."""
    rows = [{"image_id": i, "class_id": f"{c:05d}"} for i, c in zip(IMAGES[::-1], LABELS[::-1], strict=True)]
    (tmp_path / "test_labels.json").write_text(json.dumps({"images": rows}))
    return tmp_path / "test_labels.json"


@pytest.fixture
def predictions(tmp_path: Path) -> Path:
    (tmp_path / "submission.csv").write_text(submission(IMAGES, PREDICTED))
    return tmp_path / "submission.csv"


def store(folder: Path) -> probabilities.Probabilities:
    rows = torch.tensor([[0.0, 1.0] if guess == 3 else [1.0, 0.0] for guess in PREDICTED])
    probabilities.write(folder, IMAGES, [8, 3], lambda _: [rows], record={"split": "test"})
    return probabilities.open_store(folder)


def test_a_submission_against_the_labels_of_a_catalogue(predictions: Path, labels: Path) -> None:
    assert evaluate(predictions, labels) == EXPECTED


@pytest.mark.parametrize(("name", "between"), [("labels.csv", ","), ("labels.csv", ";"), ("labels.tsv", "\t")])
@pytest.mark.parametrize("header", ["id,class_id", "split,class_id,id"])
def test_labels_may_be_a_table(predictions: Path, tmp_path: Path, header: str, name: str, between: str) -> None:
    with (tmp_path / name).open("w", newline="", encoding="utf-8-sig") as file:
        table = csv.DictWriter(file, header.split(","), delimiter=between)
        table.writeheader()
        table.writerows(
            {"id": i, "class_id": c} | ({"split": "test"} if "split" in header else {})
            for i, c in zip(IMAGES, LABELS, strict=True)
        )
    assert evaluate(predictions, tmp_path / name) == EXPECTED


def test_a_members_probabilities_and_an_ensemble_are_judged_by_their_highest_class(
    tmp_path: Path, labels: Path
) -> None:
    member = store(tmp_path / "store")
    write_ensemble(tmp_path / "ensemble", [member, member], record={"split": "test"})
    assert evaluate(tmp_path / "store", labels) == EXPECTED
    assert evaluate(tmp_path / "ensemble", labels) == EXPECTED


@pytest.mark.parametrize(
    ("split", "temperatures", "fitted"), [("val", [0.9], True), ("val", [], False), ("test", [0.9], False)]
)
def test_an_ensemble_that_was_fitted_on_what_it_predicts_is_known(
    split: str, temperatures: list[float], fitted: bool, tmp_path: Path
) -> None:
    record = {"split": split, "members": [{"temperature": one} for one in temperatures]}
    commit.write(tmp_path / "ensemble", lambda new: None, record)
    assert fitted_on_these(tmp_path / "ensemble") == fitted
    assert not fitted_on_these(tmp_path / "submission.csv")


def test_images_without_a_label_are_left_out(predictions: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("id,class_id\na.jpg,3\nd.jpg,8\n")
    assert evaluate(predictions, tmp_path / "labels.csv") == {
        "top1_error": 0.5,
        "top1_error_per_image": 0.5,
        "images": 2,
        "classes": 2,
    }


@pytest.mark.parametrize("left", [1, 2, 3])
def test_labelled_images_without_a_prediction_are_counted_and_named(tmp_path: Path, labels: Path, left: int) -> None:
    (tmp_path / "short.csv").write_text(submission(IMAGES[:left], PREDICTED[:left]))
    with pytest.raises(Refused, match=f"no prediction of {4 - left} of the 4 images") as refused:
        evaluate(tmp_path / "short.csv", labels)
    assert all(name in str(refused.value) for name in IMAGES[left:])
    assert "short.csv" in str(refused.value)


names = st.text(min_size=1, max_size=20).filter(lambda name: name_fault(name) == "")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(images=st.lists(names, min_size=1, max_size=5, unique=True))
def test_whatever_an_image_is_called_its_line_is_found(tmp_path: Path, images: list[str]) -> None:
    (tmp_path / "submission.csv").write_text(submission(images, range(len(images))), encoding="utf-8", newline="")
    rows = [{"image_id": name, "class_id": place} for place, name in enumerate(images)]
    (tmp_path / "labels.json").write_text(json.dumps({"images": rows}))
    found = evaluate(tmp_path / "submission.csv", tmp_path / "labels.json")
    assert found == {"top1_error": 0, "top1_error_per_image": 0, "images": len(images), "classes": len(images)}


WRONG: dict[str, tuple[str, str]] = {
    "id,label\na.jpg,3\n": ("has no columns id and predicted", "Its first line is id, label."),
    "": ("has no columns id and predicted", ""),
    "id,predicted\na.jpg,3\nb.jpg,banana\n": ('predicted "banana" is no class id', "line 3"),
    "id,predicted\na.jpg\n": ("is no class id", "line 2"),
    "id,predicted\na.jpg,-3\n": ('predicted "-3" is no class id', "line 2"),
    "id,predicted\na.jpg,3\nb.jpg,3\na.jpg,8\n": ("a.jpg twice", "line 4"),
    "id,predicted\nz.jpg,3\n": ("has a label", "ending included"),
    'id,predicted\n"a.jpg,3\n': ("is not CSV", "line 2"),
    f"id,predicted\n{'a' * 200_000},3\n": ("is not CSV", "line 2"),
}


@pytest.mark.parametrize("text", WRONG, ids=lambda text: text[:40])
def test_a_submission_that_is_none_is_refused_with_its_line(tmp_path: Path, labels: Path, text: str) -> None:
    (tmp_path / "wrong.csv").write_text(text)
    what, also = WRONG[text]
    with pytest.raises(Refused) as refused:
        evaluate(tmp_path / "wrong.csv", labels)
    assert what in str(refused.value)
    assert also in str(refused.value)
    assert "wrong.csv" in str(refused.value)


def test_what_is_not_there_or_is_no_table_is_refused(tmp_path: Path, predictions: Path, labels: Path) -> None:
    (tmp_path / "latin.csv").write_bytes("id,predicted\nä.jpg,3\n".encode("latin-1"))
    (tmp_path / "empty").mkdir()
    cases: list[tuple[Any, Any, str]] = [
        (tmp_path / "none.csv", labels, "there is no such file or folder"),
        (predictions, tmp_path / "none.json", "cannot be read"),
        (predictions, tmp_path / "none.csv", "cannot be read"),
        (predictions, tmp_path / "empty", "cannot be read"),
        (tmp_path / "empty", labels, "holds neither an ensemble nor probabilities"),
        (tmp_path / "latin.csv", labels, "is not UTF-8"),
        (predictions, predictions, "has no columns id and class_id"),
    ]
    for given_predictions, given_labels, what in cases:
        with pytest.raises(Refused, match=what):
            evaluate(given_predictions, given_labels)

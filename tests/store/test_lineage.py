"""trace: a submission tells what it was made of, by its bytes alone."""

import json
from pathlib import Path

import pytest

from aliprod.errors import Refused
from aliprod.store import lineage

ORIGIN = {"members": {"net/full": {"weights": "ab"}}, "plan": {"name": "shop"}}


@pytest.fixture
def submission(tmp_path: Path) -> Path:
    path = tmp_path / "storage" / "shop" / "submission.csv"
    path.parent.mkdir(parents=True)
    path.write_text("id,predicted\na.jpg,1\n")
    lineage.keep(path, ORIGIN)
    return path


def test_a_copy_elsewhere_is_traced_to_the_plan_that_wrote_it(submission: Path, tmp_path: Path) -> None:
    copy = tmp_path / "mailed.csv"
    copy.write_bytes(submission.read_bytes())
    assert lineage.find(copy, tmp_path / "storage") == ORIGIN


def test_one_that_was_overwritten_since_is_still_known(submission: Path, tmp_path: Path) -> None:
    old = tmp_path / "old.csv"
    old.write_bytes(submission.read_bytes())
    submission.write_text("id,predicted\na.jpg,2\n")
    lineage.keep(submission, ORIGIN | {"plan": {"name": "later"}})
    assert lineage.find(old, tmp_path / "storage") == ORIGIN
    assert lineage.find(submission, tmp_path / "storage")["plan"] == {"name": "later"}


def test_bytes_that_two_plans_wrote_are_traced_to_the_one_whose_file_it_is(submission: Path, tmp_path: Path) -> None:
    other = tmp_path / "storage" / "before" / "submission.csv"
    other.parent.mkdir()
    other.write_bytes(submission.read_bytes())
    lineage.keep(other, ORIGIN | {"plan": {"name": "before"}})
    found = [lineage.find(file, tmp_path / "storage")["plan"]["name"] for file in (submission, other)]
    assert found == ["shop", "before"]


def test_a_changed_byte_is_refused_and_nothing_is_guessed(submission: Path, tmp_path: Path) -> None:
    submission.write_text("id,predicted\na.jpg,3\n")
    with pytest.raises(Refused, match=r"submission\.csv: no plan in .* has written these bytes\.\n  1 are known there"):
        lineage.find(submission, tmp_path / "storage")


@pytest.mark.parametrize("name", ["missing.csv", "."])
def test_what_cannot_be_read_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(Refused, match="cannot be read"):
        lineage.find(tmp_path / name, tmp_path)


def test_no_password_of_an_address_is_kept_or_shown(submission: Path, tmp_path: Path) -> None:
    told = ORIGIN | {"settings": {"tracking_uri": "https://me:s3cr@t@host/x", "path": "s3://shop/a@b"}}
    expected = ORIGIN | {"settings": {"tracking_uri": "https://host/x", "path": "s3://shop/a@b"}}
    lineage.keep(submission, told)
    (record,) = (tmp_path / "storage").glob("shop/submissions/*.json")
    assert "s3cr" not in record.read_text()
    record.write_text(json.dumps(told))  # as it was written before
    assert lineage.find(submission, tmp_path / "storage") == expected

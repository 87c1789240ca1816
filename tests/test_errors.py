"""errors: they say what, where and what to do, in every process."""

import pickle
from pathlib import Path

import pytest

from aliprod.errors import (
    AliprodError,
    Failed,
    NonFiniteLoss,
    Refused,
    StorageFull,
    Unreachable,
    did_you_mean,
    listing,
    near_file,
)  # fmt: skip


@pytest.mark.parametrize("kind", [Refused, Unreachable, Failed, StorageFull, NonFiniteLoss])
def test_an_error_survives_the_way_from_another_process(kind: type[AliprodError]) -> None:
    error = kind("is wrong.", "plan.toml, line 3", "Say it right.\nOr leave it.")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == "plan.toml, line 3: is wrong.\n  Say it right.\n  Or leave it."
    assert (copy.what, copy.where, copy.advice) == (error.what, error.where, error.advice)


@pytest.mark.parametrize("advice", ["", "Say it right.", "Say it right.\nOr leave it."])
def test_what_was_printed_elsewhere_is_printed_again_with_its_lines(advice: str) -> None:
    error = Refused("is wrong.", "plan.toml, line 3", advice)
    assert str(Failed.printed(str(error))) == str(error)


def test_an_error_without_place_or_advice_is_one_sentence() -> None:
    assert str(Failed("It broke.")) == "It broke."


def test_exit_codes_are_those_of_the_interface() -> None:
    kinds = (Failed, StorageFull, NonFiniteLoss, Refused, Unreachable)
    assert [kind("").status for kind in kinds] == [1, 1, 1, 2, 3]


def test_a_file_is_not_taken_for_a_misspelling_of_itself(tmp_path: Path) -> None:
    for name in ("runs", "run"):
        (tmp_path / name).mkdir()
    assert near_file(tmp_path / "runs") == "Did you mean run?"
    (tmp_path / "run").rmdir()
    assert near_file(tmp_path / "runs") == ""


def test_a_near_name_is_suggested_and_a_far_one_is_not() -> None:
    assert did_you_mean("epohcs", ["crop", "epochs", "lr"]) == "Did you mean epochs?"
    assert did_you_mean("zebra", ["crop", "epochs", "lr"]) == ""


def test_a_long_list_is_cut() -> None:
    assert listing("abc") == "a, b, c"
    assert listing("abcd", 2) == "a, b, ..."


def test_the_nearest_file_beside_a_misspelt_one_is_suggested(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "shop.toml").touch()
    assert near_file(tmp_path / "phots") == "Did you mean photos?"
    assert near_file(tmp_path / "phots", "*.toml") == ""
    assert near_file(tmp_path / "nowhere" / "shop.toml") == ""

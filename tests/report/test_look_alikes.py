"""Copies across splits are found, and what would take hours is not begun."""

import shutil
from pathlib import Path

import pytest

from aliprod.catalogue.catalogue import Catalogue
from aliprod.catalogue.sources import read
from aliprod.data.duplicates import write_hashes
from aliprod.report import error_analysis


@pytest.fixture
def copied(packages: Catalogue, tmp_path: Path) -> Catalogue:
    """A catalogue whose first test picture is its fourth training picture."""
    shutil.copytree(packages.root, tmp_path / "photos")
    found = read(tmp_path / "photos")
    shutil.copyfile(found.train.path(3), found.test.path(0))
    return found


def test_a_copy_is_the_first_pair_and_hashes_of_a_run_find_the_same(copied: Catalogue, tmp_path: Path) -> None:
    pairs, looked = error_analysis.look_alikes(copied, copied.test, tmp_path)
    assert looked == len(copied.test)
    assert (pairs[0].row, pairs[0].bits) == (0, 0)
    assert copied.train.path(pairs[0].twin).read_bytes() == copied.test.path(0).read_bytes()
    assert [pair.bits for pair in pairs] == sorted(pair.bits for pair in pairs)
    write_hashes(tmp_path / "hashes" / copied.fingerprint, copied.train, 0)
    assert error_analysis.look_alikes(copied, copied.test, tmp_path) == (pairs, looked)


def test_too_many_pictures_are_not_read(copied: Catalogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(error_analysis, "_HASHED", len(copied.train) - 1)
    assert error_analysis.look_alikes(copied, copied.test, tmp_path) == ([], 0)
    write_hashes(tmp_path / "hashes" / copied.fingerprint, copied.train, 0)
    monkeypatch.setattr(error_analysis, "_LOOKED", 5)
    assert error_analysis.look_alikes(copied, copied.test, tmp_path)[1] == 5

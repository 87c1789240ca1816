"""What is checked before a GPU is held, and what is not checked twice."""

import shutil
from pathlib import Path

import pytest

from aliprod.build.preflight import check_backbones, check_catalogue, make_first
from aliprod.build.target import Site
from aliprod.catalogue.catalogue import Catalogue
from aliprod.catalogue.sources import Reading, read
from aliprod.errors import Refused
from aliprod.plan.load import load
from aliprod.synth.synth import synthesise
from tests.conftest import open_file

PLAN = """\
format = 1
name = "checked"
catalogue = { path = "photos" }
backbones = { net = "test_vit.r160_in1k" }
defaults = { resize = 180, crop = 160 }
stages = { full = {} }
jobs = { net = ["full"] }
ensemble = { members = ["net/full"] }
"""


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ALIPROD_CACHE", str(tmp_path / "cache"))
    synthesise(tmp_path / "photos", classes=2, images=10, seed=0)
    (tmp_path / "plan.toml").write_text(PLAN)

    def checked(*sets: str) -> None:
        opened = open_file(tmp_path / "plan.toml", tmp_path / "runs", sets)
        make_first(opened, [], Site.of(opened))

    return checked


def test_what_has_passed_is_not_asked_again_and_what_is_new_or_was_refused_is(
    check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check()
    refused, new = "defaults.crop=161", "stages.full.objective='dcl'"
    with pytest.raises(Refused, match="takes no images of 161 x 161 pixels"):
        check(refused)
    (tmp_path / "broken" / "timm").mkdir(parents=True)
    (tmp_path / "broken" / "timm" / "__init__.py").write_text("raise ImportError('asked again')")
    monkeypatch.syspath_prepend(tmp_path / "broken")  # of processes that are started from now on
    check()
    check("stages.full.epochs=7")
    for other in (refused, new):
        with pytest.raises(ImportError, match="asked again"):
            check(other)


def test_a_network_of_one_size_takes_no_other_in_tests(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text(PLAN)
    with pytest.raises(Refused, match="built for images of one size, not 160, 144") as refused:
        check_backbones(load(tmp_path / "plan.toml", ["stages.full.test_crop=144"]))
    assert "Leave crops and test_crop out" in refused.value.advice


def test_photographs_of_which_most_cannot_be_read_are_refused_before_a_training(
    packages: Catalogue, tmp_path: Path
) -> None:
    shutil.copytree(packages.root, tmp_path / "photos")
    catalogue = read(tmp_path / "photos")
    rows = range(len(catalogue.train))
    for row in rows[::4]:  # these are replaced by others of their class
        catalogue.train.path(row).write_bytes(b"")
    check_catalogue(catalogue, tmp_path)
    for row in rows[1:]:
        catalogue.train.path(row).unlink(missing_ok=True)
    with pytest.raises(Refused, match=r"24 of 24 training pictures .* cannot be read: .* is empty") as refused:
        check_catalogue(catalogue, tmp_path)
    assert "data check" in refused.value.advice


def test_a_catalogue_of_one_class_is_refused_with_its_name(tmp_path: Path) -> None:
    for name in ("1.jpg", "2.jpg"):
        (tmp_path / "apple").mkdir(exist_ok=True)
        (tmp_path / "apple" / name).write_bytes(b"")
    catalogue = read(tmp_path, Reading(val=0))
    with pytest.raises(Refused, match="one class, apple") as refused:
        check_catalogue(catalogue, tmp_path)
    assert "data check" in refused.value.advice

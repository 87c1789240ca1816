"""Catalogues without validation or without test images: what a run says of them, and its result."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from aliprod.catalogue.catalogue import Catalogue
from aliprod.cli import app
from tests.conftest import make_all, open_file

pytestmark = pytest.mark.usefixtures("torch_as_before")
PLAN = """\
format = 1
name = "tiny"
catalogue = { path = "photos" }
backbones = { net = "test_efficientnet.r160_in1k" }
defaults = { resize = 40, crop = 32, batch_size = 8 }
stages = { full = { epochs = 3 } }
jobs = { net = ["full"] }
ensemble = { members = ["net/full"] }
cluster = { use_gpu = false }
"""


def run_without(packages: Catalogue, folder: Path, *missing: str) -> tuple[str, dict[str, Any]]:
    """What a run on a catalogue prints, and its result, once these of its files are gone. What it would make on Ray is
    there by then."""
    shutil.copytree(packages.root, folder / "photos")
    for name in missing:
        (folder / "photos" / name).unlink()
    (folder / "tiny.toml").write_text(PLAN)
    make_all(open_file(folder / "tiny.toml", folder / "storage"))
    ran = CliRunner().invoke(app, ["run", str(folder / "tiny.toml"), "--storage", str(folder / "storage")])
    assert ran.exit_code == 0, ran.output
    return ran.output, json.loads((folder / "storage" / "tiny" / "result.json").read_text())["ensemble"]


def test_without_val_the_last_checkpoint_is_the_member_and_the_run_says_so(packages: Catalogue, tmp_path: Path) -> None:
    said, result = run_without(packages, tmp_path, "val.json", "test_labels.json")
    assert "There are no val images: the last checkpoint of each job is its member." in said
    [config] = (tmp_path / "storage").glob("jobs/*/*/*/weights/config.json")
    assert json.loads(config.read_text())["epoch"] == 2  # of epochs 0 to 2
    assert result["split"] is None
    assert result["top1_error"] is None
    rows = list(csv.DictReader(Path(result["submission"]).read_text(encoding="utf-8").splitlines()))
    test = json.loads((tmp_path / "photos" / "test.json").read_text())["images"]
    assert {row["id"] for row in rows} == {image["image_id"] for image in test}


def test_without_test_the_ensemble_is_of_val_and_no_submission_is_written(packages: Catalogue, tmp_path: Path) -> None:
    said, result = run_without(packages, tmp_path, "test.json", "test_labels.json")
    assert "Submission: none, as there are no test images" in said
    assert result["submission"] is None
    assert result["split"] == "val"
    assert result["top1_error"] == pytest.approx(result["members"]["net/full"]["top1_error"])
    assert not (tmp_path / "storage" / "tiny" / "submission.csv").exists()

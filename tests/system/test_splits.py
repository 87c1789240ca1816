"""Catalogues without validation or without test images, on a real Ray."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

ONE_JOB = ("--set", 'jobs={efficientnet=["full"]}', "--set", 'ensemble.members=["efficientnet/full"]')


def run_without(cluster: Any, plan: Path, folder: Path, *missing: str) -> tuple[str, dict[str, Any]]:
    """What a run on a catalogue prints, and its result, once these of its files are gone."""
    shutil.copytree(plan.parent / "catalogue", folder / "catalogue")
    shutil.copy(plan, folder / plan.name)
    for name in missing:
        (folder / "catalogue" / name).unlink()
    ran = cluster.aliprod("run", folder / plan.name, "--storage", folder / "storage", *ONE_JOB)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout, json.loads((folder / "storage" / "tiny" / "result.json").read_text())["ensemble"]


def test_without_val_the_last_checkpoint_is_the_member_and_the_run_says_so(
    cluster: Any, plan: Path, tmp_path: Path
) -> None:
    said, result = run_without(cluster, plan, tmp_path, "val.json", "test_labels.json")
    assert "There are no val images: the last checkpoint of each job is its member." in said
    [config] = (tmp_path / "storage").glob("jobs/*/*/*/weights/config.json")
    assert json.loads(config.read_text())["epoch"] == 2  # of epochs 0 to 2
    assert result["split"] is None
    assert result["top1_error"] is None
    rows = list(csv.DictReader(Path(result["submission"]).read_text(encoding="utf-8").splitlines()))
    test = json.loads((tmp_path / "catalogue" / "test.json").read_text())["images"]
    assert {row["id"] for row in rows} == {image["image_id"] for image in test}


def test_without_test_the_ensemble_is_of_val_and_no_submission_is_written(
    cluster: Any, plan: Path, tmp_path: Path
) -> None:
    said, result = run_without(cluster, plan, tmp_path, "test.json", "test_labels.json")
    assert "Submission: none, as there are no test images" in said
    assert result["submission"] is None
    assert result["split"] == "val"
    assert result["top1_error"] == pytest.approx(result["members"]["efficientnet/full"]["top1_error"])
    assert not (tmp_path / "storage" / "tiny" / "submission.csv").exists()

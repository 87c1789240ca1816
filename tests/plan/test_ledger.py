"""What is finished is what is committed."""

from pathlib import Path
from typing import Any

import pytest

from aliprod.plan.graph import Job, jobs
from aliprod.plan.ledger import finished, folder
from aliprod.store import commit


@pytest.fixture
def job(load_text: Any, small: str) -> Job:
    return jobs(load_text(small), "0" * 64)["resnet/dcl"]


def test_a_jobs_folder_is_named_after_backbone_stage_and_key(job: Job, tmp_path: Path) -> None:
    assert folder(tmp_path, job) == tmp_path / "jobs" / "resnet" / "dcl" / str(job.key)


def test_a_job_without_a_key_has_no_folder_and_is_not_finished(load_text: Any, small: str, tmp_path: Path) -> None:
    keyless = jobs(load_text(small), None)["resnet/dcl"]
    assert finished(tmp_path, keyless) is None
    with pytest.raises(ValueError, match="no key"):
        folder(tmp_path, keyless)


def test_a_job_is_finished_when_its_weights_are_committed(job: Job, tmp_path: Path) -> None:
    assert finished(tmp_path, job) is None
    weights = folder(tmp_path, job) / "weights"
    weights.mkdir(parents=True)
    (weights / "model.safetensors").write_bytes(b"half")
    assert finished(tmp_path, job) is None
    commit.write(weights, lambda new: commit.write_file(new / "model.safetensors", b"whole"), {"top1_error": 0.1})
    assert finished(tmp_path, job) == {"top1_error": 0.1}
    (weights / "model.safetensors").write_bytes(b"cut")
    assert finished(tmp_path, job) is None

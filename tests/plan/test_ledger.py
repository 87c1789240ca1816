"""What is finished is what is committed; half a line of metrics harms nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aliprod import commit
from aliprod.plan.graph import Job, jobs
from aliprod.plan.ledger import epochs, finished, folder, progress


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
    commit.write(weights, lambda new: (new / "model.safetensors").write_bytes(b"whole"), {"top1_error": 0.1})  # type: ignore[arg-type,return-value]
    assert finished(tmp_path, job) == {"top1_error": 0.1}
    (weights / "model.safetensors").write_bytes(b"cut")
    assert finished(tmp_path, job) is None


def test_no_metrics_are_no_progress(tmp_path: Path) -> None:
    assert epochs(tmp_path) == []
    assert progress(tmp_path) is None


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(count=st.integers(1, 5), cut=st.integers(0, 200))
def test_a_file_cut_anywhere_tells_of_the_epochs_that_are_whole(tmp_path: Path, count: int, cut: int) -> None:
    records = [{"epoch": epoch, "time_ms": 1, "top1_error": 0.5} for epoch in range(count)]
    lines = [json.dumps(record) + "\n" for record in records]
    (tmp_path / "metrics.jsonl").write_text("".join(lines)[:cut])
    whole = sum(len("".join(lines[: n + 1])) - 1 <= cut for n in range(count))
    assert epochs(tmp_path) == records[:whole]
    assert progress(tmp_path) == (records[whole - 1] if whole else None)


def test_the_first_record_of_an_epoch_counts_and_what_is_no_record_is_skipped(tmp_path: Path) -> None:
    lines = ['{"epoch": 0, "loss": 1}', "[1]", '{"epo', '{"epoch": 1, "loss": 2}', '{"epoch": 0, "loss": 9}', "\udcff"]
    (tmp_path / "metrics.jsonl").write_bytes("\n".join(lines).encode(errors="surrogateescape"))
    assert epochs(tmp_path) == [{"epoch": 0, "loss": 1}, {"epoch": 1, "loss": 2}]

"""What a job's metrics.jsonl says; half a line harms nothing."""

import json
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aliprod.store.epochs import read


def test_a_file_that_is_not_there_tells_nothing(tmp_path: Path) -> None:
    assert read(tmp_path / "metrics.jsonl") == []


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(count=st.integers(1, 5), cut=st.integers(0, 200))
def test_a_file_cut_anywhere_tells_of_the_epochs_that_are_whole(tmp_path: Path, count: int, cut: int) -> None:
    records = [{"epoch": epoch, "time_ms": 1, "top1_error": 0.5} for epoch in range(count)]
    lines = [json.dumps(record) + "\n" for record in records]
    (tmp_path / "metrics.jsonl").write_text("".join(lines)[:cut])
    whole = sum(len("".join(lines[: n + 1])) - 1 <= cut for n in range(count))
    assert read(tmp_path / "metrics.jsonl") == records[:whole]


def test_the_first_record_of_an_epoch_counts_and_what_is_no_record_is_skipped(tmp_path: Path) -> None:
    lines = ['{"epoch": 0, "loss": 1}', "[1]", '{"epo', '{"epoch": 1, "loss": 2}', '{"epoch": 0, "loss": 9}', "\udcff"]
    (tmp_path / "metrics.jsonl").write_bytes("\n".join(lines).encode(errors="surrogateescape"))
    assert read(tmp_path / "metrics.jsonl") == [{"epoch": 0, "loss": 1}, {"epoch": 1, "loss": 2}]

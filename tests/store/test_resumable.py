"""resumable: rows of several arrays go on where a writer stopped. Kills at any moment: test_probabilities."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from aliprod.errors import StorageFull
from aliprod.store import commit
from aliprod.store.resumable import Block, ResumableRows, Rows, append

COUNT = 11
VALUES = {"numbers": np.arange(22).reshape(COUNT, 2), "halves": np.arange(11, dtype=np.float16).reshape(COUNT, 1)}


class Killed(BaseException):
    """Ends a writer."""


def resumable(folder: Path, weights: str = "1") -> ResumableRows:
    ids = pa.array([str(row) for row in range(COUNT)])
    return ResumableRows(folder, ids, np.arange(3), {"weights": weights}, per_shard=4)


def blocks(missing: Rows, stop: int = COUNT) -> Iterator[Block]:
    for row in missing:
        if row == stop:
            raise Killed
        yield {name: array[row : row + 1] for name, array in VALUES.items()}


def finished(rows: ResumableRows) -> list[int]:
    """The rows that were missing, written."""
    asked: list[int] = []

    def ask(missing: Rows) -> Iterator[Block]:
        asked.extend(missing.tolist())
        return blocks(missing)

    def fill(staging: Path) -> None:
        for name in VALUES:
            np.save(staging / f"{name}.npy", np.concatenate([np.load(file) for file in rows.files(name)]))

    assert rows.finish(ask, fill) == rows.record
    return asked


def test_every_array_goes_on_at_the_first_shard_that_is_not_finished(tmp_path: Path) -> None:
    rows = resumable(tmp_path / "rows")
    with pytest.raises(Killed):
        rows.finish(lambda missing: blocks(missing, stop=6), lambda _: None)
    assert finished(rows) == [4, 5, 6, 7, 8, 9, 10]
    assert list(tmp_path.iterdir()) == [tmp_path / "rows"]
    for name, array in VALUES.items():
        read = np.load(tmp_path / "rows" / f"{name}.npy")
        assert read.dtype == array.dtype
        assert np.array_equal(read, array)
    assert finished(rows) == []


def test_parts_write_each_its_own_shards_and_the_last_of_them_commits(tmp_path: Path) -> None:
    rows, asked = resumable(tmp_path / "rows"), list[list[int]]()

    def ask(missing: Rows) -> Iterator[Block]:
        asked.append(missing.tolist())
        return blocks(missing)

    def fill(staging: Path) -> dict[str, str]:
        return rows.link("numbers", staging) | rows.link("halves", staging)

    assert rows.finish(ask, fill, part=(1, 2)) == {}
    assert commit.read(tmp_path / "rows") is None
    assert resumable(tmp_path / "rows").finish(ask, fill, part=(0, 2)) == rows.record
    assert asked == [[4, 5, 6, 7], [0, 1, 2, 3, 8, 9, 10]]
    whole = resumable(tmp_path / "whole")
    whole.finish(blocks, lambda staging: whole.link("numbers", staging) | whole.link("halves", staging))
    for file in (tmp_path / "whole").glob("*.npy"):
        assert (tmp_path / "rows" / file.name).read_bytes() == file.read_bytes()


def test_a_part_that_was_stopped_goes_on_whatever_number_of_parts_there_is_then(tmp_path: Path) -> None:
    rows = resumable(tmp_path / "rows")
    with pytest.raises(Killed):
        rows.finish(lambda missing: blocks(missing, stop=9), lambda _: None, part=(0, 2))
    assert finished(resumable(tmp_path / "rows")) == [4, 5, 6, 7, 8, 9, 10]


def test_rows_of_another_record_are_written_anew_and_the_old_shards_swept(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        resumable(tmp_path / "rows").finish(lambda missing: blocks(missing, stop=6), lambda _: None)
    assert finished(resumable(tmp_path / "rows", weights="2")) == list(range(COUNT))
    assert list(tmp_path.iterdir()) == [tmp_path / "rows"]


def test_a_shard_whose_beginning_another_writer_sweeps_away_is_not_committed(tmp_path: Path) -> None:
    rows = resumable(tmp_path / "rows")

    def disturbed(missing: Rows) -> Iterator[Block]:
        for row, block in enumerate(blocks(missing)):
            if row == 6:
                resumable(tmp_path / "rows", weights="2")._sweep()
            yield block

    with pytest.raises(StorageFull):
        rows.finish(disturbed, lambda staging: rows.link("numbers", staging))
    assert commit.read(tmp_path / "rows") is None


def test_linked_files_have_the_digests_that_are_said(tmp_path: Path) -> None:
    rows = resumable(tmp_path / "rows")
    rows.finish(blocks, lambda staging: rows.link("numbers", staging))
    assert sorted(path.name for path in (tmp_path / "rows").glob("*.npy")) == [f"numbers-0000{n}.npy" for n in range(3)]
    assert commit.verify(tmp_path / "rows") == []


def test_rows_are_appended_across_the_ends_of_shards(tmp_path: Path) -> None:
    for low in range(0, COUNT, 5):
        append(tmp_path / "numbers", VALUES["numbers"][low : low + 5], low, COUNT, per_shard=4)
    parts = [np.load(path) for path in sorted(tmp_path.iterdir())]
    assert [len(part) for part in parts] == [4, 4, 3]
    assert np.array_equal(np.concatenate(parts), VALUES["numbers"])

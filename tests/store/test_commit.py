"""commit: a folder is there whole or not at all, whatever ends its writer."""

import errno
import io
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from aliprod.errors import StorageFull
from aliprod.store import commit, mirror


def filled(text: str) -> Callable[[Path], None]:
    def fill(folder: Path) -> None:
        (folder / "below").mkdir()
        (folder / "below" / "a.txt").write_text(text)
        (folder / "b.txt").write_text(text * 2)

    return fill


def test_what_was_written_is_there_with_its_record_and_nothing_beside_it(tmp_path: Path) -> None:
    assert commit.read(tmp_path / "new" / "result") is None
    assert commit.write(tmp_path / "new" / "result", filled("x"), {"epoch": 3}) == {"epoch": 3}
    assert commit.read(tmp_path / "new" / "result") == {"epoch": 3}
    assert commit.verify(tmp_path / "new" / "result") == []
    assert (tmp_path / "new" / "result" / "below" / "a.txt").read_text() == "x"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["result"]


def test_the_manifest_says_sizes_and_the_sha256_that_coreutils_finds(tmp_path: Path) -> None:
    commit.write(tmp_path / "result", filled("x"))
    manifest = json.loads((tmp_path / "result" / "manifest.json").read_text())
    path = tmp_path / "result" / "b.txt"
    sha256 = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout.split()[0]
    assert manifest["files"]["b.txt"] == {"bytes": 2, "sha256": sha256}
    assert commit.digests(tmp_path / "result")["b.txt"] == sha256


def test_whoever_comes_second_is_told_what_is_there(tmp_path: Path) -> None:
    commit.write(tmp_path / "result", filled("first"), {"writer": 1})
    assert commit.write(tmp_path / "result", filled("second"), {"writer": 2}) == {"writer": 1}
    assert (tmp_path / "result" / "b.txt").read_text() == "firstfirst"
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


def test_of_many_writers_at_once_one_wins_and_all_are_told_the_same(tmp_path: Path) -> None:
    records: list[dict[str, int]] = []
    together = threading.Barrier(8)

    def write(writer: int) -> None:
        together.wait()
        records.append(commit.write(tmp_path / "result", filled(str(writer)), {"writer": writer}))

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert records == [records[0]] * 8
    assert (tmp_path / "result" / "below" / "a.txt").read_text() == str(records[0]["writer"])
    assert commit.verify(tmp_path / "result") == []
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


class Wrong(Exception):
    pass


@pytest.mark.parametrize("error", [Wrong(), KeyboardInterrupt(), SystemExit()])
def test_an_error_while_filling_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    def fill(folder: Path) -> None:
        filled("x")(folder)
        raise error

    with pytest.raises(type(error)):
        commit.write(tmp_path / "result", fill)
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from aliprod.store import commit

def die(event, args):
    if event == sys.argv[2] and sys.argv[3] in str(args[0]):
        os.kill(os.getpid(), signal.SIGKILL)

def fill(folder):
    (folder / "a.txt").write_text("x")
    (folder / "b.txt").write_text("y")

sys.addaudithook(die)
commit.write(Path(sys.argv[1]), fill)
"""


@pytest.mark.parametrize(("event", "path"), [("open", "b.txt"), ("open", "manifest.json"), ("os.rename", ".partial")])
def test_a_killed_writer_leaves_nothing_that_is_seen_and_nothing_in_the_way(
    tmp_path: Path, event: str, path: str
) -> None:
    died = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "result", event, path], check=False)
    assert died.returncode == -signal.SIGKILL
    assert commit.read(tmp_path / "result") is None
    assert not (tmp_path / "result").exists()
    commit.write(tmp_path / "result", filled("x"), {"again": True})
    assert commit.read(tmp_path / "result") == {"again": True}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(st.data())
def test_every_flipped_bit_is_noticed(tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "result"
    commit.write(folder, filled("x"))
    path = folder / data.draw(st.sampled_from(["b.txt", "below/a.txt"]))
    content = path.read_bytes()
    spoilt = bytearray(content)
    spoilt[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(spoilt)
    try:
        assert commit.verify(folder) == [path.relative_to(folder).as_posix()]
    finally:
        path.write_bytes(content)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(cut=st.integers(0, 200))
def test_half_a_manifest_is_none(tmp_path: Path, cut: int) -> None:
    commit.write(tmp_path / "result", filled("x"))
    manifest = tmp_path / "result" / "manifest.json"
    content = manifest.read_bytes()
    manifest.write_bytes(content[:cut])
    try:
        assert commit.read(tmp_path / "result") is None
        assert commit.verify(tmp_path / "result") == ["manifest.json"]
    finally:
        manifest.write_bytes(content)


def test_a_folder_that_lost_a_file_is_set_aside_by_the_next_writer(tmp_path: Path) -> None:
    commit.write(tmp_path / "result", filled("x"), {"writer": 1})
    (tmp_path / "result" / "b.txt").unlink()
    assert commit.read(tmp_path / "result") is None
    assert commit.write(tmp_path / "result", filled("x"), {"writer": 2}) == {"writer": 2}
    assert len(list(tmp_path.glob(".result.*.bad"))) == 1


def onto_a_full_disk(folder: Path) -> None:
    (folder / "a.txt").symlink_to("/dev/full")  # the kernel answers ENOSPC
    (folder / "a.txt").write_text("x")


def test_a_full_disk_is_one_sentence_with_the_path_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(StorageFull) as raised:
        commit.write(tmp_path / "result", onto_a_full_disk)
    assert str(raised.value).startswith(f"{tmp_path}/result: cannot be written: {os.strerror(errno.ENOSPC)}.\n")
    assert "bytes are free" in raised.value.advice
    assert list(tmp_path.iterdir()) == []


@contextmanager
def files_of_at_most(size_bytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def save_tensors(folder: Path) -> None:
    save_file({"weight": torch.zeros(2**20)}, folder / "model.safetensors")


def save_text(folder: Path) -> None:
    (folder / "a.txt").write_bytes(bytes(2**22))


@pytest.mark.parametrize("fill", [save_tensors, save_text])
def test_where_a_file_can_grow_no_more_every_library_ends_in_one_error(
    tmp_path: Path, fill: Callable[[Path], None]
) -> None:
    with files_of_at_most(2**21), pytest.raises(StorageFull, match=r"result: cannot be written: .*27|too large"):
        commit.write(tmp_path / "result", fill)
    assert list(tmp_path.iterdir()) == []
    commit.write(tmp_path / "result", fill)
    assert commit.verify(tmp_path / "result") == []


class FullAt:
    """The kernel's answer ENOSPC to the ``at``-th thing that takes room: a folder, a rename, a write, an fsync."""

    def __init__(self, at: int) -> None:
        self.left = at

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("mkdir", "replace", "fsync"):
            monkeypatch.setattr(os, name, self._until_full(getattr(os, name)))
        real = io.open

        def opened(path: Path, mode: str = "r", *args: object) -> Any:
            file: Any = real(path, mode, *args)  # type: ignore[call-overload]
            return Writing(file, self._until_full(file.write)) if "w" in mode else file

        monkeypatch.setattr(io, "open", opened)

    def _until_full(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: object, **options: object) -> Any:
            self.left -= 1
            if self.left == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return call(*args, **options)

        return called


@dataclass
class Writing:
    """A file whose writes are another's."""

    file: Any
    write: Callable[..., Any]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def test_wherever_the_disk_is_full_it_is_one_sentence_and_the_same_write_succeeds_when_there_is_room(
    storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit.write(storage / "before", filled("old"), {"writer": 0})
    committed = 0
    for at in itertools.count(1):
        folder = storage / f"at-{at}" / "result"
        full = FullAt(at)
        with monkeypatch.context() as patched:
            full.patch(patched)
            try:
                commit.write(folder, filled("x"), {"writer": 1})
            except StorageFull as error:
                assert os.strerror(errno.ENOSPC) in str(error)  # noqa: PT017
        if full.left > 0:
            break
        there = commit.read(folder)
        assert there in (None, {"writer": 1})
        assert folder.exists() == (there is not None)
        committed += there is not None
        assert not list(storage.rglob("*.partial"))
        assert commit.write(folder, filled("x"), {"writer": 1}) == {"writer": 1}
        assert commit.verify(folder) == []
        assert commit.verify(storage / "before") == []
    assert at > 10
    if mirror.of(storage) is None:
        assert committed == 1  # the last fsync, of the folder it lies in: it is there, if not for certain
    else:
        assert committed >= 1  # what the bucket has is there, however full this disk is


def test_what_killed_writers_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    commit.write(tmp_path / "result", filled("x"))
    (tmp_path / ".other.01234567.partial" / "below").mkdir(parents=True)
    (tmp_path / ".plan.json.01234567.partial").write_text("{")
    (tmp_path / ".result.01234567.bad").mkdir()
    commit.sweep(tmp_path)
    commit.sweep(tmp_path / "none")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".result.01234567.bad", "result"]


@pytest.mark.parametrize("text", ["[]", "{}", "null", '{"files": {}, "record": {}, "sha256": ""}', '{"files": {}}'])
def test_what_is_json_but_no_manifest_is_none(tmp_path: Path, text: str) -> None:
    commit.write(tmp_path / "result", filled("x"))
    (tmp_path / "result" / "manifest.json").write_text(text)
    assert commit.read(tmp_path / "result") is None


def test_every_flipped_bit_of_a_manifest_is_noticed(tmp_path: Path) -> None:
    commit.write(tmp_path / "result", filled("x"), {"epoch": 3, "name": "net/stage"})
    path = tmp_path / "result" / "manifest.json"
    content = path.read_bytes()
    for bit in range(8 * len(content)):
        spoilt = bytearray(content)
        spoilt[bit // 8] ^= 1 << bit % 8
        path.write_bytes(spoilt)
        assert commit.read(tmp_path / "result") is None, bit
        assert commit.verify(tmp_path / "result") == ["manifest.json"]


@contextmanager
def somebody() -> Iterator[None]:
    """Not root, to whom permissions mean nothing."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("mode", [0o555, 0o000])
def test_a_folder_without_the_right_to_write_is_one_sentence(mode: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(mode)
        try:
            with somebody(), pytest.raises(StorageFull, match="cannot be written: Permission denied"):
                commit.write(Path(place) / "jobs" / "result", filled("x"))
            with somebody(), pytest.raises(StorageFull, match="cannot be written: Permission denied"):
                commit.write_file(Path(place) / "metrics.json", "{}")
        finally:
            Path(place).chmod(0o700)
        assert list(Path(place).iterdir()) == []


def test_a_storage_path_that_is_a_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "storage").write_text("")
    with pytest.raises(StorageFull, match="storage/result: cannot be written: "):
        commit.write(tmp_path / "storage" / "result", filled("x"))


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "plan.json"
    commit.write_file(path, "old")
    with files_of_at_most(2**10), pytest.raises(StorageFull):
        commit.write_file(path, bytes(2**12))
    assert path.read_text() == "old"
    commit.write_file(path, "new")
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]

"""Checkpoints after every power cut: whatever of the unsynced is lost, no acknowledged one is."""

import itertools
import logging
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import obstore
import pytest
from obstore.store import MemoryStore

from aliprod.store import commit, mirror
from aliprod.store.bucket import Bucket, opened
from aliprod.training import checkpoint
from aliprod.training.checkpoint import TrainingState
from tests.conftest import s3_environment

Tree = dict[str, Any]  # a folder: a File or the Tree of a folder, by name
Objects = dict[str, tuple[int, bytes]]  # of a bucket: a number that grows with each write, and what was written


@dataclass(frozen=True)
class File:
    """What a file holds, and of which object it says that it is a copy."""

    content: bytes
    version: str = ""


@dataclass(frozen=True)
class Moment:
    """What is there, what of it is certain, what the bucket has, and which step was acknowledged."""

    now: dict[int, Any]
    certain: dict[int, Any]
    objects: Objects
    acknowledged: int


@dataclass
class Store:
    """A bucket in memory, whose writes are certain once they have returned."""

    memory: MemoryStore = field(default_factory=MemoryStore)

    def objects(self) -> Objects:
        found = [one for chunk in obstore.list(self.memory) for one in chunk]
        return {one["path"]: (int(one["e_tag"].strip('"')), self._read(one["path"])) for one in found}

    def restore(self, objects: Objects) -> None:
        """Have these objects, with their numbers, in a bucket of their own."""
        self.memory, by_number = MemoryStore(), {number: key for key, (number, _) in objects.items()}
        for number in range(max(by_number, default=-1) + 1):
            key = by_number.get(number)
            obstore.put(self.memory, key or "gone", objects[key][1] if key else b"")
        if "gone" not in objects and by_number.keys() != set(range(len(by_number))):
            obstore.delete(self.memory, "gone")

    def _read(self, path: str) -> bytes:
        return bytes(obstore.get(self.memory, path).bytes())


@dataclass
class Server(Store):
    """A bucket of a program that speaks S3, in which what was in memory is taken up."""

    def restore(self, objects: Objects) -> None:
        there = opened("s3://team")
        there.delete(there.list("power-cuts"))
        for key, (_, written) in objects.items():
            there.put(key, written)


class Disk:
    """What is on a disk for certain, and what is not, at every moment of a program that writes into a folder.

    A file's bytes are certain after its fsync, a folder's names after the folder's. Until then a power cut may take
    or leave each name, and leave of each file what it was before, zeros or all.

    Args:
        without: "files" or "folders" whose fsync does nothing, as if it had been left out.
    """

    def __init__(self, root: Path, store: Store, without: str = "") -> None:
        self.root, self.store, self.without = root, store, without
        self.held: dict[int, int] = {}  # open files: so no inode's number comes twice
        self.top = self._inode(root)
        self.certain: dict[int, Any] = {self.top: {}}
        self.moments: list[Moment] = []
        self.acknowledged = 0

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("mkdir", "replace", "unlink", "rmdir", "fsync"):
            monkeypatch.setattr(os, name, self._watched(name, getattr(os, name)))
        for name in ("put", "copy", "delete"):
            monkeypatch.setattr(obstore, name, self._watched(name, getattr(obstore, name)))

    def acknowledge(self, step: int) -> None:
        self.acknowledged = step
        self._moment()

    def trees(self) -> Iterator[tuple[Tree, Objects, int]]:
        """Every folder that a power cut could leave, with the bucket and the step acknowledged by then."""
        for moment in self.moments:
            for tree in _possible(self.top, moment.now, moment.certain):
                yield tree, moment.objects, moment.acknowledged

    def _watched(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **options: Any) -> Any:
            self._moment()
            done = call(*args, **options)
            if name == "fsync":
                node = os.fstat(args[0])
                if self.without != ("folders" if stat.S_ISDIR(node.st_mode) else "files"):
                    self.certain[node.st_ino] = self._scan()[node.st_ino]
            self._moment()
            return done

        return watched

    def _moment(self) -> None:
        self.moments.append(Moment(self._scan(), dict(self.certain), self.store.objects(), self.acknowledged))

    def _scan(self) -> dict[int, Any]:
        nodes: dict[int, Any] = {self.top: {}}
        for path in sorted(self.root.rglob("*")):
            nodes[self._inode(path)] = {} if path.is_dir() else File(path.read_bytes(), mirror._version(path))
            nodes[self._inode(path.parent)][path.name] = self._inode(path)
        return nodes

    def _inode(self, path: Path) -> int:
        number = path.stat().st_ino
        if number not in self.held:
            self.held[number] = os.open(path, os.O_RDONLY)
        return number


def _possible(inode: int, now: dict[int, Any], certain: dict[int, Any]) -> list[Any]:
    """What an inode may hold after a power cut."""
    here, kept = now.get(inode), certain.get(inode)
    if isinstance(here if here is not None else kept, dict):
        return _possible_folders(here or {}, kept or {}, now, certain)
    if here is None or here == kept:
        return [kept]
    if kept is not None and here.content == kept.content:  # what was synced stays
        return [here, kept]
    return [here, kept or File(b""), File(bytes(len(here.content)), here.version)]


def _possible_folders(
    here: dict[str, int], kept: dict[str, int], now: dict[int, Any], certain: dict[int, Any]
) -> list[Tree]:
    names = sorted(here.keys() | kept.keys())
    of_each = []
    for name in names:
        inodes = {here.get(name), kept.get(name)}
        of_each.append([v for i in inodes for v in ([None] if i is None else _possible(i, now, certain))])
    chosen = itertools.product(*of_each)
    return [{n: v for n, v in zip(names, values, strict=True) if v is not None} for values in chosen]


def content(step: int) -> bytes:
    return f"step {step}, ".encode() * 10


def written_with_power_cuts(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *steps: int, store: Store | None = None, without: str = ""
) -> Disk:
    """A job that commits checkpoints, of which two are kept."""
    folder.mkdir(parents=True)
    disk = Disk(folder, store or Store(), without)
    with monkeypatch.context() as patched:
        disk.watch(patched)
        for step in steps:
            place = checkpoint.place_of(folder, TrainingState(step=step))
            commit.write(place, lambda staging, step=step: _fill(staging, content(step)), {"key": "0123"})  # type: ignore[misc]
            disk.acknowledge(step)
            checkpoint.prune(folder)
    for handle in disk.held.values():
        os.close(handle)
    return disk


def _fill(staging: Path, text: bytes) -> None:
    (staging / "a").write_bytes(text)
    (staging / "b").write_bytes(text)


def laid_out(tree: Tree, folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name, node in tree.items():
        if isinstance(node, dict):
            laid_out(node, folder / name)
        else:
            (folder / name).write_bytes(node.content)
            if node.version:
                mirror._mark(folder / name, node.version)
    return folder


def newest_by_name(folder: Path) -> Path | None:
    """What a job without manifests would go on from."""
    return max(folder.glob("step-*"), default=None)


def holds(folder: Path, text: bytes) -> bool:
    return all((folder / name).exists() and (folder / name).read_bytes() == text for name in "ab")


def recovered(
    disk: Disk, folder: Path, newest: Callable[[Path], Path | None] = checkpoint.newest, gone: bool = False
) -> tuple[int, int, int]:
    """How many power cuts there are, after how many an acknowledged step is lost, and after how many false bytes are
    taken.

    Args:
        folder: where to lay out what is left.
        gone: whether the disk is, too: another machine goes on.
    """
    cuts = lost = false = 0
    states = {f"{ ({} if gone else tree) } {left}": ({} if gone else tree, *left) for tree, *left in disk.trees()}
    for tree, objects, acknowledged in states.values():
        disk.store.restore(objects)
        laid_out(tree, folder)
        commit.refresh(folder)
        found = newest(folder)
        step = 0 if found is None else int(found.name.removeprefix("step-"))
        cuts += 1
        lost += step < acknowledged
        false += found is not None and not holds(found, content(step))
        shutil.rmtree(folder)
    return cuts, lost, false


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)  # each damaged checkpoint is worth a warning


def test_after_every_power_cut_the_newest_acknowledged_checkpoint_or_a_newer_one_is_found_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = written_with_power_cuts(tmp_path / "disk", monkeypatch, 3, 4, 6, 8)
    cuts, lost, false = recovered(disk, tmp_path / "after")
    assert cuts > 300
    assert (lost, false) == (0, 0)


@pytest.mark.parametrize("gone", [False, True], ids=["its own disk", "another machine"])
@pytest.mark.parametrize("small", [1 << 20, 0], ids=["files that come with the manifest", "large files"])
def test_after_every_power_cut_it_is_found_in_a_bucket_too(
    gone: bool, small: int, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store()
    monkeypatch.setattr(mirror, "opened", lambda uri: Bucket(uri, store.memory, store.memory))
    monkeypatch.setattr(mirror, "_SMALL", small)
    monkeypatch.setattr(mirror, "_mirror", cache(mirror.Mirror))  # of this test's bucket
    monkeypatch.setenv("ALIPROD_CACHE", str(tmp_path))
    folder = mirror.local("s3://team/power-cuts/resume")
    disk = written_with_power_cuts(folder, monkeypatch, 3, 4, 6, store=store)
    shutil.rmtree(tmp_path / "aliprod-mirror")
    monkeypatch.setattr(os, "fsync", lambda _: None)  # no second power cut
    if gone:  # versions of objects, which the own disk has noted, are the server's
        for name, value in s3_environment(s3).items():
            monkeypatch.setenv(name, value)
        opened.cache_clear()
        monkeypatch.setattr(mirror, "opened", opened)
        disk.store = Server()
    cuts, lost, false = recovered(disk, folder, gone=gone)
    assert cuts > (12 if gone else 300)
    assert (lost, false) == (0, 0)


@pytest.mark.parametrize("without", ["files", "folders"])
def test_without_an_fsync_an_acknowledged_checkpoint_can_be_lost_but_false_bytes_are_never_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without: str
) -> None:
    _, lost, false = recovered(
        written_with_power_cuts(tmp_path / "disk", monkeypatch, 3, without=without), tmp_path / "after"
    )
    assert lost > 0
    assert false == 0


def test_without_the_manifest_false_bytes_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = written_with_power_cuts(tmp_path / "disk", monkeypatch, 3, without="files")
    _, _, false = recovered(disk, tmp_path / "after", newest_by_name)
    assert false > 0

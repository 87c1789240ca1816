"""Checkpoints after every power cut: whatever of the unsynced is lost, no acknowledged one is."""

import itertools
import logging
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aliprod.store import commit
from aliprod.training import checkpoint
from aliprod.training.checkpoint import TrainingState

Tree = dict[str, Any]  # a folder: bytes of a file or the Tree of a folder, by name


class Disk:
    """What is on a disk for certain, and what is not, at every moment of a program that writes into a folder.

    A file's bytes are certain after its fsync, a folder's names after the folder's. Until then a power cut may take
    or leave each name, and leave of each file what it was before, zeros or all.

    Args:
        without: "files" or "folders" whose fsync does nothing, as if it had been left out.
    """

    def __init__(self, root: Path, without: str = "") -> None:
        self.root, self.without = root, without
        self.held: dict[int, int] = {}  # open files: so no inode's number comes twice
        self.certain: dict[int, Any] = {self._inode(root): {}}
        self.moments: list[tuple[dict[int, Any], dict[int, Any], int]] = []
        self.acknowledged = 0

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("mkdir", "replace", "unlink", "rmdir", "fsync"):
            monkeypatch.setattr(os, name, self._watched(name, getattr(os, name)))

    def acknowledge(self, step: int) -> None:
        self.acknowledged = step
        self._moment()

    def trees(self) -> Iterator[tuple[Tree, int]]:
        """Every folder that a power cut could leave, with the step acknowledged by then."""
        seen: set[str] = set()
        for now, certain, acknowledged in self.moments:
            for tree in _possible(self._inode(self.root), now, certain):
                if (key := f"{acknowledged} {tree}") not in seen:
                    seen.add(key)
                    yield tree, acknowledged

    def _watched(self, name: str, call: Callable[..., None]) -> Callable[..., None]:
        def watched(*args: Any, **options: Any) -> None:
            self._moment()
            call(*args, **options)
            if name == "fsync":
                node = os.fstat(args[0])
                if self.without != ("folders" if stat.S_ISDIR(node.st_mode) else "files"):
                    self.certain[node.st_ino] = self._scan()[node.st_ino]
            self._moment()

        return watched

    def _moment(self) -> None:
        self.moments.append((self._scan(), dict(self.certain), self.acknowledged))

    def _scan(self) -> dict[int, Any]:
        nodes: dict[int, Any] = {self._inode(self.root): {}}
        for path in sorted(self.root.rglob("*")):
            nodes[self._inode(path)] = {} if path.is_dir() else path.read_bytes()
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
    return [here, kept or b"", bytes(len(here))]


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


def written_with_power_cuts(folder: Path, monkeypatch: pytest.MonkeyPatch, *steps: int, without: str = "") -> Disk:
    """A job that commits checkpoints, of which two are kept."""
    folder.mkdir()
    disk = Disk(folder, without)
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
            (folder / name).write_bytes(node)
    return folder


def newest_by_name(folder: Path) -> Path | None:
    """What a job without manifests would go on from."""
    return max(folder.glob("step-*"), default=None)


def holds(folder: Path, text: bytes) -> bool:
    return all((folder / name).exists() and (folder / name).read_bytes() == text for name in "ab")


def recovered(
    disk: Disk, folder: Path, newest: Callable[[Path], Path | None] = checkpoint.newest
) -> tuple[int, int, int]:
    """How many power cuts there are, after how many an acknowledged step is lost, and after how many false bytes are
    taken."""
    cuts = lost = false = 0
    for tree, acknowledged in disk.trees():
        found = newest(laid_out(tree, folder / "after"))
        step = 0 if found is None else int(found.name.removeprefix("step-"))
        cuts += 1
        lost += step < acknowledged
        false += found is not None and not holds(found, content(step))
        shutil.rmtree(folder / "after")
    return cuts, lost, false


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)  # each damaged checkpoint is worth a warning


def test_after_every_power_cut_the_newest_acknowledged_checkpoint_or_a_newer_one_is_found_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuts, lost, false = recovered(written_with_power_cuts(tmp_path / "disk", monkeypatch, 3, 4, 6, 8), tmp_path)
    assert cuts > 300
    assert (lost, false) == (0, 0)


@pytest.mark.parametrize("without", ["files", "folders"])
def test_without_an_fsync_an_acknowledged_checkpoint_can_be_lost_but_false_bytes_are_never_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without: str
) -> None:
    _, lost, false = recovered(written_with_power_cuts(tmp_path / "disk", monkeypatch, 3, without=without), tmp_path)
    assert lost > 0
    assert false == 0


def test_without_the_manifest_false_bytes_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = written_with_power_cuts(tmp_path / "disk", monkeypatch, 3, without="files")
    _, _, false = recovered(disk, tmp_path, newest_by_name)
    assert false > 0

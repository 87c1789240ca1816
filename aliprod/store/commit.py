"""A folder is there when its manifest is.

Everything that must survive a crash (weights, resume checkpoints, probabilities, results) is a folder that
is written beside its final place and becomes visible in one rename, with a manifest of sizes and sha256
(its own too) written last. Whoever finds no valid manifest finds nothing. A folder in the mirror of a bucket is sent
there before it becomes visible here, and is there when its manifest is in the bucket (`aliprod.store.mirror`).
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from aliprod.errors import StorageFull
from aliprod.store import mirror
from aliprod.store.mirror import beside, remove_here, size_of, sync

MANIFEST = mirror.MANIFEST


def write(
    folder: Path,
    fill: Callable[[Path], Mapping[str, str] | None],
    record: dict[str, Any] | None = None,
    room: Path | None = None,
) -> dict[str, Any]:
    """Let ``fill`` write files into a new folder, then make it appear as ``folder``, whole or not at all.

    Where ``folder`` is committed already, what is there stays and ours is discarded: results are addressed
    by key and written once.

    Args:
        fill: called with an empty folder on the same file system; may return the sha256 of files that know theirs.
        record: JSON-serialisable facts, kept in the manifest.
        room: the folder to write it in, on the same file system; None: the one that ``folder`` is in.
    Returns:
        The record of what is there now.
    Raises:
        StorageFull: no room, no permission, or the path is gone; nothing half-written is visible.
    """
    with storage(folder), _staged(folder, fill, record or {}, room) as staging:
        _publish(staging, folder, over=False)
        if (there := read(folder)) is None:
            raise OSError(f"{folder} vanished after it was written")
        return there


def replace(folder: Path, fill: Callable[[Path], Mapping[str, str] | None], record: dict[str, Any]) -> None:
    """Commit what ``fill`` writes in place of what ``folder`` held; until then that stays. StorageFull: as in
    `write`."""
    with storage(folder), _staged(folder, fill, record, None) as staging:
        _publish(staging, folder, over=True)


def read(folder: Path, again: bool = False) -> dict[str, Any] | None:
    """The record of a committed folder; None where there is none or a file has another size than it says. ``again``:
    whether another machine may have replaced it since it was read."""
    if (mirrored := mirror.of(folder)) is not None:
        mirrored.take(folder, again)
    if (manifest := _manifest(folder)) is None:
        return None
    if mirrored is None and any(size_of(folder / name) != file["bytes"] for name, file in manifest["files"].items()):
        return None
    return dict(manifest["record"])


def fetch(folder: Path, *names: str) -> dict[str, Any] | None:
    """Have the files of a committed folder on this machine, or those with the names: of a bucket's mirror they may not
    be here yet. Returns its record, as `read` does. Unreachable: the bucket does not answer."""
    if (mirrored := mirror.of(folder)) is not None:
        mirrored.fetch(folder, names)
    return read(folder)


def borrowed(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """The files of a committed folder with these names, each for as long as nobody asks for the next: of a bucket's
    mirror they go then, and the next one comes meanwhile. Unreachable: the bucket does not answer."""
    mirrored = mirror.of(folder)
    if mirrored is None or not names:
        yield from (folder / name for name in names)
        return
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(mirrored.fetch, folder, names[:1])
        for number, name in enumerate(names):
            coming.result()
            if following := names[number + 1 : number + 2]:
                coming = thread.submit(mirrored.fetch, folder, following)
            yield folder / name
            (folder / name).unlink(missing_ok=True)


def part_reader(folder: Path) -> Callable[[str, int, int], bytes]:
    """A function that reads a part of a file of a committed folder: its name, the first byte, how many. In a bucket's
    mirror it asks the bucket. It raises OSError, and Unreachable where the bucket does not answer."""

    def read(name: str, start: int, size: int) -> bytes:
        with (folder / name).open("rb") as file:
            return os.pread(file.fileno(), size, start)

    return read if (mirrored := mirror.of(folder)) is None else mirrored.part_reader(folder)


def refresh(*folders: Path) -> None:
    """Have what others have written below folders on this machine, but for large files; for folders in a bucket's
    mirror. Unreachable: the bucket does not answer."""
    mirrored = [(found, folder) for folder in folders if (found := mirror.of(folder)) is not None]
    if mirrored:
        with ThreadPoolExecutor(len(mirrored)) as threads:
            list(threads.map(lambda one: one[0].refresh(one[1]), mirrored))


def send(file: Path) -> None:
    """Send a file that was written in its place, where it is in a bucket's mirror. StorageFull: the bucket does not
    take it."""
    if (mirrored := mirror.of(file)) is not None:
        mirrored.put(file)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, here and in the bucket; nothing happens where it is gone."""
    remove_here(path)
    if (mirrored := mirror.of(path)) is not None:
        mirrored.remove(path)


def verify(folder: Path) -> list[str]:
    """What is wrong with a committed folder: the names of files whose bytes are not those of the manifest."""
    damaged = _damaged(folder)
    if damaged and (mirrored := mirror.of(folder)) is not None:  # or not here yet: it is brought anew
        for name in damaged:
            (folder / name).unlink(missing_ok=True)
        mirrored.fetch(folder)
        damaged = _damaged(folder)
    return damaged


def digest(folder: Path) -> str:
    """sha256 of the manifest: one name for all the bytes of a committed folder."""
    return sha256(folder / MANIFEST)


def digests(folder: Path) -> dict[str, str]:
    """sha256 of each file of a committed folder by its name, as its manifest says."""
    if (manifest := _manifest(folder)) is None:
        raise FileNotFoundError(folder / MANIFEST)
    return {name: str(file["sha256"]) for name, file in manifest["files"].items()}


def write_file(path: Path, content: str | bytes) -> None:
    """Write one file, whole or not at all. StorageFull: as in `write`."""
    with storage(path), beside(path) as staging:
        make_folder(path.parent)
        staging.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(staging)
        os.replace(staging, path)
        sync(path.parent)
        send(path)


def read_json(path: Path) -> dict[str, Any]:
    """The table in a file of JSON; {} where there is none, or the file is damaged."""
    try:
        return parsed(path.read_bytes())
    except OSError:
        return {}


def parsed(text: bytes) -> dict[str, Any]:
    """The table that JSON is; {} of anything else."""
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}


def make_folder(folder: Path) -> None:
    """Make a folder with its parents. Their names are synced too: a power cut may not take what lies in them."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in new:
        sync(path.parent)


def set_aside(folder: Path, aside: Path) -> None:
    """Give a damaged folder another name, beside its own; nothing happens where another process was faster."""
    shutil.rmtree(aside, ignore_errors=True)
    with suppress(FileNotFoundError):
        os.replace(folder, aside)
    remove(folder)


def link(file: Path, to: Path) -> None:
    """A second name for a file, so that a call that is killed now loses nothing; a copy where a mount has no links."""
    try:
        os.link(file, to)
    except OSError:
        shutil.copyfile(file, to)


def sweep(folder: Path) -> None:
    """Remove what killed writers have left in a folder. For a folder that nobody else writes into now."""
    for path in folder.glob(".*.partial"):
        remove_here(path)


def sha256(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def storage(path: Path) -> Iterator[None]:
    """Turn what a full, read-only or vanished disk raises, in any library, into one StorageFull."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, SafetensorError) and "os error" not in str(error).lower():
            raise  # else it is the system's, wrapped in a type of its own
        why = getattr(error, "strerror", None) or error
        # Path.is_dir raises where a folder on the way may not be entered
        there = next(parent for parent in (path, *path.parents) if os.path.isdir(parent))  # noqa: PTH112
        free = f"{shutil.disk_usage(there).free:,} bytes are free."
        advice = "Finished work is intact; make room or restore the path and start the same command again."
        raise StorageFull(f"cannot be written: {why}.", path, f"{free} {advice}") from error


@contextmanager
def _staged(
    folder: Path, fill: Callable[[Path], Mapping[str, str] | None], record: dict[str, Any], room: Path | None
) -> Iterator[Path]:
    """A folder that ``fill`` has filled, with its manifest, before it becomes visible; gone in the end."""
    with beside((room or folder.parent) / folder.name) as staging:
        make_folder(folder.parent)
        if room is not None:
            make_folder(room)
        staging.mkdir()
        known = fill(staging)
        _write_manifest(staging, record, known or {})
        yield staging


def _damaged(folder: Path) -> list[str]:
    if (manifest := _manifest(folder)) is None:
        return [MANIFEST]
    return [
        name
        for name, expected in manifest["files"].items()
        if size_of(folder / name) != expected["bytes"] or sha256(folder / name) != expected["sha256"]
    ]


def _write_manifest(folder: Path, record: dict[str, Any], known: Mapping[str, str]) -> None:
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    for path in paths.values():
        sync(path)
    files = {
        name: {"bytes": path.stat().st_size, "sha256": known.get(name) or sha256(path)} for name, path in paths.items()
    }
    said = json.loads(json.dumps({"files": files, "record": record}))
    text = json.dumps(said | {"sha256": _seal(said)}, indent=1, sort_keys=True)
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    sync(folder / MANIFEST)
    for path in (*folder.rglob("*"), folder):
        if path.is_dir():
            sync(path)


def _publish(staging: Path, folder: Path, over: bool) -> None:
    """Give a finished folder its name. Where another writer was faster, what he made stays. ``over``: whether it may
    take the place of what is there."""
    if (mirrored := mirror.of(folder)) is not None:
        mirrored.publish(staging, folder, over)
        return
    if not over and folder.exists() and read(folder) is None:
        os.replace(folder, folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.bad")
    try:
        (mirror.swap if over else os.replace)(staging, folder)
    except OSError:
        if read(folder) is None:
            raise
    sync(folder.parent)


def _manifest(folder: Path) -> dict[str, Any] | None:
    manifest = read_json(folder / MANIFEST)
    seal = manifest.pop("sha256", None)
    return manifest if manifest.keys() == {"files", "record"} and seal == _seal(manifest) else None


def _seal(said: dict[str, Any]) -> str:
    """sha256 of what a manifest says, in its canonical form."""
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

"""A storage path in a bucket: a folder of this machine, the mirror, in which it is read and written.

    CACHE/aliprod-mirror/s3/BUCKET/PREFIX/...

A path says by itself whether it is a mirror, and of what. In the bucket lie

    FOLDER/manifest.json            as in a folder: whoever finds it finds all that it names
    FOLDER/SHA256[:16]/NAME         a file of a committed folder, sent before its manifest, never changed
    FOLDER/SHA256[:16]/NAME.0000    a large one, in parts: a sender who dies leaves objects that the next one finds
    FILE                            what is one file

What two writers may write is written on a condition: a manifest only where there is none, or where it is the one that
was read. What is committed is asked by its name; a listing, which may lag, brings what is shown to people and finds
what is to be removed.
"""

import functools
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from aliprod.errors import AliprodError
from aliprod.processes import locked
from aliprod.store.bucket import THREADS, Bucket, check_uri, opened
from aliprod.store.layout import cache, check_cache

MANIFEST = "manifest.json"
_MIRROR = "aliprod-mirror"
_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(?:/+(.*))?")  # a Path has made one slash of two, or none
_OF_A_FOLDER = re.compile(r"(.*)/[0-9a-f]{16}/[^/]+")
_LEASE = re.compile(r"(^|/)\.leases/")
_SMALL = 1 << 20  # bytes of a file that comes with its manifest
_PART = 64 << 20  # bytes of an object; another number would not fit what is there
_ORPHAN = timedelta(hours=1)  # a file without a manifest is older than any upload
_SPARE, _USED_SECONDS = 0.1, 3600.0  # share of the disk that is to be free; of what may be open
_SETTLED_SECONDS = 60.0  # a listing lags by less
_VERSION = "user.aliprod.version"  # attribute of a file: of which object it is a copy


@dataclass(frozen=True)
class _File:
    """A file of a committed folder, as its manifest says. ``key``: its object, or what those of its parts begin with.
    ``plain``: the same where other tools have sent the folder."""

    name: str
    key: str
    plain: str
    size: int
    sha256: str

    @functools.cached_property
    def parts(self) -> list[str]:
        """What the key of each of its objects ends with."""
        return [f".{number:04d}" for number in range(-(-self.size // _PART))] if self.size > _PART else [""]

    @functools.cached_property
    def keys(self) -> list[str]:
        return [self.key + part for part in self.parts]


def place(stated: str | Path) -> Path | None:
    """The folder of this machine that stands for a URI; None where it is a path. Refused: as `check_uri`."""
    if not (found := _URI.fullmatch(str(stated).strip())):
        return None
    scheme, rest = found[1], found[2] or ""
    check_uri(f"{scheme}://{rest}")
    root = cache().expanduser().absolute()
    check_cache(root)
    return root.joinpath(_MIRROR, scheme, *filter(None, rest.split("/")))


def local(stated: str | Path) -> Path:
    """The path of this machine that a path or a URI means. Refused: as `place`."""
    return place(stated) or Path(stated)


def here(folder: Path) -> Path:
    """The same folder: in a mirror, with its manifest and small files, where it is committed. Unreachable: the bucket
    does not answer."""
    if (mirrored := of(folder)) is not None:
        mirrored.take(folder)
    return folder


def shown(path: Path) -> str:
    """A path as people know it: of a mirror, the URI."""
    if _MIRROR not in path.parts:
        return str(path)
    scheme, *parts = path.parts[path.parts.index(_MIRROR) + 1 :]
    return f"{scheme}://{'/'.join(parts)}"


def of(path: Path) -> "Mirror | None":
    """The mirror that a path is in; None where it is what it is."""
    if _MIRROR not in path.parts:
        return None
    return _mirror(Path(*path.parts[: path.parts.index(_MIRROR) + 3]))


class Mirror:
    """A mirror and its bucket, whose errors it raises. ``root``: the folder that the whole bucket is mirrored in."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._known = dict[str, str]()  # an object by the first letters of its sha256

    @property
    def bucket(self) -> Bucket:
        return opened(shown(self.root))

    def key(self, path: Path) -> str:
        """The object that a file is, or what those of a folder begin with."""
        found = path.relative_to(self.root).as_posix()
        return "" if found == "." else found

    def put(self, file: Path) -> None:
        """Send a file, in place of what was."""
        _mark(file, self.bucket.put(self.key(file), file.read_bytes()))

    def remove(self, path: Path) -> None:
        """Remove a file, or all below a folder: manifests first, so that nothing is there by half."""
        keys = list(self.bucket.list(self.key(path))) or [self.key(path)]
        self.bucket.delete(key for key in keys if key.endswith(MANIFEST))
        self.bucket.delete(key for key in keys if not key.endswith(MANIFEST))

    def publish(self, staging: Path, folder: Path, over: bool) -> None:
        """Send the files of a finished folder, then its manifest, and move it to its place here. Where another writer
        was faster, what he sent stays. ``over``: whether it may take the place of what is there."""
        own, manifest = f"{self.key(folder)}/{MANIFEST}", (staging / MANIFEST).read_bytes()
        with self.alone(folder):
            with self.bucket.given(own):
                before = self.bucket.find(own)
                if before is not None and not over:
                    return
                files = self._files(folder, manifest)
                with ThreadPoolExecutor(THREADS) as threads:
                    parts = [(file, number) for file in files for number in range(len(file.parts))]
                    list(threads.map(lambda part: self._send(staging / part[0].name, *part), parts))
                version = self.bucket.exchange(own, manifest, before[1] if before else None)
            if version is None:
                return
            _mark(staging / MANIFEST, version)
            os.utime(staging / MANIFEST)
            self._known |= {file.sha256[:16]: file.key for file in files}
            old = self._files(folder, before[0]) if before else []
            self._sweep(folder, {key for file in files for key in file.keys}, old)
            self._make_room(0)
            swap(staging, folder)

    def take(self, folder: Path, again: bool = False) -> None:
        """Have the manifest of a committed folder here, with its small files; nothing where it is not committed.
        ``again``: ask although it is here: what is replaced now and then may be another by now."""
        here = folder / MANIFEST
        if here.exists() and not again:
            return
        found = self.bucket.find(f"{self.key(folder)}/{MANIFEST}")
        if found is None and here.exists():
            shutil.rmtree(folder, ignore_errors=True)
        elif found is not None and found[1] != _version(here):
            self._land(folder, *found)

    def fetch(self, folder: Path, names: Collection[str] = ()) -> None:
        """Have the files of a committed folder here, or those with the names. A file that is not what its manifest says
        stays away."""
        self.take(folder, again=True)
        try:
            files = self._files(folder, (folder / MANIFEST).read_bytes())
        except OSError:
            return
        wanted = [one for one in files if not names or one.name in names]
        missing = [one for one in wanted if size_of(folder / one.name) != one.size]
        if missing:
            self._make_room(sum(one.size for one in missing))
            with self.alone(folder):  # who waited for another process finds them
                self._receive_all(folder, missing)
        for one in wanted:
            with suppress(OSError):
                os.utime(folder / one.name)  # it is used: others are removed first

    def part_reader(self, folder: Path) -> Callable[[str, int, int], bytes]:
        """A function that reads a part of a file of a committed folder from the bucket: its name, the first byte, how
        many. It raises FileNotFoundError, and Unreachable where the bucket does not answer."""
        self.take(folder)
        files = {file.name: file for file in self._files(folder, (folder / MANIFEST).read_bytes())}

        def read(name: str, start: int, size: int) -> bytes:
            first, last = start // _PART, (start + size - 1) // _PART
            try:
                found = (
                    self.bucket.part(key, max(0, start - number * _PART), min(_PART, start + size - number * _PART))
                    for number, key in enumerate(files[name].keys[first : last + 1], first)
                )
                return b"".join(found)
            except FileNotFoundError:
                return self.bucket.part(files[name].plain, start, start + size)

        return read

    def refresh(self, folder: Path) -> None:
        """Bring what others have written below a folder: single files, and manifests with their small files. What
        others have removed goes."""
        began, found = time.time(), self.bucket.list(self.key(folder))
        kept = {str(Path(key).parent) for key in found if key.endswith(f"/{MANIFEST}")}
        for manifest in (Path(root, MANIFEST) for root, _, files in os.walk(folder) if MANIFEST in files):
            with suppress(OSError):
                old = _version(manifest) and manifest.stat().st_mtime < began - _SETTLED_SECONDS
                if old and self.key(manifest.parent) not in kept and not manifest.parent.name.startswith("."):
                    shutil.rmtree(manifest.parent)
        with ThreadPoolExecutor(THREADS) as threads:
            list(threads.map(self._update, (key for key, one in found.items() if self._is_news(key, one, kept))))

    @contextmanager
    def alone(self, folder: Path) -> Iterator[None]:
        """Of all processes of this machine."""
        lock = self.root.parent / ".locks" / hashlib.sha256(str(folder).encode()).hexdigest()[:16]
        lock.parent.mkdir(parents=True, exist_ok=True)
        with locked(lock.open("a")):
            yield

    def _make_room(self, size: int) -> None:
        """Have room for so many bytes, and a tenth of the disk, where files that the bucket has too can go: those that
        were not used for the longest time, and not in the last hour."""
        self.root.mkdir(parents=True, exist_ok=True)
        disk, old = shutil.disk_usage(self.root), list[tuple[float, int, Path]]()
        lacking = size + disk.total * _SPARE - disk.free
        if lacking <= 0:
            return
        for folder, _, names in os.walk(self.root):
            if _version(Path(folder, MANIFEST)):
                for path in (Path(folder, name) for name in names if name != MANIFEST):
                    with suppress(OSError):
                        old.append((path.stat().st_mtime, path.stat().st_size, path))
        for used, bytes_, path in sorted(old):
            if lacking > 0 and bytes_ > _SMALL and used < time.time() - _USED_SECONDS:
                path.unlink(missing_ok=True)
                lacking -= bytes_

    def _is_news(self, key: str, one: Mapping[str, Any], kept: set[str]) -> bool:
        """Whether an object is to be brought because a listing shows it: a manifest, or a file of no folder."""
        if _OF_A_FOLDER.fullmatch(key) or _LEASE.search(key):
            return False
        if not key.endswith(f"/{MANIFEST}") and str(Path(key).parent) in kept:
            return False
        return _version(self.root / key).partition(" ")[0] != str(one["e_tag"])

    def _update(self, key: str) -> None:
        path, found = self.root / key, self.bucket.find(key)
        if found and path.name == MANIFEST:
            self._land(path.parent, *found)
        elif found:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, *found)

    def _land(self, folder: Path, manifest: bytes, version: str) -> None:
        """Put a manifest and its small files here, in place of what was."""
        here = folder / MANIFEST
        with self.alone(folder), beside(folder) as fresh:
            if here.exists() and here.read_bytes() == manifest:
                _mark(here, version)
                return
            fresh.mkdir(parents=True)
            self._receive_all(fresh, [file for file in self._files(folder, manifest) if file.size <= _SMALL])
            _write(fresh / MANIFEST, manifest, version)
            swap(fresh, folder)

    def _receive_all(self, folder: Path, files: Iterable[_File]) -> None:
        with ThreadPoolExecutor(THREADS) as threads:
            list(threads.map(lambda file: self._receive(folder / file.name, file), files))

    def _receive(self, path: Path, file: _File) -> None:
        """Bring a file; its name appears once its bytes are known to be right."""
        if size_of(path) == file.size:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside(path) as part:
            if self.bucket.download(file.keys, part) == file.sha256:
                self._known[file.sha256[:16]] = file.key
            elif self.bucket.download([file.plain], part) != file.sha256:
                return
            os.replace(part, path)

    def _send(self, path: Path, file: _File, number: int) -> None:
        """Send a part of a file, where its object is not there; one that another folder has is copied in the bucket."""
        key = file.keys[number]
        if file.size > _SMALL:
            twin = self._known.get(file.sha256[:16])
            if self.bucket.holds(key) or (twin and self.bucket.copy(twin + file.parts[number], key)):
                return
        with path.open("rb") as opened:
            opened.seek(number * _PART)
            self.bucket.put(key, opened.read(_PART))

    def _sweep(self, folder: Path, kept: set[str], old: Iterable[_File]) -> None:
        """Remove the files of the manifest before, and those whose sender died before he sent one."""
        own = f"{self.key(folder)}/{MANIFEST}"
        with suppress(AliprodError):
            found = self.bucket.list(self.key(folder))
            begun = found[own]["last_modified"] - _ORPHAN if own in found else None
            torn = {key for key, one in found.items() if begun is not None and one["last_modified"] < begun}
            self.bucket.delete((torn | {key for file in old for key in file.keys}) - kept - {own})

    def _files(self, folder: Path, manifest: bytes) -> list[_File]:
        """The files that a manifest names; none where it cannot be read."""
        try:
            said, own = json.loads(manifest)["files"], self.key(folder)
            return [
                _File(name, f"{own}/{one['sha256'][:16]}/{name}", f"{own}/{name}", one["bytes"], one["sha256"])
                for name, one in said.items()
                if ".." not in Path(name).parts and not Path(name).is_absolute()
            ]
        except (ValueError, TypeError, KeyError, AttributeError):
            return []


_mirror = functools.cache(Mirror)


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A name next to a path, for what is not yet finished; what still has it in the end is removed."""
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield unfinished
    finally:
        remove_here(unfinished)


def remove_here(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, on this machine; nothing happens where it is gone."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def swap(fresh: Path, folder: Path) -> None:
    """Put a finished folder in the place of what is there. An OSError where another process does so at once."""
    old = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.old")
    try:
        with suppress(FileNotFoundError):
            os.replace(folder, old)
        os.replace(fresh, folder)
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _write(path: Path, content: bytes, version: str) -> None:
    with beside(path) as part:
        part.write_bytes(content)
        sync(part)
        _mark(part, version)
        os.replace(part, path)


def _mark(path: Path, version: str) -> None:
    with suppress(OSError):  # a file system without attributes: it is asked for again
        os.setxattr(path, _VERSION, version.encode())


def _version(path: Path) -> str:
    try:
        return os.getxattr(path, _VERSION).decode()
    except OSError:
        return ""


def sync(path: Path) -> None:
    """Have a file's bytes, or the names in a folder, outlast a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def size_of(path: Path) -> int:
    """Bytes of a file; -1 where it is not there."""
    try:
        return path.stat().st_size
    except OSError:
        return -1

"""What a machine says of itself and of the storage folder. Runs on any node, without Ray."""

import hashlib
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import psutil

from aliprod.errors import AliprodError
from aliprod.store import commit, mirror
from aliprod.store.layout import cache, cache_room
from aliprod.version import VERSION

_PACKAGES = ("ray", "torch", "timm", "pillow", "numpy")  # what pickles, trains, and makes pixels
_SYNCS = 10
_MEMORY = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container
_TORCH = "import json, torch; print(json.dumps([torch.version.cuda, torch.cuda.device_count()]))"


@dataclass(frozen=True)
class Facts:
    """What a machine has.

    Attributes:
        software: versions by name, and `code`: the beginning of the sha256 of aliprod's own files.
        gpus: kind, driver and memory of each, as nvidia-smi says it.
        cuda: that torch was built for; None: none. visible: GPUs that torch can use.
        memory, free_memory, shared_memory, free_cache: bytes; the last, where prepared catalogues are laid out.
        open_files: that a process may have at a time. catalogue: whether the plan's is there.
        seen: what stood in the storage folder's file. storage: what kept it from being read or written; '' where all
            went well. write, read: bytes a second there; sync: seconds in which 4 kB are written and safe (median).
    """

    software: dict[str, str]
    gpus: tuple[str, ...]
    cuda: str | None
    visible: int
    memory: int
    free_memory: int
    shared_memory: int
    free_cache: int
    open_files: int
    catalogue: bool
    seen: str = ""
    storage: str = ""
    write: float = 0.0
    read: float = 0.0
    sync: float = 0.0


def facts(folder: Path, name: str, size: int, catalogue: Path | None) -> Facts:
    """Look at this machine, read the file ``driver`` of a folder in the storage path, and write ``name`` beside it.

    Args:
        size: bytes to write and read for the speed.
    """
    seen, why, (write, read, sync) = "", "", (0.0, 0.0, 0.0)
    try:
        commit.refresh(folder)
        seen = (folder / "driver").read_text()
        commit.write_file(folder / name, seen)
        write, read, sync = _speed(folder / f"{name}.speed", size)
    except (OSError, AliprodError) as error:
        why = error.what if isinstance(error, AliprodError) else str(error.strerror)
    gpus = _lines(["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"])
    cuda, visible = _torch()
    limit, memory = _limit(), psutil.virtual_memory()
    return Facts(
        software=software(),
        gpus=gpus,
        cuda=cuda,
        visible=visible,
        memory=min(limit, memory.total),
        free_memory=min(limit, memory.available),
        shared_memory=shutil.disk_usage("/dev/shm").total,  # noqa: S108  Ray's object store
        free_cache=cache_room(nearest_folder(cache()), ()),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        catalogue=catalogue is not None and mirror.here(catalogue).exists(),
        seen=seen,
        storage=why,
        write=write,
        read=read,
        sync=sync,
    )


def software() -> dict[str, str]:
    """Versions by name, as `Facts` has them; without a build's tag (+cpu)."""
    found = {"python": platform.python_version(), "aliprod": VERSION, "code": _code()}
    for package in _PACKAGES:
        try:
            found[package] = version(package).partition("+")[0]
        except PackageNotFoundError:
            found[package] = "missing"
    return found


def _code() -> str:
    """The beginning of the sha256 of aliprod's modules, wherever it is installed."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _speed(file: Path, size: int) -> tuple[float, float, float]:
    """Write a file, safely, and read it; then a few small ones: bytes a second, and seconds."""
    block, syncs = os.urandom(1 << 20), list[float]()
    begin = time.perf_counter()
    with file.open("wb") as out:
        for _ in range(size // len(block)):
            out.write(block)
        out.flush()
        os.fsync(out.fileno())
        commit.send(file)
        written = time.perf_counter() - begin
        os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # or it would be read from this node's memory
    begin = time.perf_counter()
    if mirror.of(file) is not None:
        file.unlink()  # and comes from the bucket
        commit.refresh(file.parent)
    with file.open("rb", buffering=0) as back:
        while back.read(len(block)):
            pass
    read = time.perf_counter() - begin
    for _ in range(_SYNCS):
        begin = time.perf_counter()
        commit.write_file(file, block[:4096])
        syncs.append(time.perf_counter() - begin)
    return size / written, size / read, median(syncs)


def _torch() -> tuple[str | None, int]:
    """The CUDA that torch was built for, and the GPUs that it finds: in a process from which Ray hides none."""
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    said = _lines([sys.executable, "-W", "ignore", "-c", _TORCH], environment)
    cuda, visible = json.loads(said[-1]) if said else (None, 0)
    return cuda, visible


def _lines(command: list[str], environment: dict[str, str] | None = None) -> tuple[str, ...]:
    """What a command prints; nothing where it is not there, or fails."""
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(done.stdout.strip().splitlines())


def _limit() -> int:
    """Bytes of memory that a container may take."""
    said = [path.read_text().strip() for path in _MEMORY if path.exists()]
    return min((int(text) for text in said if text.isdecimal()), default=sys.maxsize)


def nearest_folder(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return next(path for path in (folder, *folder.parents) if path.exists())

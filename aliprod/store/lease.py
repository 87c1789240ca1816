"""Leases: which driver is at work on what in a storage path, whatever its cluster, its machine and its clock.

    .leases/NAME/TOKEN.N    a folder a lease, in it one file: who holds it, and a number that grows while that one lives

Whoever waits looks at the bytes. Where they stand still for as long as it has patience, by its own monotonic clock, the
holder is dead or stopped: its file is renamed to one of the next holder's, which one driver alone can do. The old one,
when it wakes up, finds it gone. A process of this very machine that has ended is not waited for.

Leases save GPU hours, no more: results are addressed by key and written once.
"""

import errno
import json
import os
import shutil
import socket
import sys
import threading
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from aliprod.errors import Failed
from aliprod.store import commit

FOLDER = ".leases"
PATIENCE_SECONDS = 30.0
_BEATS = 6  # signs of life while the others have patience
_FOLLOW_SECONDS = 2.0
_RACED = (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST, errno.ESTALE)  # another driver was faster
_MOST_BYTES, _MOST_LETTERS = 4096, 200  # of what somebody else has written


@dataclass(frozen=True)
class _Seen:
    """What lies in the folder of a lease, how long it has stood still, and when that was looked at."""

    files: Mapping[str, bytes]
    silent: float
    at: float


class Leases:
    """The leases of a storage path, as one driver holds and sees them; a thread renews those that it holds.

    Args:
        work: what the driver works on, for those who wait for it: "plan tiny".
        patience: seconds without a sign of life, after which a lease is taken over. The same for all drivers.
    Attributes:
        token: names this driver.
        lost: who has taken over a lease that it held, since it was stopped for longer than the others have patience.
    """

    def __init__(self, storage: Path, work: str, patience: float = PATIENCE_SECONDS) -> None:
        self.folder, self.token, self.lost = storage / FOLDER, uuid.uuid4().hex, ""
        self._patience, self._pause = patience, patience / _BEATS
        self._me = {"host": socket.gethostname(), "pid": os.getpid(), "work": work} | _process(os.getpid())
        self._number, self._renewed = 0, time.monotonic()  # of signs of life; when the last was given
        self._held: dict[str, Path] = {}
        self._seen: dict[str, _Seen] = {}
        self._lock, self._closed = threading.RLock(), threading.Event()
        self._thread = threading.Thread(target=self._live, name="leases", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Give back what is held."""
        self._closed.set()
        self._thread.join()
        for name in list(self._held):
            self.release(name)

    def holder(self, name: str) -> str:
        """Who else holds a lease, for people to read; "" where nobody does that is alive."""
        with self._lock:
            if name in self._held:
                return ""
            seen = self._look(name)
            if not seen.files or seen.silent >= self._patience or all(map(_ended, seen.files.values())):
                return ""
            return _words(next(iter(seen.files.values())))

    def take(self, name: str) -> str:
        """Take a lease, where nobody else that is alive holds it.

        Returns:
            "" where it is ours now, else who holds it.
        Raises:
            StorageFull: the storage path cannot be written.
            Failed: as in `check`.
        """
        self.check()
        with self._lock, commit.storage(self.folder):
            if name in self._held:
                return ""
            return self.holder(name) or ("" if self._enter(name) else self.holder(name) or "another driver")

    def release(self, name: str) -> None:
        """Give a lease back; nothing happens where it is not held."""
        with self._lock:
            if (file := self._held.pop(name, None)) is not None:
                with suppress(OSError):
                    file.unlink()
                    file.parent.rmdir()

    def check(self) -> None:
        """Raise where a lease was lost.

        Raises:
            Failed: nothing more may be started or committed.
        """
        with self._lock, suppress(OSError):
            if time.monotonic() - self._renewed > 2 * self._pause:  # were we stopped? The thread may not have run yet
                self._renew()
        if self.lost:
            raise Failed(
                f"{self.lost} has taken over: this driver gave no sign of life for {self._patience:.0f} s.",
                self.folder.parent,
                "Was it stopped? Finished work is intact; the same command waits for the other driver, and ends as it.",
            )

    def _enter(self, name: str) -> bool:
        """Put a file of ours in the place of what was last seen there; False where another driver was faster."""
        self._number += 1
        own, stale = f"{self.token}.{self._number}", sorted(self._seen[name].files)
        place, fresh = self.folder / name, self.folder / f".{own}"
        try:
            commit.make_folder(fresh)
            (fresh / own).write_bytes(self._sign())
            if stale:
                (place / stale[0]).rename(place / own)  # one driver alone has what it renames
                os.replace(fresh / own, place / own)  # a late sign of life goes to the file that was
            else:
                with suppress(OSError):
                    place.unlink()  # no folder: nothing of ours
                fresh.rename(place)  # fails where a file is in there by now
            for other in stale[1:]:
                (place / other).unlink(missing_ok=True)
        except OSError as error:
            if error.errno not in _RACED:
                raise
            return False
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        self._held[name] = place / own
        return True

    def _live(self) -> None:
        while not self._closed.wait(self._pause):
            with self._lock, suppress(OSError):  # a storage path that is away comes back, or fails what needs it
                self._renew()
                for place in self.folder.iterdir():
                    if not place.name.startswith("."):
                        self._look(place.name)

    def _renew(self) -> None:
        """Write a sign of life into each file of ours, never a new file: one that is gone was taken over."""
        self._number, self._renewed = self._number + 1, time.monotonic()
        for name, path in self._held.items():
            try:
                with path.open("r+b") as file:
                    file.write(self._sign())
                    file.truncate()
            except FileNotFoundError:
                self.lost = next(map(_words, _files(path.parent).values()), f"Somebody who removed {name}")

    def _look(self, name: str) -> _Seen:
        """Look at a lease. A pause in which we were stopped ourselves does not count as the holder's silence."""
        files, now, before = _files(self.folder / name), time.monotonic(), self._seen.get(name)
        same = before is not None and before.files == files
        silent = before.silent + min(now - before.at, self._pause) if same and before else 0.0
        self._seen[name] = _Seen(files, silent, now)
        return self._seen[name]

    def _sign(self) -> bytes:
        return json.dumps(self._me | {"number": self._number}).encode()


def is_lost(storage: Path, name: str, token: str) -> bool:
    """Whether another driver has taken over a lease of the driver with this token."""
    files = _files(storage / FOLDER / name)
    return bool(files) and not any(file.startswith(token) for file in files)


def follow(storage: Path, name: str, token: str) -> None:
    """End this process soon after a lease of its driver is lost: the driver may be stopped, and end nothing itself."""

    def watch() -> None:
        while not is_lost(storage, name, token):
            time.sleep(_FOLLOW_SECONDS)
        print(f"Another driver has taken over {name}: this process ends.", file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=watch, name="lease", daemon=True).start()


def _files(place: Path) -> dict[str, bytes]:
    """The files of a lease; {} where it is not there or cannot be read: whoever then takes it finds out."""
    found: dict[str, bytes] = {}
    with suppress(OSError):
        for path in sorted(place.iterdir()):
            with path.open("rb") as file:
                found[path.name] = file.read(_MOST_BYTES)
    return found


def _words(sign: bytes) -> str:
    """Who has written a sign of life."""
    said = _said(sign)
    if not said.keys() >= {"host", "pid", "work"}:
        return "a driver that left no name"
    words = f"{said['host']} pid {said['pid']} of {said['work']}"
    return "".join(filter(str.isprintable, words))[:_MOST_LETTERS]


def _ended(sign: bytes) -> bool:
    """Whether a process of this very machine has written it, and is no more."""
    said, here = _said(sign), _process(os.getpid())
    if not here or said.get("machine") != here["machine"] or not isinstance(said.get("pid"), int):
        return False
    return said.get("started") != _process(said["pid"]).get("started")


def _process(pid: int) -> dict[str, str]:
    """Which boot of which machine a process belongs to, and when it was started; {} where it has ended, or the system
    does not say."""
    try:
        boot, space = Path("/proc/sys/kernel/random/boot_id").read_text().strip(), Path("/proc/self/ns/pid").readlink()
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return {}
    return {} if state in "ZX" else {"machine": f"{boot} {space}", "started": fields[18]}


def _said(sign: bytes) -> dict[str, Any]:
    try:
        said = json.loads(sign)
    except (ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}

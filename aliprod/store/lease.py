"""Leases: which driver is at work on what in a storage path, whatever its cluster, its machine and its clock.

    .leases/NAME/TOKEN.N    a folder a lease, in it one file: who holds it, and a number that grows while that one lives
    .leases/NAME            in a bucket: one object of TOKEN.N and the same; empty where nobody holds it

Whoever waits looks at the bytes. Where they stand still for as long as it has patience, by its own monotonic clock, the
holder is dead or stopped: its file is renamed to one of the next holder's, which one driver alone can do, or its object
replaced on the condition that it is the one that was seen. The old holder, when it wakes up, finds its mark gone. A
process of this very machine that has ended is not waited for.

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

from aliprod.errors import AliprodError, Failed
from aliprod.store import commit, mirror
from aliprod.store.mirror import Mirror

FOLDER = ".leases"
PATIENCE_SECONDS = 30.0
_BEATS = 6  # signs of life while the others have patience
_FOLLOW_SECONDS = 2.0
_RACED = (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST, errno.ESTALE)  # another driver was faster
_AWAY = (OSError, AliprodError)  # of a storage path: a folder, a bucket
_MOST_BYTES, _MOST_LETTERS = 4096, 200  # of what somebody else has written


@dataclass(frozen=True)
class _Seen:
    """The marks in a lease, how long they have stood still, and when that was looked at."""

    marks: Mapping[str, bytes]
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
        self._kept = _kept(self.folder)
        self._patience, self._pause = patience, patience / _BEATS
        self._me = sign() | {"work": work}
        self._number, self._renewed = 0, time.monotonic()  # of signs of life; when the last was given
        self._held: dict[str, str] = {}  # our mark in each lease that we hold
        self._seen: dict[str, _Seen] = {}
        self._lock, self._closed = threading.RLock(), threading.Event()
        self._thread = threading.Thread(target=self._live, name="leases", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
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
            if not seen.marks or seen.silent >= self._patience or all(map(ended, seen.marks.values())):
                return ""
            return _words(next(iter(seen.marks.values())))

    def take(self, name: str) -> str:
        """Take a lease, where nobody else that is alive holds it: "" where it is ours now, else who holds it.
        StorageFull: the storage path cannot be written. Failed: as in `check`."""
        self.check()
        with self._lock, commit.storage(self.folder):
            if name in self._held:
                return ""
            return self.holder(name) or ("" if self._enter(name) else self.holder(name) or "another driver")

    def release(self, name: str) -> None:
        """Give a lease back; nothing happens where it is not held."""
        with self._lock, suppress(*_AWAY):
            if (own := self._held.pop(name, None)) is not None:
                self._kept.leave(name, own)

    def check(self) -> None:
        """Raise where a lease was lost. Failed: nothing more may be started or committed."""
        with self._lock, suppress(*_AWAY):
            if time.monotonic() - self._renewed > 2 * self._pause:  # were we stopped? The thread may not have run yet
                self._renew()
        if self.lost:
            raise Failed(
                f"{self.lost} has taken over: this driver gave no sign of life for {self._patience:.0f} s.",
                self.folder.parent,
                "Was it stopped? Finished work is intact; the same command waits for the other driver, and ends as it.",
            )

    def _enter(self, name: str) -> bool:
        """Put a mark of ours in the place of what was last seen there; False where another driver was faster."""
        self._number += 1
        own = f"{self.token}.{self._number}"
        if entered := self._kept.enter(name, own, self._sign(), sorted(self._seen[name].marks)):
            self._held[name] = own
        return entered

    def _live(self) -> None:
        while not self._closed.wait(self._pause):
            with self._lock, suppress(*_AWAY):  # a storage path that is away comes back, or fails what needs it
                self._renew()
                for name in self._kept.names():
                    self._look(name)

    def _renew(self) -> None:
        """Write a sign of life beside each mark of ours, never a new one: one that is gone was taken over."""
        self._number, self._renewed = self._number + 1, time.monotonic()
        for name, own in self._held.items():
            if not self._kept.renew(name, own, self._sign()):
                self.lost = next(map(_words, self._kept.marks(name).values()), f"Somebody who removed {name}")

    def _look(self, name: str) -> _Seen:
        """Look at a lease. A pause in which we were stopped ourselves does not count as the holder's silence."""
        marks, now, before = self._kept.marks(name), time.monotonic(), self._seen.get(name)
        same = before is not None and before.marks == marks
        silent = before.silent + min(now - before.at, self._pause) if same and before else 0.0
        self._seen[name] = _Seen(marks, silent, now)
        return self._seen[name]

    def _sign(self) -> bytes:
        return json.dumps(self._me | {"number": self._number}).encode()


def is_lost(storage: Path, name: str, token: str) -> bool:
    """Whether another driver has taken over a lease of the driver with this token."""
    marks = _kept(storage / FOLDER).marks(name)
    return bool(marks) and not any(mark.startswith(token) for mark in marks)


def follow(storage: Path, name: str, token: str) -> None:
    """End this process soon after a lease of its driver is lost: the driver may be stopped, and end nothing itself."""

    def watch() -> None:
        while not is_lost(storage, name, token):
            time.sleep(_FOLLOW_SECONDS)
        print(f"Another driver has taken over {name}: this process ends.", file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=watch, name="lease", daemon=True).start()


class _Files:
    """Leases in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def names(self) -> list[str]:
        return [place.name for place in self.folder.iterdir() if not place.name.startswith(".")]

    def marks(self, name: str) -> dict[str, bytes]:
        """The marks in a lease, each with the last sign of life; {} where it is not there or cannot be read: whoever
        then takes it finds out."""
        found: dict[str, bytes] = {}
        with suppress(OSError):
            for path in sorted((self.folder / name).iterdir()):
                with path.open("rb") as file:
                    found[path.name] = file.read(_MOST_BYTES)
        return found

    def enter(self, name: str, own: str, sign: bytes, stale: list[str]) -> bool:
        """Leave a mark in the place of those that are stale; False where another driver was faster."""
        place, fresh = self.folder / name, self.folder / f".{own}"
        try:
            commit.make_folder(fresh)
            (fresh / own).write_bytes(sign)
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
        return True

    def renew(self, name: str, own: str, sign: bytes) -> bool:
        """Give a sign of life; False where the mark is gone."""
        try:
            with (self.folder / name / own).open("r+b") as file:
                file.write(sign)
                file.truncate()
        except FileNotFoundError:
            return False
        return True

    def leave(self, name: str, own: str) -> None:
        (self.folder / name / own).unlink()
        (self.folder / name).rmdir()


class _Objects:
    """Leases in a bucket, with the methods of `_Files`."""

    def __init__(self, of: Mirror, folder: Path) -> None:
        self.bucket, self.prefix = of.bucket, of.key(folder)
        self.seen, self.own = dict[str, str | None](), dict[str, str]()  # versions: as they were read; as we left them

    def names(self) -> list[str]:
        found = self.bucket.list(self.prefix)
        return [key.removeprefix(f"{self.prefix}/") for key, one in found.items() if one["size"]]

    def marks(self, name: str) -> dict[str, bytes]:
        with suppress(AliprodError):
            found = self.bucket.find(f"{self.prefix}/{name}")
            self.seen[name] = found[1] if found else None
            own, line, sign = found[0].partition(b"\n") if found else (b"", b"", b"")
            return {own.decode(errors="replace"): sign[:_MOST_BYTES]} if line else {}
        return {}

    def enter(self, name: str, own: str, sign: bytes, _: list[str]) -> bool:
        return self._write(name, f"{own}\n".encode() + sign, self.seen[name])

    def renew(self, name: str, own: str, sign: bytes) -> bool:
        return self._write(name, f"{own}\n".encode() + sign, self.own[name])

    def leave(self, name: str, _: str) -> None:
        self._write(name, b"", self.own[name])

    def _write(self, name: str, content: bytes, before: str | None) -> bool:
        version = self.bucket.exchange(f"{self.prefix}/{name}", content, before)
        if version is not None:
            self.own[name] = version
        return version is not None


def _kept(folder: Path) -> _Files | _Objects:
    return _Files(folder) if (found := mirror.of(folder)) is None else _Objects(found, folder)


def _words(sign: bytes) -> str:
    """Who has written a sign of life."""
    said = commit.parsed(sign)
    if not said.keys() >= {"host", "pid", "work"}:
        return "a driver that left no name"
    words = f"{said['host']} pid {said['pid']} of {said['work']}"
    return "".join(filter(str.isprintable, words))[:_MOST_LETTERS]


def sign() -> dict[str, Any]:
    """What says who has written something; `ended` knows it again."""
    return {"host": socket.gethostname(), "pid": os.getpid()} | _process(os.getpid())


def ended(sign: bytes) -> bool:
    """Whether a process of this very machine has signed this JSON, and is no more."""
    said, here = commit.parsed(sign), _process(os.getpid())
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

"""A bucket of objects: s3://, gs:// or az://. An object appears whole or not at all.

Credentials, region and endpoint are those of the environment (AWS_..., GOOGLE_..., AZURE_...).
"""

import functools
import hashlib
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, GenericError, PreconditionError
from obstore.store import ObjectStore, from_url

from aliprod.errors import AliprodError, Refused, StorageFull, Unreachable

_T = TypeVar("_T")

SCHEMES = ("s3", "gs", "az")
THREADS = 4  # requests at a time
_SILENT_SECONDS = 20, 120  # without an answer, of reading and of writing: more than an object takes to send
_NAMES = ("e_tag", "version")
_BREAKS = 5  # of an answer, in a row
_RETRIES = 8, 16  # of reading, leases and manifests, and of files: a server is away for 25 s, for two minutes
_ADVICE = "Are its name, the credentials and the endpoint right (AWS_..., GOOGLE_..., AZURE_... in the environment)?"
_ENDPOINTS = ("AWS_ENDPOINT_URL", "AZURE_STORAGE_ENDPOINT", "GOOGLE_BASE_URL")
_BROKEN = re.compile(r"body error|retries: 0,.*kind: Timeout", re.DOTALL)  # what obstore does not ask for again
_TRIED = re.compile(r" in [\d.]+m?s.*? - ")  # in what obstore says of a request


def check_uri(uri: str) -> None:
    """Refused: it names no bucket, or holds keys or options, which would be part of names on disk."""
    scheme, _, place = uri.partition("://")
    parts = [part for part in place.split("/") if part]
    if scheme not in SCHEMES or not parts or {".", ".."} & set(parts):
        raise Refused("names no bucket.", uri, "s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, az://CONTAINER/PREFIX")
    if set("@:") & set(parts[0]) or "?" in uri:
        what = "holds keys or options, which come from the environment."
        raise Refused(what, uri.partition("?")[0], "AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL and others: docs/clusters.md.")


@functools.cache
def opened(uri: str) -> "Bucket":
    """The bucket at a URI, once for a process. Unreachable: what names its account, or lets us in, is not in the
    environment."""
    plain = any(os.environ.get(name, "").startswith("http://") for name in _ENDPOINTS)

    def store(silent: int, times: int) -> ObjectStore:
        seconds = {"connect_timeout": "10s", "read_timeout": f"{silent}s", "timeout": "3600s"}
        options: Any = {"allow_http": plain} | seconds
        retries: Any = {"max_retries": times, "retry_timeout": timedelta(minutes=2)}
        return from_url(uri, client_options=options, retry_config=retries)

    try:
        return Bucket(uri, *map(store, _SILENT_SECONDS, _RETRIES))
    except BaseError as error:
        raise Unreachable(f"cannot be opened: {_reason(error)}.", uri, _ADVICE) from error


@dataclass(frozen=True)
class Bucket:
    """A bucket at a URI. What it is asked for raises Unreachable where it does not answer or refuses; what it is given
    raises StorageFull."""

    uri: str
    store: ObjectStore = field(repr=False)  # obstore cannot show one of Azure whose account is in the environment
    patient: ObjectStore = field(repr=False)  # the same, for what took hours to make

    def get(self, key: str, most: float = math.inf) -> tuple[bytes, str]:
        """The bytes of an object and its version. FileNotFoundError: it is not there. OverflowError: it has more than
        ``most``."""

        def read() -> tuple[bytes, str]:
            found = obstore.get(self.store, key)
            if found.meta["size"] > most:
                raise OverflowError(f"has {found.meta['size']:,} bytes; more than {most:,} are refused")
            return bytes(found.bytes()), _version(found.meta)

        return self._asked(key, read)

    def find(self, key: str) -> tuple[bytes, str] | None:
        """The bytes of an object and its version; None where it is not there."""
        try:
            return self.get(key)
        except FileNotFoundError:
            return None

    def exchange(self, key: str, content: bytes, version: str | None) -> str | None:
        """Write an object where it is of the version that was read; None: where it is not there. Returns its new
        version; None where another writer was faster."""
        with self.given(key):
            try:
                mode: Any = "create" if version is None else dict(zip(_NAMES, version.split(), strict=False))
                return _version(_whole(lambda: obstore.put(self.store, key, content, mode=mode)))
            except (AlreadyExistsError, PreconditionError, FileNotFoundError):
                there = self.find(key)  # ours, where the answer was lost on the way and it was sent again
                return there[1] if there is not None and there[0] == content else None

    def put(self, key: str, content: bytes) -> str:
        """Write an object, in place of what was, in one request, of which nothing stays where the sender dies. Returns
        its version."""
        with self.given(key):
            return _version(_whole(lambda: obstore.put(self.patient, key, content, use_multipart=False)))

    def copy(self, key: str, to: str) -> bool:
        """Copy an object within the bucket; False where it is not there."""
        with self.given(to), suppress(FileNotFoundError):
            _whole(lambda: obstore.copy(self.patient, key, to))
            return True
        return False

    def holds(self, key: str) -> bool:
        """Whether an object is there."""
        try:
            return bool(self._asked(key, lambda: obstore.head(self.store, key)))
        except FileNotFoundError:
            return False

    def download(self, keys: Sequence[str], file: Path) -> str:
        """Write objects into a file, one behind the other; the sha256 of its bytes, "" where one is not there."""

        def read() -> str:
            digest = hashlib.sha256()
            with file.open("wb") as out:
                for key in keys:
                    for chunk in obstore.get(self.store, key).stream(min_chunk_size=8 << 20):
                        digest.update(chunk)
                        out.write(chunk)
                out.flush()
                os.fsync(out.fileno())  # its size alone is looked at later: a power cut may leave zeros
            return digest.hexdigest()

        try:
            return self._asked(keys[0], read)
        except FileNotFoundError:
            return ""

    def part(self, key: str, start: int, end: int) -> bytes:
        """The bytes of an object from ``start`` to before ``end``. FileNotFoundError: it is not there."""
        return self._asked(key, lambda: bytes(obstore.get_range(self.store, key, start=start, end=end)))

    def list(self, prefix: str) -> dict[str, Mapping[str, Any]]:
        """The objects below a prefix, by name: ``size``, ``e_tag`` and ``last_modified`` of each."""

        def read() -> dict[str, Mapping[str, Any]]:
            return {one["path"]: one for chunk in obstore.list(self.store, prefix or None) for one in chunk}

        return self._asked(prefix, read)

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects, in no order; those that are not there are removed."""

        def one(key: str) -> None:
            with self.given(key), suppress(FileNotFoundError):
                _whole(lambda: obstore.delete(self.patient, key))

        with ThreadPoolExecutor(THREADS) as threads:
            list(threads.map(one, keys))

    @contextmanager
    def given(self, key: str) -> Iterator[None]:
        """Say of whatever fails that an object could not be written."""
        try:
            yield
        except (BaseError, Unreachable) as error:
            what = f"cannot be written: {_reason(error)}."
            raise StorageFull(what, f"{self.uri}/{key}", f"Finished work is intact. {_ADVICE}") from error

    def _asked(self, key: str, ask: Callable[[], _T]) -> _T:
        try:
            return _whole(ask)
        except BaseError as error:
            raise Unreachable(f"does not answer: {_reason(error)}.", f"{self.uri}/{key}", _ADVICE) from error


def _version(said: Mapping[str, Any]) -> str:
    """The version of an object, its tag first: S3 and Azure compare tags, Google generations."""
    return " ".join(str(said[name]) for name in _NAMES if said[name])


def _whole(ask: Callable[[], _T]) -> _T:
    """The answer to a request; again where it breaks off, or does not come to a write."""
    for _ in range(_BREAKS):
        try:
            return ask()
        except GenericError as error:
            if not _BROKEN.search(str(error)):
                raise
    return ask()


def _reason(error: Exception) -> str:
    """What went wrong, without how often it was tried and the page that a server sent with it."""
    if isinstance(error, AliprodError):
        return error.what.removeprefix("does not answer: ").rstrip(".")
    return _TRIED.sub(": ", str(error).strip().splitlines()[0]).partition(": <")[0]

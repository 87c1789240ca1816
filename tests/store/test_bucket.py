"""A storage path in a bucket is as one in a folder: two machines, one server that is a process of its own, and all that
goes wrong between them."""

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from aliprod.cli import app
from aliprod.errors import Refused, StorageFull, Unreachable
from aliprod.store import bucket, commit, mirror
from aliprod.store.bucket import Bucket
from aliprod.store.mirror import Mirror
from aliprod.store.resumable import ResumableRows

EACH = pytest.mark.parametrize("machines", ["s3", "gs", "az"], indirect=True)
LARGE = 3 << 20  # bytes: more than comes with a manifest
Machines = Callable[[str], Path]


def writes(**files: bytes) -> Callable[[Path], None]:
    def fill(folder: Path) -> None:
        for name, content in files.items():
            (folder / name).write_bytes(content)

    return fill


def objects(path: Path) -> dict[str, bytes]:
    """All objects below a folder, by their name below it."""
    there = mirrored(path)
    prefix, bucket = f"{there.key(path)}/", there.bucket
    return {key.removeprefix(prefix): found[0] for key in bucket.list(prefix) if (found := bucket.find(key))}


def mirrored(path: Path) -> Mirror:
    found = mirror.of(path)
    assert found is not None
    return found


def put(path: Path, name: str, content: bytes) -> None:
    """Write an object below a folder, whatever is there."""
    there = mirrored(path).bucket
    key = f"{mirrored(path).key(path)}/{name}"
    before = there.find(key)
    assert there.exchange(key, content, before[1] if before else None)


# One folder, two machines


@EACH
def test_what_one_machine_has_committed_another_has_too_byte_for_byte_as_in_a_folder(
    machines: Machines, tmp_path: Path
) -> None:
    here, there, plain = machines("a") / "job/weights", machines("b") / "job/weights", tmp_path / "plain"
    fill, record = writes(small=b"s", large=os.urandom(LARGE)), {"epoch": 3}
    assert commit.read(there) is None
    assert (
        commit.write(here, fill, record) == commit.write(plain, lambda new: None or _copy(here, new), record) == record
    )
    assert commit.read(there) == record
    assert (there / "small").read_bytes() == b"s"
    assert not (there / "large").exists()  # until somebody needs it
    assert commit.fetch(there) == record
    files = {path.name: path.read_bytes() for path in there.iterdir()}
    assert files == {path.name: path.read_bytes() for path in here.iterdir()}
    assert files == {path.name: path.read_bytes() for path in plain.iterdir()}


def _copy(folder: Path, new: Path) -> None:
    for name in ("small", "large"):
        (new / name).write_bytes((folder / name).read_bytes())


@EACH
def test_of_two_machines_that_write_at_once_one_wins_and_both_have_its_bytes(machines: Machines) -> None:
    for round_ in range(5):
        folders, start = [machines(name) / f"job-{round_}" for name in "ab"], threading.Barrier(2)

        def write(number: int, folders: list[Path] = folders, start: threading.Barrier = start) -> dict[str, Any]:
            start.wait()
            return commit.write(folders[number], writes(file=bytes([number]) * LARGE), {"by": number})

        with ThreadPoolExecutor(2) as threads:
            said = list(threads.map(write, range(2)))
        assert said[0] == said[1]
        for folder in folders:
            assert commit.verify(folder) == []
            assert (folder / "file").read_bytes()[0] == said[0]["by"]


@EACH
def test_a_large_file_is_sent_in_parts_of_which_those_that_are_there_are_not_sent_again(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "_PART", 1 << 20)
    here, there, content = machines("a") / "job/weights", machines("b") / "job/weights", os.urandom(LARGE + 1)
    commit.write(here, writes(large=content))
    whole = objects(here)
    parts = sorted(name for name in whole if name.split("/")[-1].startswith("large."))
    assert b"".join(whole[name] for name in parts) == content
    assert {len(whole[name]) for name in parts} == {1 << 20, 1}
    mirrored(here).bucket.delete([f"{mirrored(here).key(here)}/{name}" for name in (parts[1], commit.MANIFEST)])
    sent, put_ = list[str](), Bucket.put
    monkeypatch.setattr(Bucket, "put", lambda self, key, what: sent.append(key) or put_(self, key, what))
    commit.write(there, writes(large=content))  # as the sender's next try, which nobody else has made meanwhile
    assert [key.rpartition("/")[2] for key in sent] == ["large.0001"]
    assert objects(here).keys() == whole.keys()
    machines("c")
    assert commit.fetch(machines("c") / "job/weights") == {}
    assert (machines("c") / "job/weights/large").read_bytes() == content
    part = commit.part_reader(machines("d") / "job/weights")
    for start, size in ((0, 7), ((1 << 20) - 3, 4), (5, 1 << 20), (1 << 20, 1)):
        assert part("large", start, size) == content[start : start + size]
    assert not (machines("d") / "job/weights/large").exists()
    commit.replace(here, writes(large=b"x"), {})
    assert len(objects(here)) == 2


@EACH
def test_what_is_replaced_is_seen_by_the_other_machine_and_leaves_nothing_behind(machines: Machines) -> None:
    here, there = machines("a") / "plan/ensemble", machines("b") / "plan/ensemble"
    for number in range(3):
        commit.replace(here, writes(file=bytes([number]) * LARGE, same=b"same"), {"target": number})
        assert commit.read(there, again=True) == {"target": number}
        assert commit.fetch(there) == {"target": number}
        assert (there / "file").read_bytes()[0] == number
    assert len(objects(here)) == 3  # two files and the manifest


@EACH
def test_of_two_that_replace_at_once_the_one_that_stays_is_whole(machines: Machines) -> None:
    folders = [machines(name) / "plan/ensemble" for name in "ab"]
    commit.replace(folders[0], writes(file=b"0" * LARGE), {"target": "before"})
    for round_ in range(5):
        start = threading.Barrier(2)

        def replace(number: int, start: threading.Barrier = start, round_: int = round_) -> None:
            start.wait()
            commit.replace(folders[number], writes(file=bytes([round_, number]) * LARGE), {"target": number})

        with ThreadPoolExecutor(2) as threads:
            list(threads.map(replace, range(2)))
        records = [commit.fetch(folder) for folder in folders]
        assert records[0] == records[1]
        assert commit.verify(folders[0]) == commit.verify(folders[1]) == []


@EACH
def test_a_file_that_others_wrote_comes_with_a_refresh_and_what_they_removed_goes(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = machines("a"), machines("b")
    commit.write_file(here / "plan/state.json", "one")
    commit.write(here / "job/weights", writes(file=b"x"))
    commit.write(here / "job/resume/step-1", writes(file=b"x" * LARGE))
    commit.refresh(there)
    assert (there / "plan/state.json").read_text() == "one"
    assert commit.read(there / "job/resume/step-1") == {}
    commit.write_file(here / "plan/state.json", "two")
    commit.remove(here / "job/resume")
    monkeypatch.setattr(mirror, "_SETTLED_SECONDS", -1.0)
    commit.refresh(there)
    assert (there / "plan/state.json").read_text() == "two"
    assert not (there / "job/resume/step-1").exists()
    assert commit.read(there / "job/weights") == {}


def test_a_folder_that_is_not_yet_in_a_listing_stays(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = machines("a") / "job/weights"
    commit.write(folder, writes(file=b"x"), {"epoch": 1})
    monkeypatch.setattr(Bucket, "list", lambda *_: {})
    commit.refresh(folder.parent)
    assert commit.read(folder) == {"epoch": 1}


@EACH
def test_rows_are_made_in_parts_by_two_machines_and_sent_once(machines: Machines) -> None:
    ids, classes = pa.array([str(number) for number in range(4)], pa.string()), np.arange(2)
    size = 1 << 19  # values of a row: two megabytes

    def rows(name: str) -> ResumableRows:
        return ResumableRows(machines(name) / "job/predictions", ids, classes, {"split": "test"}, per_shard=1)

    def blocks(missing: Any) -> Iterator[dict[str, Any]]:
        yield {"p": np.repeat(missing[:, None], size, axis=1).astype(np.float32)}

    first, second = rows("a"), rows("b")
    assert first.finish(blocks, lambda new: first.link("p", new), part=(0, 2)) == {}
    sent = set(objects(first.folder.parent))
    assert second.finish(blocks, lambda new: second.link("p", new), part=(1, 2)) == {"split": "test"}
    assert len(sent) == 2 * 2
    assert commit.fetch(first.folder) == {"split": "test"}
    for number in range(4):
        shard = np.load(first.folder / f"p-{number:05d}.npy")
        assert shard.shape == (1, size)
        assert (shard == number).all()
    assert set(objects(first.folder.parent)) == {
        f"predictions/{name}" for name in objects(first.folder)
    }  # nothing is left of the shards


def test_a_disk_that_fills_loses_what_the_bucket_has_and_nobody_has_used_for_long(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [machines("a") / f"job/{number}" for number in range(4)]
    for number, folder in enumerate(folders[:3]):
        commit.write(folder, writes(large=bytes([number]) * LARGE, small=b"s"))
        os.utime(folder / "large", (1e9 + number, 1e9 + number))
    disk = shutil.disk_usage(folders[0])
    spare = (disk.free + LARGE) / disk.total  # a little more than there is: one file is enough
    monkeypatch.setattr(mirror, "_SPARE", spare)
    commit.fetch(folders[2])
    commit.write(folders[3], writes(large=b"x" * LARGE))
    assert [(folder / "large").exists() for folder in folders] == [False, False, True, True]
    assert all((folder / "small").exists() for folder in folders[:3])
    monkeypatch.setattr(mirror, "_SPARE", 0.0)
    for number, folder in enumerate(folders[:3]):
        assert commit.verify(folder) == []
        assert (folder / "large").read_bytes()[0] == number


# Damage


@EACH
def test_damage_here_is_mended_from_the_bucket_and_damage_there_is_found(machines: Machines) -> None:
    here, there = machines("a") / "job/weights", machines("b") / "job/weights"
    commit.write(here, writes(file=b"x" * LARGE))
    (here / "file").write_bytes(b"y" * LARGE)
    assert commit.verify(here) == []
    assert (here / "file").read_bytes() == b"x" * LARGE
    [name] = [name for name in objects(here) if name.endswith("/file")]
    put(here, name, b"y" * LARGE)
    assert commit.verify(there) == ["file"]
    assert not (there / "file").exists()
    assert commit.verify(here) == []  # whose own copy is good


def test_a_manifest_that_is_damaged_is_none(machines: Machines) -> None:
    here, there = machines("a") / "job/weights", machines("b") / "job/weights"
    commit.write(here, writes(file=b"x"))
    put(here, commit.MANIFEST, b'{"files": {"../../evil": {"bytes": 1, "sha256": "0"}}, "record": {}}')
    assert commit.read(there) is None
    assert commit.verify(there) == [commit.MANIFEST]


def test_a_manifest_that_names_files_elsewhere_writes_none_there(machines: Machines) -> None:
    here, there = machines("a") / "job/weights", machines("b") / "job/weights"
    commit.write(here, writes(file=b"x"))
    digest = commit.sha256(here / "file")
    said = {
        "files": {"../out": {"bytes": 1, "sha256": digest}, "/tmp/out": {"bytes": 1, "sha256": digest}},
        "record": {},
    }
    put(here, commit.MANIFEST, json.dumps(said | {"sha256": commit._seal(said)}).encode())
    commit.fetch(there)
    assert {path.name for path in there.rglob("*")} == {commit.MANIFEST}
    assert not (there.parent / "out").exists()


# Killed at any moment

KILLED = """
import os, sys
from pathlib import Path
from aliprod.store import bucket, commit, mirror
folder = mirror.place(sys.argv[1]) / "job"
print("ready", flush=True)
for number in range(1000):
    def fill(new):
        for name in "abc":
            (new / name).write_bytes(bytes([number % 256]) * (2 << 20))
    commit.write(folder / str(number), fill, {"number": number})
"""


def test_a_writer_that_is_killed_leaves_all_of_a_folder_or_nothing(machines: Machines) -> None:
    here, there = machines("a"), machines("b")
    moments = random.Random(0)
    for _ in range(2):
        command = [sys.executable, "-c", KILLED, mirror.shown(here)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline()
            time.sleep(moments.uniform(0.3, 1.2))
            process.kill()
    found = list(map(there.joinpath, {f"job/{name.split('/')[0]}" for name in objects(here / "job")}))
    whole = [path for path in found if commit.read(path) is not None]
    assert whole
    for path in whole:
        assert commit.verify(path) == []
        assert {(path / name).read_bytes()[0] for name in "abc"} == {int(path.name) % 256}
    torn = set(found) - set(whole)
    assert len(torn) <= 2  # no more than the folder that each was at when it was killed
    for path in torn:  # half of it is there: it is written anew
        assert commit.write(path, writes(a=b"new"), {}) == {}
        assert commit.verify(path) == []


def test_what_a_killed_writer_has_sent_is_swept_by_the_next_once_it_is_old(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = machines("a") / "job/weights"
    put(folder, "0123456789abcdef/file", b"torn")
    commit.write(folder, writes(file=b"x"))
    assert len(objects(folder)) == 3  # it may be of a writer who is at it now
    monkeypatch.setattr(mirror, "_ORPHAN", timedelta(seconds=-60))
    commit.replace(folder, writes(file=b"y"), {})
    assert len(objects(folder)) == 2
    steps = machines("a") / "job/resume"
    put(steps, "step-3/0123456789abcdef/file", b"torn")
    commit.remove(steps)  # as a job does in the end
    assert objects(steps) == {}


# A server that is away, slow, or wrong


class Faulty(BaseHTTPRequestHandler):
    """Hands requests on to the server, but for those that it answers as a busy or dying one."""

    protocol_version = "HTTP/1.1"
    server: "FaultyServer"

    def _any(self) -> None:
        fault = self.server.fault(self.command)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if fault == "silent":
            time.sleep(2)
        if fault in ("torn", "silent"):
            self.close_connection = True
            self.connection.close()
            return
        if fault in ("500", "503"):
            self._answer(int(fault), {}, b"<Error><Code>SlowDown</Code></Error>")
            return
        onward = HTTPConnection(*self.server.behind, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
        onward.request(self.command, self.path, body or None, headers)
        response = onward.getresponse()
        content = response.read()
        if fault == "lost":  # it was done, and nobody hears of it
            self.close_connection = True
            self.connection.close()
            return
        if fault == "half" and len(content) > 100:
            self._answer(response.status, dict(response.getheaders()), content, sent=len(content) // 2)
            self.close_connection = True
            self.connection.close()
            return
        self._answer(response.status, dict(response.getheaders()), content)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _any

    def _answer(self, status: int, headers: dict[str, str], content: bytes, sent: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("transfer-encoding", "connection", "content-length", "date", "server"):
                self.send_header(name, value)
        length = headers.get("Content-Length", str(len(content))) if self.command == "HEAD" else str(len(content))
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            with suppress(OSError):
                self.wfile.write(content[:sent])

    def log_message(self, *_: object) -> None:
        pass


class FaultyServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, behind: str, faults: Callable[[str], str]) -> None:
        super().__init__(("127.0.0.1", 0), Faulty)
        parts = urlsplit(behind)
        self.behind, self.fault = (str(parts.hostname), parts.port), faults

    def handle_error(self, *_: object) -> None:
        pass


@contextmanager
def between(behind: str, faults: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have all requests go by a server that is not well."""
    server = FaultyServer(behind, faults)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    bucket.opened.cache_clear()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        monkeypatch.setenv("AWS_ENDPOINT_URL", behind)
        bucket.opened.cache_clear()


@pytest.mark.parametrize("kind", ["500", "503", "torn", "lost", "half", "silent"])
def test_what_goes_wrong_on_the_way_is_done_again_and_the_bytes_are_the_same(
    kind: str, s3: str, machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance, share = random.Random(kind), 0.06 if kind == "silent" else 0.25
    monkeypatch.setattr(bucket, "_SILENT_SECONDS", (1, 1))
    content = random.Random(1).randbytes(LARGE)
    here, there = machines("a"), machines("b")
    with between(s3, lambda _: kind if chance.random() < share else "", monkeypatch):
        for number in range(2):
            folder = here / f"job/{number}"
            assert commit.write(folder, writes(large=content, small=b"s"), {"number": number}) == {"number": number}
            commit.replace(here / "plan/ensemble", writes(large=content + bytes([number])), {"target": number})
            commit.write_file(here / "plan/state.json", str(number))
            assert commit.part_reader(there / f"job/{number}")("large", 9, 99) == content[9:108]
            assert commit.verify(there / f"job/{number}") == []
            assert (there / f"job/{number}/large").read_bytes() == content
            assert commit.fetch(there / "plan/ensemble") == {"target": number}
            assert (there / "plan/ensemble/large").read_bytes() == content + bytes([number])
            commit.refresh(there / "plan")
            assert (there / "plan/state.json").read_text() == str(number)


def test_a_copy_whose_answer_breaks_off_is_asked_for_again(
    s3: str, machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders, broken = [machines("a") / f"job/{number}" for number in range(2)], iter([True, False])
    commit.write(folders[0], writes(large=b"x" * LARGE))
    with between(s3, lambda method: "half" if method == "PUT" and next(broken, False) else "", monkeypatch):
        commit.write(folders[1], writes(large=b"x" * LARGE))
    assert next(broken, None) is None  # it was copied, twice
    assert commit.verify(folders[1]) == []


def test_a_server_that_is_gone_is_said_in_a_sentence_and_nothing_is_there_by_half(
    s3: str, machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = machines("a") / "job/weights"
    monkeypatch.setattr(bucket, "_RETRIES", (1, 2))
    with between(s3, lambda _: "500", monkeypatch):
        with pytest.raises(StorageFull, match=r"cannot be written: .*500"):
            commit.write(folder, writes(file=b"x"))
        with pytest.raises(Unreachable, match="does not answer"):
            commit.read(folder)
    assert commit.read(folder) is None
    assert commit.write(folder, writes(file=b"y"), {"n": 1}) == {"n": 1}


def test_a_bucket_that_is_not_there_ends_a_command_in_a_sentence(machines: Machines) -> None:
    machines("a")
    for storage in ("s3://nobody-has-this/x", "s3:", "s3://team/../x", "az://of-no-account/x"):
        result = CliRunner().invoke(app, ["trace", __file__, "--storage", storage])
        assert result.exit_code in (2, 3), result.output
        assert "Traceback" not in result.output
        assert len(result.output) < 600
    assert isinstance(result.exception, SystemExit)


def test_a_submission_in_a_bucket_is_scored_by_its_uri(machines: Machines, tmp_path: Path) -> None:
    submission = machines("a") / "plan/submission.csv"
    commit.write_file(submission, "id,predicted\none.jpg,1\ntwo.jpg,2\n")
    (tmp_path / "labels.csv").write_text("id,class_id\none.jpg,1\ntwo.jpg,1\n")
    machines("b")
    result = CliRunner().invoke(app, ["evaluate", mirror.shown(submission), str(tmp_path / "labels.csv"), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["top1_error"] == 0.5


@given(
    st.sampled_from(["s3", "gs", "az"]),
    st.lists(st.text("abc-.", min_size=1).filter(lambda s: s.strip(".")), min_size=1),
)
def test_a_uri_is_known_by_its_mirror(scheme: str, parts: list[str]) -> None:
    uri = f"{scheme}://{'/'.join(parts)}"
    found = mirror.place(Path(uri))
    assert found is not None
    assert mirror.shown(found) == uri
    assert mirror.place(found) is None


def test_what_names_no_bucket_is_refused_or_a_path() -> None:
    for stated in ("runs", "/mnt/s3/x", "s3", "s3files/x", "./s3:x"):
        assert mirror.place(stated) is None
        assert mirror.of(Path(stated)) is None
    for stated in (
        "az:///",
        "s3://team/../other",
        "gs://.",
        "s3://",
        "s3:",
        " gs://",
        "S3://b",
        "hdfs://a/b",
        "file://b",
    ):
        with pytest.raises(Refused, match="names no bucket"):
            mirror.place(stated)


@pytest.mark.parametrize("said", ["key:{}@team/x", "key:hun/{}@team/x", "key:a@{}@team/x", "team/x?token={}"])
def test_keys_in_a_uri_are_refused_and_not_shown(said: str) -> None:
    uri = f"s3://{said.format('hunter2')}"
    for stated in (uri, Path(uri)):
        with pytest.raises(Refused, match=r"^s3://team/x: holds keys or options") as told:
            mirror.place(stated)
        assert "hunter2" not in str(told.value)
    assert mirror.place("s3://team/someone@home:8") is not None
    assert "hunter2" not in CliRunner().invoke(app, ["trace", __file__, "--storage", uri]).output

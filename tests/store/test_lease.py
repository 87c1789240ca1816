"""A lease is one driver's, until it gives it back, dies, or is stopped: processes are really killed here."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aliprod.errors import Failed, StorageFull
from aliprod.store import lease
from aliprod.store.lease import Leases, is_lost

PATIENCE = 0.6  # seconds
WORDS = f"pid {os.getpid()} of plan a"

HOLDER = """
import sys, time
from pathlib import Path
from aliprod.store.lease import Leases
with Leases(Path(sys.argv[1]), "plan other", float(sys.argv[2])) as leases:
    print(leases.take("x") or "held", flush=True)
    for line in sys.stdin:
        try:
            leases.check()
            print("holds", flush=True)
        except Exception as error:
            print(error.what, flush=True)
"""

RIVAL = """
import os, sys, time
from pathlib import Path
from aliprod.store.lease import Leases
log = os.open(sys.argv[2], os.O_APPEND | os.O_WRONLY)
with Leases(Path(sys.argv[1]), "plan other", float(sys.argv[3])) as leases:
    while True:
        if not leases.take("x"):
            os.write(log, b"enter %d\\n" % os.getpid())
            time.sleep(0.01)
            os.write(log, b"leave %d\\n" % os.getpid())
            leases.release("x")
"""


@contextmanager
def other(storage: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process, which holds x; it answers each line with what it knows of its lease."""
    command = [sys.executable, "-c", HOLDER, storage, str(PATIENCE)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert line_of(process) == "held"
            yield process
        finally:
            process.kill()


def line_of(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def asked(process: "subprocess.Popen[str]") -> str:
    assert process.stdin is not None
    process.stdin.write("?\n")
    process.stdin.flush()
    return line_of(process)


def until(true: Callable[[], object], seconds: float = 20 * PATIENCE) -> float:
    """Wait for something; how long it took."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < seconds, "it did not happen in time"
        time.sleep(0.01)
    return time.monotonic() - began


def driver(storage: Path, work: str = "plan b") -> Leases:
    return Leases(storage, work, PATIENCE)


@pytest.fixture
def from_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a system that does not say what its processes are, or seen from another machine."""
    monkeypatch.setattr(lease, "_process", lambda pid: {})


def test_a_lease_is_one_drivers_until_it_gives_it_back(storage: Path) -> None:
    with driver(storage, "plan a") as a, driver(storage) as b:
        assert a.take("x") == a.take("x") == a.holder("x") == ""
        assert b.take("x").endswith(WORDS)
        assert b.holder("x") == b.take("x")
        assert b.take("y") == ""
        a.release("x")
        assert b.holder("x") == b.take("x") == ""
        assert a.take("x").endswith("of plan b")


def test_the_end_of_a_driver_gives_back_all_that_it_held_at_once_and_leaves_nothing(storage: Path) -> None:
    with driver(storage) as b, ExitStack() as stack:
        began = time.monotonic()
        a = stack.enter_context(driver(storage, "plan a"))
        assert a.take("x") == a.take("y") == ""
        assert b.take("x")
        stack.close()
        assert b.take("x") == b.take("y") == ""
        assert time.monotonic() - began < PATIENCE / 2
    assert not any(b._kept.marks(name) for name in b._kept.names())


def test_a_lease_is_kept_for_longer_than_others_have_patience(storage: Path) -> None:
    with driver(storage, "plan a") as a, driver(storage) as b:
        assert a.take("x") == ""
        end = time.monotonic() + 3 * PATIENCE
        while time.monotonic() < end:
            assert b.take("x").endswith(WORDS)
            time.sleep(0.02)
        a.check()


def test_a_process_of_this_machine_that_was_killed_is_not_waited_for(storage: Path) -> None:
    with other(storage) as process, driver(storage) as b:
        assert b.take("x").endswith(f"pid {process.pid} of plan other")
        process.kill()
        assert until(lambda: b.take("x") == "") < PATIENCE  # it is not even reaped yet


@pytest.mark.usefixtures("from_elsewhere")
def test_one_of_another_machine_that_was_killed_is_waited_for_as_long_as_we_have_patience(storage: Path) -> None:
    with other(storage) as process, driver(storage) as b:
        assert b.take("x")
        process.kill()
        assert 0.5 * PATIENCE < until(lambda: b.take("x") == "") < 4 * PATIENCE


@pytest.mark.usefixtures("from_elsewhere")
def test_what_was_seen_silent_while_we_waited_for_something_else_is_not_waited_for_again(storage: Path) -> None:
    with other(storage) as process, driver(storage) as b:
        process.kill()
        process.wait()
        time.sleep(2 * PATIENCE)
        assert b.take("x") == ""


def test_a_stopped_driver_is_taken_over_and_finds_out_when_it_goes_on(storage: Path) -> None:
    with other(storage) as process, driver(storage) as b:
        assert asked(process) == "holds"
        process.send_signal(signal.SIGSTOP)
        assert 0.5 * PATIENCE < until(lambda: b.take("x") == "") < 4 * PATIENCE
        process.send_signal(signal.SIGCONT)
        assert f"pid {os.getpid()} of plan b has taken over" in asked(process)
        time.sleep(2 * PATIENCE / lease._BEATS)  # whatever it still writes harms us not
        b.check()
        assert b.take("x") == ""
        assert [mark.split(".")[0] for mark in b._kept.marks("x")] == [b.token]


def test_a_driver_that_was_stopped_for_less_goes_on(storage: Path) -> None:
    with other(storage) as process, driver(storage) as b:
        process.send_signal(signal.SIGSTOP)
        time.sleep(PATIENCE / 3)
        process.send_signal(signal.SIGCONT)
        assert asked(process) == "holds"
        assert b.take("x")


def test_whoever_was_stopped_itself_does_not_count_that_as_the_silence_of_others(storage: Path) -> None:
    with driver(storage, "plan a") as a:
        assert a.take("x") == ""
        a._closed.set()  # it gives no sign any more
        b = driver(storage)  # its thread is not started: it looks when we say
        assert b.take("x")
        time.sleep(2 * PATIENCE)
        assert b.take("x")


@pytest.mark.parametrize("days", [3, -3])
def test_a_clock_that_jumps_changes_nothing(tmp_path: Path, days: int) -> None:
    jumped = time.time() + days * 86400
    with driver(tmp_path, "plan a") as a, driver(tmp_path) as b, mock.patch("time.time", return_value=jumped):
        assert a.take("x") == ""
        for path in (tmp_path / lease.FOLDER / "x").iterdir():
            os.utime(path, (jumped, jumped))
        assert b.take("x").endswith(WORDS)
        time.sleep(1.5 * PATIENCE)
        assert b.take("x").endswith(WORDS)
        a.check()


@settings(max_examples=15, deadline=None)
@given(garbage=st.binary(max_size=60) | st.sampled_from([b"", b"[]", b"3", b"[" * 9000, b'{"pid": "x", "machine": 1}']))
def test_garbage_in_a_lease_is_a_driver_without_a_name_that_is_silent(
    tmp_path_factory: pytest.TempPathFactory, garbage: bytes
) -> None:
    storage = tmp_path_factory.mktemp("garbage")
    place = storage / lease.FOLDER / "x"
    place.mkdir(parents=True)
    (place / "somebody").write_bytes(garbage)
    with Leases(storage, "plan b", 0.1) as b:
        assert b.take("x") == "a driver that left no name"
        until(lambda: b.take("x") == "", 10)
        assert [path.name.split(".")[0] for path in place.iterdir()] == [b.token]


def test_garbage_written_over_a_live_lease_is_mended_by_its_holder(tmp_path: Path) -> None:
    with driver(tmp_path, "plan a") as a, driver(tmp_path) as b:
        assert a.take("x") == ""
        [file] = (tmp_path / lease.FOLDER / "x").iterdir()
        file.write_bytes(os.urandom(9000))
        until(lambda: b.take("x").endswith(WORDS))
        assert json.loads(file.read_bytes())["work"] == "plan a"
        a.check()


def test_what_somebody_writes_does_not_reach_a_terminal_as_a_command(tmp_path: Path) -> None:
    place = tmp_path / lease.FOLDER / "x"
    place.mkdir(parents=True)
    (place / "y").write_text(json.dumps({"host": "\x1b[2J\nhost", "pid": 1, "work": "w" * 999}))
    words = driver(tmp_path).take("x")
    assert words.isprintable()
    assert len(words) <= 200


@pytest.mark.parametrize("kind", ["empty folder", "file", "two files"])
def test_what_is_no_lease_is_no_obstacle(tmp_path: Path, kind: str) -> None:
    place = tmp_path / lease.FOLDER / "x"
    place.parent.mkdir()
    if kind == "file":
        place.write_text("?")
    else:
        place.mkdir()
        for name in ("one", "two") if kind == "two files" else ():
            (place / name).write_text("?")
    with driver(tmp_path) as b, driver(tmp_path, "plan a") as a:
        until(lambda: b.take("x") == "")
        assert a.take("x").endswith("of plan b")
        assert len(list(place.iterdir())) == 1


@pytest.mark.parametrize("free", [True, False], ids=["nobody's", "of one that was killed"])
def test_of_many_that_ask_at_once_one_has_it(storage: Path, tmp_path: Path, free: bool) -> None:
    for _ in range(8):
        with ExitStack() as stack:
            if not free:
                with other(storage) as process:
                    process.kill()
            rivals = [stack.enter_context(driver(storage)) for _ in range(8 if storage == tmp_path else 3)]
            start, answers = threading.Barrier(len(rivals)), list[str]()

            def race(rival: Leases, start: threading.Barrier = start, answers: list[str] = answers) -> None:
                start.wait()
                answers.append(rival.take("x"))

            threads = [threading.Thread(target=race, args=(rival,)) for rival in rivals]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert answers.count("") == 1, answers
            time.sleep(PATIENCE / lease._BEATS)
            for rival in rivals:
                rival.check()
        if not free:
            break


def test_no_two_processes_are_ever_at_work_at_once_though_they_are_killed_at_any_moment(
    storage: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    log.touch()
    command = [sys.executable, "-c", RIVAL, storage, log, "60"]
    rivals = [subprocess.Popen(command) for _ in range(2)]
    killed = set()
    try:
        for _ in range(3):
            seen, victim = len(log.read_bytes().splitlines()), rivals.pop(0)
            until(lambda seen=seen: len(log.read_bytes().splitlines()) > seen + 20, 30)
            until(lambda victim=victim: str(victim.pid) in log.read_text().split(), 30)
            killed.add(str(victim.pid))
            victim.kill()
            rivals.append(subprocess.Popen(command))
            victim.wait()
    finally:
        for rival in (victim, *rivals):
            rival.kill()
            rival.wait()
    at_work = ""
    for what, pid in (line.split() for line in log.read_text().splitlines()):
        assert at_work in ("", *killed) if what == "enter" else at_work == pid
        at_work = pid if what == "enter" else ""
    assert len({line.split()[1] for line in log.read_text().splitlines()}) >= 3


def test_a_lease_that_changed_hands_since_it_was_judged_is_not_taken_from_the_new_holder(storage: Path) -> None:
    slow = driver(storage)
    with other(storage) as process:
        process.kill()
    assert slow.holder("x") == ""  # judged: it is free
    with driver(storage, "plan a") as a:
        assert a.take("x") == ""
        assert not slow._enter("x")
        time.sleep(2 * PATIENCE / lease._BEATS)
        a.check()
        assert slow.take("x").endswith(WORDS)
        a.release("x")
        assert not slow.holder("x")
        assert a.take("x") == ""
        assert not slow._enter("x")


def test_a_storage_path_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / lease.FOLDER).write_text("in the way")
    with pytest.raises(StorageFull, match="cannot be written"):
        driver(tmp_path).take("x")


def test_a_lease_that_somebody_removes_is_lost(tmp_path: Path) -> None:
    with driver(tmp_path) as b:
        assert b.take("x") == ""
        [file] = (tmp_path / lease.FOLDER / "x").iterdir()
        file.unlink()
        until(lambda: b.lost)
        with pytest.raises(Failed, match="has taken over"):
            b.check()


def test_a_process_that_works_for_a_driver_ends_when_that_has_lost_its_lease(tmp_path: Path) -> None:
    with driver(tmp_path, "plan a") as a:
        assert a.take("x") == ""
        program = "import sys, time; from pathlib import Path; from aliprod.store import lease\n"
        program += "lease.follow(Path(sys.argv[1]), 'x', sys.argv[2]); print('?', flush=True); time.sleep(60)"
        command = [sys.executable, "-c", program, tmp_path, a.token]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert line_of(process) == "?"
            assert not is_lost(tmp_path, "x", a.token)
            a._closed.set()  # as one that is stopped
            with driver(tmp_path) as b:
                until(lambda: b.take("x") == "")
                assert is_lost(tmp_path, "x", a.token)
                assert process.wait(20) == 1
        a.release("x")
    assert not is_lost(tmp_path, "x", a.token), "nobody has it"

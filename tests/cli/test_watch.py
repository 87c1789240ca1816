"""A run on its way as it is printed, to a file and to a terminal."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from shop import Shop

from aliprod.build.events import Standing
from aliprod.cli.watch import _Watch

PROGRAM = """
import sys, time
from pathlib import Path
from aliprod.build.events import Began, Changed, Ended, Reported, Said, Standing, Task
from aliprod.cli import watch
from aliprod.cli.flags import Asked
import click

@click.command()
def app():
    opened = Asked(Path(sys.argv[1]), (), Path(sys.argv[2])).opened()
    training = Task("net/full", "training", "net/full", ("a", "b"), time.time() - 65)
    standing = Standing({"net/full": "running", "net/accuracy": "waiting"}, {"net/accuracy": "2 GPUs"}, (training,))
    events = [
        Said("Reading the catalogue."),
        Began(opened),
        Standing({"net/full": "waiting"}, {"net/full": "1 CPU"}),
        Changed("net/full", "running", world_size=2),
        standing,
        Reported("net/full", {"epoch": 0, "train/loss": 1.0}),
        Task("net/full test", "prediction", "net/full", ("a",), 100.0),
        Ended({}),
    ]
    watch._LINE_SECONDS = watch._WAITING_SECONDS = 0.0
    assert [*watch.watched(iter(events))] == events
app([])
"""


@pytest.fixture
def command(shop: Shop) -> list[str | Path]:
    return [sys.executable, "-c", PROGRAM, shop.plan, shop.storage]


def test_a_log_has_a_line_for_each_event_and_one_a_minute(command: list[str | Path]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    said = [line[10:] for line in done.stdout.splitlines()]
    assert said[0] == "Reading the catalogue."
    assert said[1].startswith("2 jobs, all to train; 1 members; ")
    assert said[2:-1] == [
        "0 of 1 jobs done, 1 waiting for 1 CPU",
        "net/full                   running on 2 ranks",
        "0 of 2 jobs done, 1 running, 1 waiting for 2 GPUs (net/full x2 epoch 0/1 starting)",
        "net/full                   epoch 1: loss 1.0000, 0 images/s",
        "net/full test              prediction begins",
    ]
    assert done.stdout.splitlines()[-1] == "It took 0 s."
    assert "\x1b" not in done.stdout


def test_what_is_waited_for_is_said_within_half_a_minute() -> None:
    watch = _Watch(None)
    idle, waits = (Standing({"net/full": "waiting"}, reasons) for reasons in ({}, {"net/full": "2 GPUs"}))
    assert (watch._pause(idle), watch._pause(waits)) == (60.0, 15.0)


def test_a_terminal_has_a_table_that_is_gone_at_the_end(command: list[str | Path]) -> None:
    ours, its = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
    with subprocess.Popen(command, stdout=its, stderr=its, env=environment) as process:
        os.close(its)
        shown = b""
        try:
            while piece := os.read(ours, 65536):
                shown += piece
        except OSError:  # how a terminal ends
            pass
    os.close(ours)
    assert process.returncode == 0, shown
    text = shown.decode()
    assert "top-1 error" in text
    assert "0 of 2 jobs done, 1 running, 1 waiting for 2 GPUs" in text
    assert "epoch 1: loss" not in text, "the table has it"
    assert "It took 0 s." in text
    assert text.rindex("\x1b[2K") > text.rindex("1 waiting for 2 GPUs"), "the table is taken away"

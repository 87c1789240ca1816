"""The sending thread alone, with something that is away and comes back."""

import threading
import time

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

from aliprod.tracking import sync
from aliprod.tracking.sync import Part, Sender


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    monkeypatch.setattr(sync, "HURRIED_SECONDS", 0.02)


class Post:
    """What stands for MLflow: takes letters while it is open."""

    def __init__(self, is_open=True):
        self.open, self.letters = is_open, []

    def probe(self):
        if not self.open:
            raise MlflowException("API request failed: Connection refused")

    def letter(self, letter):
        """The part that is sent as a letter."""

        def send():
            self.probe()
            self.letters.append(letter)

        return Part(str(letter), letter, send)


def test_order_survives_an_absence_and_two_lines_tell_of_it():
    post, lines = Post(is_open=False), []
    sender = Sender(post.probe, lines.append)
    began = time.monotonic()
    for count in range(1, 101):
        sender.show(lambda count=count: map(post.letter, range(count)))
    assert time.monotonic() - began < 1
    unsent = sender.flush(0.8)
    assert unsent[:2] == ["0: MLflow is away", "1: MLflow is away"]
    assert len(unsent) == 100
    post.open = True
    assert sender.flush(30) == []
    assert post.letters == list(range(100))
    assert lines == [
        "MLflow is away (the connection is refused); training goes on, what it lacks is sent later.",
        "MLflow is back; sending what it lacks.",
    ]


def test_one_refused_thing_is_told_and_does_not_keep_back_the_others():
    post, lines = Post(), []
    sender = Sender(post.probe, lines.append)

    def refused():
        raise MlflowException("Invalid parameter", INVALID_PARAMETER_VALUE)

    sender.show(lambda: [Part("resnet50/full", 0, refused), post.letter(1)])
    assert sender.flush(30) == ["resnet50/full: Invalid parameter"]
    assert post.letters == [1]
    assert lines == ["MLflow refused resnet50/full: Invalid parameter"]


def test_what_was_refused_is_sent_once_its_state_differs():
    post = Post()
    sender = Sender(post.probe, lambda line: None)
    sender.show(lambda: [Part("1", 0, lambda: {}["nothing"])])
    assert sender.flush(30) == ["1: 'nothing'"]
    sender.show(lambda: [post.letter(1)])
    assert sender.flush(30) == []
    assert post.letters == [1]


def test_a_server_that_answers_but_fails_at_one_thing_is_left_after_three_tries():
    post, tries = Post(), []
    sender = Sender(post.probe, lambda line: None)

    def broken():
        tries.append(1)
        raise MlflowException("out of space")

    sender.show(lambda: [Part("resnet50/full", 0, broken), post.letter(1)])
    assert sender.flush(30) == ["resnet50/full: out of space"]
    assert len(tries) == 3
    assert post.letters == [1]


def test_a_bug_in_one_thing_does_not_end_the_thread():
    post = Post()
    sender = Sender(post.probe, lambda line: None)
    sender.show(lambda: [Part("resnet50/full", 0, lambda: {}["nothing"]), post.letter(1)])
    assert sender.flush(30) == ["resnet50/full: 'nothing'"]
    assert post.letters == [1]


def test_only_the_newest_of_what_waits_is_sent():
    began, gate, sent = threading.Event(), threading.Event(), []
    sender = Sender(lambda: None, lambda line: None)
    first = Part("first", 0, lambda: (began.set(), gate.wait()))
    sender.show(lambda: [first])
    assert began.wait(30)
    for number in range(10_000):
        sender.show(lambda number=number: [first, Part("table", number, lambda: sent.append(number))])
    assert sender.flush(0.2) == ["first: not sent in time", "table: not sent in time"]
    gate.set()
    assert sender.flush(30) == []
    assert sent == [9_999]

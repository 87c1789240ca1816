"""The queue alone, with something that is away and comes back."""

import threading
import time

from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

from aliprod.tracking.outbox import LIMIT, Outbox


class Post:
    """What stands for MLflow: takes letters while it is open."""

    def __init__(self, is_open=True):
        self.open, self.letters = is_open, []

    def probe(self):
        if not self.open:
            raise MlflowException("API request failed: Connection refused")

    def send(self, letter):
        self.probe()
        self.letters.append(letter)


def posted(outbox, post, letter, **how):
    outbox.put(str(letter), lambda: post.send(letter), **how)


def test_order_survives_an_absence_and_two_lines_tell_of_it():
    post, lines = Post(is_open=False), []
    outbox = Outbox(post.probe, lines.append)
    began = time.monotonic()
    for letter in range(100):
        posted(outbox, post, letter)
    assert time.monotonic() - began < 1
    unsent = outbox.flush(0.8)
    assert unsent[:2] == ["0: MLflow is away", "1: MLflow is away"]
    assert len(unsent) == 100
    post.open = True
    assert outbox.flush(30) == []
    assert post.letters == list(range(100))
    assert lines == [
        "MLflow is away (the connection is refused); training goes on, what it lacks is sent later.",
        "MLflow is back; sending what it lacks.",
    ]


def test_one_refused_thing_is_told_and_does_not_keep_back_the_others():
    post, lines = Post(), []
    outbox = Outbox(post.probe, lines.append)

    def refused():
        raise MlflowException("Invalid parameter", INVALID_PARAMETER_VALUE)

    outbox.put("resnet50/full", refused)
    posted(outbox, post, 1)
    assert outbox.flush(30) == ["resnet50/full: Invalid parameter"]
    assert post.letters == [1]
    assert lines == ["MLflow refused resnet50/full: Invalid parameter"]


def test_a_server_that_answers_but_fails_at_one_thing_is_left_after_three_tries():
    post, tries = Post(), []
    outbox = Outbox(post.probe, lambda line: None)

    def broken():
        tries.append(1)
        raise MlflowException("out of space")

    outbox.put("resnet50/full", broken)
    posted(outbox, post, 1)
    assert outbox.flush(30) == ["resnet50/full: out of space"]
    assert len(tries) == 3
    assert post.letters == [1]


def test_a_bug_in_one_thing_does_not_end_the_thread():
    post = Post()
    outbox = Outbox(post.probe, lambda line: None)
    outbox.put("resnet50/full", lambda: {}["nothing"])
    posted(outbox, post, 1)
    assert outbox.flush(30) == ["resnet50/full: 'nothing'"]
    assert post.letters == [1]


def test_the_newest_takes_the_place_of_what_waits_under_its_label():
    gate, sent = threading.Event(), []
    outbox = Outbox(lambda: None, lambda line: None)
    outbox.put("first", gate.wait)
    for number in range(50):
        outbox.put("table", lambda number=number: sent.append(number), only_latest=True)
    gate.set()
    assert outbox.flush(30) == []
    assert sent == [49]


def test_a_full_queue_leaves_out_only_what_is_sent_again_later():
    gate, sent = threading.Event(), []
    outbox = Outbox(lambda: None, lambda line: None)
    outbox.put("first", gate.wait)
    for number in range(LIMIT + 100):
        outbox.put("epoch", lambda number=number: sent.append(number), spare=True)
    outbox.put("finished", lambda: sent.append("finished"))
    gate.set()
    assert outbox.flush(30) == []
    assert sent == [*range(LIMIT - 1), "finished"]

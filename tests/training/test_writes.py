"""background: one write at a time, whose error is not lost."""

import threading
from collections.abc import Callable

import pytest

from aliprod.training.checkpoint import Background, background


class Full(Exception):
    pass


def raises() -> None:
    raise Full


def nothing() -> None:
    pass


@pytest.mark.parametrize("how", [Background.wait, Background.check, lambda writer: writer.start(lambda: nothing)])
def test_what_a_write_raised_is_raised_once(how: Callable[[Background], None]) -> None:
    with background() as writer:
        writer.start(lambda: raises)
        writer._thread.submit(nothing).result()  # the write has ended
        with pytest.raises(Full):
            how(writer)
        writer.check()


def test_a_context_that_ends_well_raises_what_its_last_write_raised() -> None:
    with pytest.raises(Full), background() as writer:
        writer.start(lambda: raises)


def test_an_error_of_the_training_is_not_hidden_by_one_of_a_write() -> None:
    def trains() -> None:
        with background() as writer:
            writer.start(lambda: raises)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trains()


def test_a_write_goes_on_while_nobody_waits_and_a_second_one_waits_for_it_before_it_copies() -> None:
    go_on, order = threading.Event(), []

    def write() -> None:
        go_on.wait(60)
        order.append("written")

    def prepare() -> Callable[[], None]:
        order.append("copied")
        return write

    with background() as writer:
        writer.start(prepare)
        writer.check()
        order.append("trained")
        threading.Timer(0.05, go_on.set).start()
        writer.start(prepare)
    assert order == ["copied", "trained", "written", "copied", "written"]


def test_a_context_leaves_no_thread_behind() -> None:
    before = threading.active_count()
    with background() as writer:
        writer.start(lambda: nothing)
    assert threading.active_count() == before

"""The first signal asks what runs to take a checkpoint, the second ends everything."""

import signal

import pytest

from aliprod.cluster.session import Signals

ALL = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


pytestmark = pytest.mark.usefixtures("attended")


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_the_first_asks_and_the_second_ends_at_once(first: signal.Signals) -> None:
    signals = Signals()
    signals.listen()
    signals.gently = True
    signal.raise_signal(first)
    assert signals.told
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_where_nothing_runs_the_first_ends_at_once() -> None:
    signals = Signals()
    signals.listen()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)


def test_a_closed_terminal_is_heeded_by_us_alone_and_under_nohup_by_nobody() -> None:
    signals = Signals()
    with signals.starting_others():
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGHUP) not in (signal.SIG_IGN, signal.SIG_DFL)

    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signals = Signals()
    signals.listen()
    signal.raise_signal(signal.SIGHUP)
    assert not signals.told

"""The first signal requests an end, signals right after it count as the same, the next one ends the run."""

from __future__ import annotations

import signal
import time

import pytest

from fopd_cli.errors import Interrupted
from fopd_cli.runtime.signals import SAME_SIGNAL_S, Signals


def test_one_signal_asks_and_another_one_stops() -> None:
    said: list[str] = []
    before = signal.getsignal(signal.SIGTERM)
    try:
        with Signals(said.append) as signals:
            assert not signals.received
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)  # `timeout` sends its own twice
            assert signals.received
            assert len(said) == 1
            time.sleep(SAME_SIGNAL_S + 0.05)
            with pytest.raises(Interrupted):
                signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN, "a clean end is not torn by a third"
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_without_a_signal_all_is_as_before() -> None:
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    with Signals(print) as signals:
        assert signal.getsignal(signal.SIGTERM) != before[signal.SIGTERM]
    assert {s: signal.getsignal(s) for s in before} == before
    assert not signals.received

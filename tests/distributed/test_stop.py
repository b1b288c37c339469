# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Signals and notices become requests; what may be broken off is, a save never is."""

import signal
import threading
import time

import pytest

from mesh_transformer.cli import Preempted
from mesh_transformer.distributed.stop import StopRequest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_noted(number, capfd):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.requested
        signal.raise_signal(number)
        assert stop.requested == number.name
        stop.request("a notice")
        assert stop.requested == number.name
    assert signal.getsignal(number) is before
    assert capfd.readouterr().err.count(number.name) == 1


def test_repeated_signals_break_nothing_but_a_second_ctrl_c_does(capfd):
    with StopRequest() as stop:
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
            signal.raise_signal(number)
        assert stop.requested == "SIGUSR1"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def break_off(stop, doing, act):
    """`act` in a place where it may be broken off, and must be."""
    with stop.at_once(doing):
        act()
        pytest.fail("went on")


def test_what_may_be_broken_off_is(capfd):
    with StopRequest() as stop:
        with pytest.raises(Preempted, match="SIGTERM while the data was made: nothing is lost"):
            break_off(stop, "the data was made", lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Preempted, match="while more data was made"):
            break_off(stop, "more data was made", lambda: pytest.fail("begun in spite of the request"))
        with pytest.raises(Preempted, match="while the run was opened"):
            stop.check("the run was opened")
        signal.raise_signal(signal.SIGTERM)  # outside it is only noted


def test_a_notice_from_another_thread_breaks_it_off_too(capfd):
    def wait():
        threading.Timer(0.1, stop.request, ["notice preempted = TRUE"]).start()
        for _ in range(1000):
            time.sleep(0.01)

    with StopRequest() as stop:
        with pytest.raises(Preempted, match="notice preempted = TRUE while"):
            break_off(stop, "the data was made", wait)
        assert stop.requested == "notice preempted = TRUE"

# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Signals and notices become stop requests; interruptible work is interrupted, a save is not."""

import signal
import threading
import time

import pytest

from mesh_transformer.cli import Preempted
from mesh_transformer.distributed.stop import StopRequest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_recorded(number, capfd):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.requested
        signal.raise_signal(number)
        assert stop.requested == number.name
        stop.request("a notice")
        assert stop.requested == number.name
    assert signal.getsignal(number) is before
    assert capfd.readouterr().err.count(number.name) == 1


def test_only_a_second_ctrl_c_interrupts(capfd):
    with StopRequest() as stop:
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
            signal.raise_signal(number)
        assert stop.requested == "SIGUSR1"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def interrupt(stop, doing, act):
    """Run `act` as interruptible work; fails if it is not interrupted."""
    with stop.interruptible(doing):
        act()
        pytest.fail("was not interrupted")


def test_interruptible_work_is_interrupted(capfd):
    with StopRequest() as stop:
        with pytest.raises(Preempted, match="SIGTERM while the data was made: nothing is lost"):
            interrupt(stop, "the data was made", lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Preempted, match="while more data was made"):
            interrupt(stop, "more data was made", lambda: pytest.fail("started after the request"))
        with pytest.raises(Preempted, match="while the run was opened"):
            stop.raise_if_requested("the run was opened")
        signal.raise_signal(signal.SIGTERM)  # outside the context it is only recorded


def test_a_request_from_another_thread_interrupts_too(capfd):
    def wait():
        threading.Timer(0.1, stop.request, ["notice preempted = TRUE"]).start()
        for _ in range(1000):
            time.sleep(0.01)

    with StopRequest() as stop:
        with pytest.raises(Preempted, match="notice preempted = TRUE while"):
            interrupt(stop, "the data was made", wait)
        assert stop.requested == "notice preempted = TRUE"

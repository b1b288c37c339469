# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Requests to stop: signals and notices are noted, and a loop ends at the next place where nothing is lost."""

import _thread
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType

from mesh_transformer.cli import Preempted
from mesh_transformer.distributed.coordination import common_stop

# Ctrl-C; what machines and schedulers send; what Slurm is asked to send ahead of them (sbatch --signal=USR1@120).
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


PROGRESS = "MESH_TRANSFORMER_PROGRESS"  # in the environment: a file to be touched where a run gets on


class StopRequest:
    """`with StopRequest() as stop:` sets `stop.requested` on a signal, or when `request` is called from any thread.

    A second Ctrl-C ends at once. Other signals may be repeated: schedulers send several, and none may break a save.
    """

    def __init__(
        self,
        signals: Sequence[signal.Signals] = SIGNALS,
        message: str = "finishing what is under way, then saving (Ctrl-C again: stop at once)",
    ) -> None:
        """`message` is printed behind the signal's name; nothing is if it is empty."""
        self._signals, self._message = signals, message
        self._waiting = ""  # what is under way that may be broken off
        self.requested = ""  # name of the signal or what was said, once there was one
        self.agreed = ""  # why all processes stop, once they have come to the point where they do
        self._before: dict[signal.Signals, object] = {}

    def request(self, reason: str) -> None:
        """Ask to stop; of several reasons the first counts."""
        if self.requested:
            return
        self.requested = reason
        if self._message:  # not print: a signal may come while somebody prints
            with suppress(OSError):  # nobody reads it any more
                os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{reason}: {self._message}\n".encode())
        if self._waiting and threading.current_thread() is not threading.main_thread():
            _thread.interrupt_main(signal.SIGTERM)

    def reached(self, other: str = "") -> str:
        """At each point where the run may stop, the same in all processes: why it does so here, "" if it does not.

        `other` is a reason of the caller's, such as a limit of time. One process that has a reason stops all, at one point.
        """
        if path := os.environ.get(PROGRESS):
            Path(path).touch()
        self.agreed = self.agreed or common_stop().reached(self.requested or other)
        return self.agreed

    def check(self, doing: str) -> None:
        """Raise Preempted if there was a request; `doing` is what was under way."""
        if self.requested:
            raise Preempted(f"{self.requested} while {doing}: nothing is lost; run the same command again to continue")

    @contextmanager
    def at_once(self, doing: str) -> Iterator[None]:
        """In it nothing needs an orderly end: a request raises Preempted where it is."""
        self._waiting = doing
        try:
            self.check(doing)
            yield
        finally:
            self._waiting = ""

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self._signals}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.request(signal.Signals(number).name)
        if self._waiting:
            self.check(self._waiting)

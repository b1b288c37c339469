# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Requests to stop: Ctrl-C and SIGTERM are noted, and a loop ends at the next place where nothing is lost."""

import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType, TracebackType

from mesh_transformer.agreement import common_stop


class StopRequest:
    """`with StopRequest() as stop:` sets `stop.requested` on SIGINT or SIGTERM; a second signal ends at once."""

    def __init__(
        self,
        signals: Sequence[signal.Signals] = (signal.SIGINT, signal.SIGTERM),
        message: str = "finishing this step, then saving (again: stop at once)",
    ) -> None:
        """`message` is printed behind the signal's name; nothing is if it is empty."""
        self._signals, self._message = signals, message
        self.requested = ""  # name of the signal, once there was one
        self.agreed = ""  # why all processes stop, once they have come to the point where they do
        self._before: dict[signal.Signals, object] = {}

    def reached(self, other: str = "") -> str:
        """At each point where the run may stop, the same in all processes: why it does so here, "" if it does not.

        `other` is a reason of the caller's, such as a limit of time. One process that has a reason stops all, at one point.
        """
        self.agreed = self.agreed or common_stop().reached(self.requested or other)
        return self.agreed

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
        if self.requested:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name
        if self._message:
            print(f"\n{self.requested}: {self._message}", file=sys.stderr, flush=True)

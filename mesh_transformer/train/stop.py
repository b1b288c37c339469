# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Requests to stop: Ctrl-C and SIGTERM are noted, and the loop ends at the next place where nothing is lost."""

import signal
import sys
import threading
from types import FrameType, TracebackType


class StopRequest:
    """`with StopRequest() as stop:` sets `stop.requested` on SIGINT or SIGTERM; a second signal ends at once."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested = ""  # name of the signal, once there was one
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
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
        print(
            f"\n{self.requested}: finishing this step, then saving (again: stop at once)", file=sys.stderr, flush=True
        )

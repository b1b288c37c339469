# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Requests to stop: a signal or a preemption notice is recorded, and the run ends at the next check."""

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
from mesh_transformer.distributed.coordination import stop_consensus

# SIGINT: Ctrl-C. SIGTERM: sent by machines and schedulers. SIGUSR1: sent by Slurm before a time limit (sbatch
# --signal=USR1@120).
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

# Environment variable with the path of a file that the run touches at every check.
PROGRESS_VARIABLE = "MESH_TRANSFORMER_PROGRESS"


class StopRequest:
    """Context manager that records requests to stop: `requested` is set by a signal, or by any thread that calls `request`.

    A second Ctrl-C ends the process at once. Other signals may be repeated: schedulers send several signals, which must not
    interrupt a save.
    """

    def __init__(
        self,
        signals: Sequence[signal.Signals] = SIGNALS,
        message: str = "finishing the current work, then saving (press Ctrl-C again to stop at once)",
    ) -> None:
        """Handle `signals` inside the context; `message` is printed after the signal's name, unless `message` is empty."""
        self._signals = signals
        self._message = message
        self._interruptible = ""  # description of the current work if a request may interrupt it, else ""
        self._previous_handlers: dict[signal.Signals, object] = {}
        self.requested = ""  # name of the signal, or reason for the request; "" without a request
        self.agreed = ""  # reason for which all processes stop, once they have reached the agreed check

    def request(self, reason: str) -> None:
        """Request that the run stop; later requests do not replace the first reason."""
        if self.requested:
            return
        self.requested = reason
        if self._message:  # os.write instead of print, because a signal may arrive inside a print
            with suppress(OSError):  # stderr may be closed
                os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{reason}: {self._message}\n".encode())
        if self._interruptible and threading.current_thread() is not threading.main_thread():
            _thread.interrupt_main(signal.SIGTERM)

    def should_stop(self, other: str = "") -> str:
        """Return the reason to stop at this check, or "" to continue. All processes must make the same checks.

        `other` is a reason of the caller, such as a time limit. If one process has a reason, all processes stop at the same check.
        """
        if path := os.environ.get(PROGRESS_VARIABLE):
            Path(path).touch()
        self.agreed = self.agreed or stop_consensus().should_stop(self.requested or other)
        return self.agreed

    def raise_if_requested(self, doing: str) -> None:
        """Raise Preempted if there was a request; `doing` names the current work."""
        if self.requested:
            raise Preempted(f"{self.requested} while {doing}: nothing is lost; run the same command again to continue")

    @contextmanager
    def interruptible(self, doing: str) -> Iterator[None]:
        """Context manager for work that may be interrupted at any point: a request raises Preempted immediately."""
        self._interruptible = doing
        try:
            self.raise_if_requested(doing)
            yield
        finally:
            self._interruptible = ""

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._previous_handlers = {number: signal.signal(number, self._handle_signal) for number in self._signals}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.request(signal.Signals(number).name)
        if self._interruptible:
            self.raise_if_requested(self._interruptible)

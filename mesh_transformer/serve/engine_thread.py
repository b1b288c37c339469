# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The engine in a thread of its own: rows go in from an event loop, and their events come back to it."""

import asyncio
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence

from mesh_transformer.host_memory import trim_memory
from mesh_transformer.sample.engine.decoder_only import DecoderOnlyEngine
from mesh_transformer.sample.engine.generation import ChunkSizer
from mesh_transformer.sample.engine.requests import Event, Request
from mesh_transformer.sample.engine.warmup import warm_up
from mesh_transformer.serve.protocol import ApiError

PAUSE = 0.05  # seconds between events
WINDOW = 10.0  # seconds over which tokens/s are counted


class PendingRequest:
    """Some rows on their way, for one task to wait for."""

    def __init__(self, rows: Sequence[Request]):
        self.rows = list(rows)
        self._numbers = {row.id: number for number, row in enumerate(self.rows)}
        self._left = set(self._numbers)
        self._arrived: asyncio.Queue[list[Event] | ApiError] = asyncio.Queue()
        self.n_drawn = 0

    @property
    def open(self) -> bool:
        """Whether there is more to come."""
        return bool(self._left)

    async def events(self) -> AsyncIterator[list[Event]]:
        """Bursts of events, rows numbered in the order of the ticket, until all rows have ended. ApiError if they cannot."""
        while self._left:
            arrived = await self._arrived.get()
            if isinstance(arrived, ApiError):
                raise arrived
            events = [event for event in arrived if event.request in self._left]
            self._left -= {event.request for event in events if event.finish}
            self.n_drawn += len(events)
            yield [event._replace(row=self._numbers[event.request]) for event in events]

    def end(self, number: int) -> None:
        """Row `number` needs no more tokens."""
        self.rows[number].cancelled = True
        self._left.discard(self.rows[number].id)

    def put(self, item: list[Event] | ApiError) -> None:
        """Hand something to whoever waits; from the event loop's thread only."""
        self._arrived.put_nowait(item)


class EngineThread:
    """Runs the engine, which is not for several threads, and keeps count of who waits."""

    def __init__(self, engine: DecoderOnlyEngine, *, capacity: int, warmup_tokens: int = 0):
        """At most `places` rows are waiting or being decoded.

        First of all it compiles what sequences of up to `longest_warm` tokens need; rows wait meanwhile.
        """
        self.engine, self.capacity, self._longest_warm = engine, capacity, warmup_tokens
        self.compiling = "programs are being compiled" if warmup_tokens else ""  # why rows wait, if they do
        self.seated = self.queued = 0  # rows, as of the last turn
        self.failure: str | None = None
        self._open: dict[int, PendingRequest] = {}  # by row id; the event loop's
        self._inbox: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._turns: deque[tuple[float, int]] = deque()  # when, and how many tokens
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = False

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin; tickets are for tasks of `loop`."""
        self._loop = loop
        self._thread.start()

    def stop(self) -> bool:
        """End the thread after its current turn; whether it did within a second."""
        self._stopping = True
        self._inbox.put(None)
        self._thread.join(timeout=1.0)
        return not self._thread.is_alive()

    @property
    def n_open(self) -> int:
        """Rows whose tickets are neither done nor given up."""
        return len(self._open)

    def check_capacity(self, n: int) -> None:
        """ApiError 429 if there is no place for `n` rows, 400 if there never will be, 503 where all is over."""
        if self.failure:
            raise ApiError(503, "the engine has failed; the server is going down", code="engine_failed")
        if n > self.capacity:
            raise ApiError(400, f"{n} samples in one request; there can be {self.capacity}", param="n")
        if self.n_open + n > self.capacity:
            error = ApiError(
                429, f"{self.n_open} samples are being drawn or wait; try again later", code="rate_limit_exceeded"
            )
            error.headers["Retry-After"] = str(self._guess_wait())
            raise error

    def submit(self, rows: Sequence[Request]) -> PendingRequest:
        """Queue rows; see `check_capacity`."""
        self.check_capacity(len(rows))
        ticket = PendingRequest(rows)
        for row in rows:
            self._open[row.id] = ticket
            self._inbox.put(row)
        return ticket

    def close(self, ticket: PendingRequest) -> None:
        """Whoever waited has all, or has gone: rows that go on are cancelled, and their slots are free at the next turn."""
        for row in ticket.rows:
            row.cancelled = True
            self._open.pop(row.id, None)

    def fail_all(self, error: ApiError) -> None:
        """Tell all that wait that there is no more."""
        for ticket in set(self._open.values()):
            ticket.put(error)

    def tokens_per_second(self) -> float:
        """Drawn, over the last seconds."""
        now = time.monotonic()
        turns = [(when, n) for when, n in list(self._turns) if now - when < WINDOW]
        return sum(n for _, n in turns) / WINDOW

    def _guess_wait(self) -> int:
        """Seconds until a place is free: what is asked for, at the present rate, a slot's share of it."""
        left = sum(row.max_tokens - len(row.tokens) for ticket in set(self._open.values()) for row in ticket.rows)
        rate = max(self.tokens_per_second(), 1.0)
        return int(min(max(left / rate / max(self.n_open, 1), 1), 60))

    def _run(self) -> None:
        try:
            self._warm_up()
            self._serve()
        except Exception as error:  # whatever it is, nobody may wait for ever
            self.failure = f"{type(error).__name__}: {error}"
            self._call(self.fail_all, ApiError(500, "the engine has failed", code="engine_failed"))

    def _warm_up(self) -> None:
        if self._longest_warm:
            for done, total in warm_up(self.engine, self._longest_warm):
                self.compiling = f"programs are being compiled: {done} of {total} parts are done"
                if self._stopping:
                    return
        self.compiling = ""

    def _serve(self) -> None:
        pace, compiled = ChunkSizer(PAUSE), 0
        while True:
            if not self._take_in():
                return
            with pace:
                events = self.engine.step(pace.steps)
            if (count := sum(self.engine.compilations.values())) > compiled:
                compiled = count
                trim_memory()  # of what compiling freed, 20 to 100 MB for each program
            self._turns.append((time.monotonic(), len(events)))
            while self._turns[0][0] < time.monotonic() - WINDOW:
                self._turns.popleft()
            self.seated, self.queued = len(self.engine.active), len(self.engine.queued)
            if events:
                self._call(self._deliver, events)

    def _take_in(self) -> bool:
        """Submit what has arrived, waiting for it if there is nothing else to do; False at the end."""
        while True:
            try:
                row = self._inbox.get(block=self.engine.idle)
            except queue.Empty:
                return True
            if row is None:
                return False
            self.engine.submit(row)

    def _call(self, function, argument) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, argument)

    def _deliver(self, events: list[Event]) -> None:
        groups: dict[PendingRequest, list[Event]] = {}
        for event in events:
            if ticket := self._open.get(event.request):
                groups.setdefault(ticket, []).append(event)
        for ticket, group in groups.items():
            ticket.put(group)

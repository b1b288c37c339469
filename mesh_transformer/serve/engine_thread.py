# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Thread that runs the engine. It receives requests from an event loop and delivers their events to it."""

import asyncio
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from mesh_transformer.host_memory import trim_memory
from mesh_transformer.sample.engine.decoder_only import DecoderOnlyEngine
from mesh_transformer.sample.engine.generation import ChunkSizer
from mesh_transformer.sample.engine.requests import Event, Request
from mesh_transformer.sample.engine.warmup import warm_up
from mesh_transformer.serve.protocol import ApiError

EVENT_INTERVAL = 0.05  # seconds between deliveries of events
RATE_WINDOW = 10.0  # seconds over which tokens/s are measured


class PendingRequest:
    """The engine requests of one API request, whose events one task awaits."""

    def __init__(self, requests: Sequence[Request]):
        self.requests = list(requests)
        self._index = {request.id: index for index, request in enumerate(self.requests)}
        self._unfinished = set(self._index)
        self._arrived: asyncio.Queue[list[Event] | ApiError] = asyncio.Queue()
        self.n_generated = 0  # number of tokens so far

    @property
    def open(self) -> bool:
        """True while more events will arrive."""
        return bool(self._unfinished)

    async def events(self) -> AsyncIterator[list[Event]]:
        """Yield lists of events until all requests have finished. Event.request is the index in `requests`.

        Raises ApiError if the engine fails or the server stops.
        """
        while self._unfinished:
            arrived = await self._arrived.get()
            if isinstance(arrived, ApiError):
                raise arrived
            events = [event for event in arrived if event.request in self._unfinished]
            self._unfinished -= {event.request for event in events if event.finish}
            self.n_generated += len(events)
            yield [event._replace(request=self._index[event.request]) for event in events]

    def finish(self, index: int) -> None:
        """Stop generating tokens for `requests[index]`."""
        self.requests[index].cancelled = True
        self._unfinished.discard(self.requests[index].id)

    def put(self, item: list[Event] | ApiError) -> None:
        """Pass events or an error to the waiting task; call only from the event loop's thread."""
        self._arrived.put_nowait(item)


class EngineThread:
    """Runs the engine, which is not thread-safe, and limits the number of waiting requests."""

    def __init__(self, engine: DecoderOnlyEngine, *, capacity: int, warmup_tokens: int = 0):
        """At most `capacity` engine requests wait or are decoded at once.

        The thread first compiles the programs for sequences of up to `warmup_tokens` tokens; until then requests wait.
        """
        self.engine = engine
        self.capacity = capacity
        # Reason why requests wait for compilation; empty if they do not wait.
        self.compiling = "programs are being compiled" if warmup_tokens else ""
        self.n_active = 0  # requests in decode slots, as of the last engine step
        self.n_queued = 0  # requests that wait for a slot or are in prefill, as of the last engine step
        self.failure: str | None = None
        self._warmup_tokens = warmup_tokens
        self._pending: dict[int, PendingRequest] = {}  # by Request.id; used only by the event loop's thread
        self._inbox: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._recent_steps: deque[tuple[float, int]] = deque()  # (time, number of tokens)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = False

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the thread; events are delivered to tasks of `loop`."""
        self._loop = loop
        self._thread.start()

    def stop(self) -> bool:
        """Stop the thread after its current step, and return whether it stopped within a second."""
        self._stopping = True
        self._inbox.put(None)
        self._thread.join(timeout=1.0)
        return not self._thread.is_alive()

    @property
    def n_pending(self) -> int:
        """Number of engine requests that are not closed yet."""
        return len(self._pending)

    def check_capacity(self, n: int) -> None:
        """Raise ApiError 429 if `n` requests exceed the free capacity, 400 if they exceed the total, 503 after a failure."""
        if self.failure:
            raise ApiError(
                503, "the engine has failed, and the server is shutting down; restart the server", code="engine_failed"
            )
        if n > self.capacity:
            raise ApiError(
                400,
                f"the request needs {n} samples (prompts times the larger of n and best_of); the maximum is {self.capacity} "
                "(serve.slots + serve.max_queue); send fewer prompts, or reduce n and best_of",
                param="n",
            )
        if self.n_pending + n > self.capacity:
            seconds = self._estimate_wait()
            error = ApiError(
                429,
                f"{self.n_pending} of {self.capacity} samples are in progress, and the request needs {n}; retry after "
                f"{seconds} s",
                code="rate_limit_exceeded",
            )
            error.headers["Retry-After"] = str(seconds)
            raise error

    def submit(self, requests: Sequence[Request]) -> PendingRequest:
        """Queue requests. Raises ApiError like `check_capacity`."""
        self.check_capacity(len(requests))
        pending = PendingRequest(requests)
        for request in requests:
            self._pending[request.id] = pending
            self._inbox.put(request)
        return pending

    def close(self, pending: PendingRequest) -> None:
        """Cancel the remaining requests of a client that is done or disconnected; their slots are freed at the next step."""
        for request in pending.requests:
            request.cancelled = True
            self._pending.pop(request.id, None)

    def fail_all(self, error: ApiError) -> None:
        """Raise `error` in all waiting tasks."""
        for pending in set(self._pending.values()):
            pending.put(error)

    def tokens_per_second(self) -> float:
        """Return the number of tokens generated per second over the last RATE_WINDOW seconds."""
        now = time.monotonic()
        return sum(n for when, n in list(self._recent_steps) if now - when < RATE_WINDOW) / RATE_WINDOW

    def _estimate_wait(self) -> int:
        """Estimate the seconds until a request finishes: mean remaining tokens of a request / tokens per second of all."""
        unfinished = [request for pending in set(self._pending.values()) for request in pending.requests]
        remaining = sum(request.max_tokens - len(request.tokens) for request in unfinished)
        rate = max(self.tokens_per_second(), 1.0)
        return int(min(max(remaining / rate / max(self.n_pending, 1), 1), 60))

    def _run(self) -> None:
        try:
            self._warm_up()
            self._serve()
        except Exception as error:  # any exception: waiting tasks must receive an error
            self.failure = f"{type(error).__name__}: {error}"
            api_error = ApiError(
                500, "the engine has failed; the log of the server has the error", code="engine_failed"
            )
            self._call(self.fail_all, api_error)

    def _warm_up(self) -> None:
        if self._warmup_tokens:
            for done, total in warm_up(self.engine, self._warmup_tokens):
                self.compiling = f"programs are being compiled: {done} of {total} warm-up requests are done"
                if self._stopping:
                    return
        self.compiling = ""

    def _serve(self) -> None:
        sizer, compiled = ChunkSizer(EVENT_INTERVAL), 0
        while True:
            if not self._drain_inbox():
                return
            with sizer:
                events = self.engine.step(sizer.steps)
            if (count := sum(self.engine.compilations.values())) > compiled:
                compiled = count
                trim_memory()  # a compilation frees 20 to 100 MB, which are returned to the operating system
            self._recent_steps.append((time.monotonic(), len(events)))
            while self._recent_steps[0][0] < time.monotonic() - RATE_WINDOW:
                self._recent_steps.popleft()
            self.n_active = len(self.engine.active)
            self.n_queued = len(self.engine.queued)
            if events:
                self._call(self._deliver, events)

    def _drain_inbox(self) -> bool:
        """Submit all received requests, waiting for one if the engine is idle. Return False when the thread must stop."""
        while True:
            try:
                request = self._inbox.get(block=self.engine.idle)
            except queue.Empty:
                return True
            if request is None:
                return False
            self.engine.submit(request)

    def _call(self, function: Callable[[Any], None], argument: Any) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, argument)

    def _deliver(self, events: list[Event]) -> None:
        groups: dict[PendingRequest, list[Event]] = {}
        for event in events:
            if pending := self._pending.get(event.request):
                groups.setdefault(pending, []).append(event)
        for pending, group in groups.items():
            pending.put(group)

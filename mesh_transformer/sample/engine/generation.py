# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Generation in progress for one caller, and the choice of the number of tokens per decode chunk while streaming."""

import math
import time
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from mesh_transformer.sample.engine.programs import DECODE_CHUNK
from mesh_transformer.sample.engine.requests import Event, Request, SpeculativeStats


@runtime_checkable
class Steppable(Protocol):
    """The part of an Engine that advances requests."""

    def step(self, steps: int = DECODE_CHUNK) -> list[Event]: ...

    def cancel(self, request: Request) -> None: ...


class Generation:
    """Requests in progress on an engine that serves no other requests at the same time."""

    def __init__(self, engine: Steppable, requests: list[Request]):
        """`requests` are already submitted to `engine`; see Engine.start."""
        self._engine = engine
        self._requests = requests
        self._index = {request.id: index for index, request in enumerate(requests)}
        self._unfinished = set(self._index)

    @property
    def n_requests(self) -> int:
        """Number of samples of all prompts."""
        return len(self._requests)

    @property
    def done(self) -> bool:
        """True once all requests have ended and all their events were returned."""
        return not self._unfinished

    def speculative_stats(self, index: int) -> SpeculativeStats:
        """Return the counts of draft tokens of a request so far."""
        return self._requests[index].speculative

    def stop(self, index: int) -> None:
        """Stop generating tokens for the request at `index`."""
        self._engine.cancel(self._requests[index])
        self._unfinished.discard(self._requests[index].id)

    def step(self, steps: int) -> list[Event]:
        """Run one engine step, with at most `steps` new tokens per request, and return its events."""
        if self.done:
            return []
        events = [event for event in self._engine.step(steps) if event.request in self._unfinished]
        self._unfinished -= {event.request for event in events if event.finish}
        return [event._replace(request=self._index[event.request]) for event in events]

    def events(self, *, interval: float = 0.1) -> Iterator[Event]:
        """Yield all events; tokens are decoded in chunks that take about `interval` seconds each."""
        sizer = ChunkSizer(interval)
        while not self.done:
            with sizer:
                events = self.step(sizer.steps)
            for event in events:
                if not self._requests[event.request].cancelled:
                    yield event


class ChunkSizer:
    """Adapts the number of tokens per decode chunk so that a chunk takes `interval` seconds. `with sizer:` times a chunk."""

    def __init__(self, interval: float):
        """Start with chunks of one token, or of DECODE_CHUNK tokens if `interval` is infinite."""
        self.steps = DECODE_CHUNK if math.isinf(interval) else 1
        self._interval = interval
        self._start = 0.0

    def __enter__(self) -> None:
        self._start = time.monotonic()

    def __exit__(self, *error: object) -> None:
        elapsed = time.monotonic() - self._start
        if elapsed > self._interval:
            self.steps = max(self.steps // 2, 1)
        elif 2 * elapsed < self._interval:
            self.steps = min(2 * self.steps, DECODE_CHUNK)

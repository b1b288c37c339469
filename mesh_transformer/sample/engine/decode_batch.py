# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The batch that is decoded: rows take seats in it and leave them, and it grows and shrinks with their number and length."""

from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from mesh_transformer.config import SampleConfig
from mesh_transformer.sample.engine.device_state import StepOutput, DecodeState
from mesh_transformer.sample.engine.prefill import PrefillBatch, count_rows
from mesh_transformer.sample.engine.programs import MAX_TOP_LOGPROBS, EnginePrograms
from mesh_transformer.sample.engine.requests import Event, Request, stack_allowed, stack_requests
from mesh_transformer.sample.engine.speculative import Drafter


class DecodeBatch:
    """Some seats, of which those without a row are decoded in vain."""

    def __init__(self, programs: EnginePrograms, pieces: int, bucket: Callable[[int], int], proposer: Drafter | None):
        """Their number is a multiple of `pieces`; the cache has room for `bucket(length)` tokens."""
        self._programs, self._pieces, self._bucket, self._proposer = programs, pieces, bucket, proposer
        self._seats: list[Request | None] = []
        self._state: DecodeState | None = None

    @property
    def rows(self) -> list[Request]:
        """Those that have a seat."""
        return [row for row in self._seats if row]

    @property
    def state(self) -> DecodeState | None:
        """What is on the devices; None before the first row."""
        return self._state

    def take_in(self, reading: PrefillBatch, rows: list[Request]) -> list[Event]:
        """Give rows whose prompts have been read a seat and their first token."""
        self._make_room(len(rows), max(row.length for row in rows) + 1)
        assert self._state is not None
        seats = [i for i, row in enumerate(self._seats) if row is None][: len(rows)]
        for seat, row in zip(seats, rows, strict=True):
            self._seats[seat] = row
        # Padding repeats the last row and gives it a seat that is not there.
        padding = count_rows(len(rows), self._pieces) - len(rows)
        padded = rows + rows[-1:] * padding
        source = np.array([reading.source[row.id] for row in padded], np.int32)
        places = np.array(seats + [len(self._seats)] * padding, np.int32)
        lengths = jnp.asarray([len(row.prompt) for row in padded], jnp.int32)
        new = (
            stack_requests(padded, self._programs.config.n_vocab),
            lengths,
            stack_allowed(padded, self._programs.config.n_vocab),
        )
        # One row's cache after the other: a program for several would be compiled for every pair of batches.
        fresh, record = self._programs.begin(reading.logits[source], new, _n_top(rows))
        caches = self._state.caches
        for prompt, seat in zip(source[: len(rows)], seats, strict=True):
            caches = self._programs.put_row(caches, self._programs.take_row(reading.caches, prompt), np.int32(seat))
        self._state = self._programs.seat(self._state._replace(caches=None), fresh, places)._replace(caches=caches)
        events = self._take(record, rows)
        scores = {row.id: reading.scores(row) for row in rows if row.score_prompt}
        return [event._replace(prompt_scores=scores[event.request]) if event.request in scores else event for event in events]

    def _make_room(self, n: int, length: int) -> None:
        """Seats for `n` more rows and cache for `length` tokens; seats nobody uses go when there are four times too many."""
        live = len(self.rows)
        wanted, cache_len = count_rows(live + n, self._pieces), self._bucket(length)
        if self._state is None or not live:
            if self._state is None or (wanted, cache_len) != (len(self._seats), self._cache_len):
                # Arrays of the same kinds and widths as rows ask for, whatever they hold.
                blank = stack_requests([Request(-1, np.zeros(1, np.int32), SampleConfig(), 1)], self._programs.config.n_vocab)
                self._state = None  # freed before the next one is made
                self._state = self._programs.make_state(blank, wanted, cache_len)
                self._seats = [None] * wanted
            return
        n_seats = len(self._seats)
        if wanted > n_seats or 4 * wanted <= n_seats or cache_len > self._cache_len:
            self._resize(max(wanted, n_seats) if 4 * wanted > n_seats else wanted, max(cache_len, self._cache_len))

    def _resize(self, n_seats: int, cache_len: int) -> None:
        order = [i for i, row in enumerate(self._seats) if row]
        order += [-1] * (n_seats - len(order))
        self._state = self._programs.resize(self._state, np.array(order, np.int32), cache_len)
        self._seats = [self._seats[i] if i >= 0 else None for i in order]

    @property
    def _cache_len(self) -> int:
        assert self._state is not None
        return jax.tree.leaves(self._state.caches)[0].shape[2]

    def draw(self, steps: int) -> list[Event]:
        """A burst of at most `steps` tokens for every seated row."""
        self._seats = [None if row and row.cancelled else row for row in self._seats]
        rows = self._seats
        if not self.rows:
            return []
        assert self._state is not None, "rows have a seat"
        allowed = stack_allowed(rows, self._programs.config.n_vocab)
        proposed = self._proposer.propose(rows, self._state) if self._proposer and allowed is None else None
        steps = 1 if allowed is not None else steps if proposed is None else proposed.shape[1] + 1
        longest = max(row.length for row in self.rows)
        self._make_room(0, min(longest + steps, self._programs.config.seq_len))
        if rows is not self._seats:  # moved: what belongs to a seat is made again
            return self.draw(steps)
        empty = np.array([row is None for row in rows])
        if proposed is not None:
            self._state, record = self._programs.verify(self._state, proposed, empty, _n_top(rows))
        else:
            self._state, record = self._programs.decode(self._state, np.int32(steps), empty, allowed, _n_top(rows))
        return self._take(record, rows)

    def _take(self, record: StepOutput, rows: Sequence[Request | None]) -> list[Event]:
        """Turn what a program drew for `rows` into events, one token of every row after the other; finished rows leave."""
        got: StepOutput = jax.device_get(record)
        live = got.live[: len(rows)]
        last = live.shape[1] - 1 - np.argmax(live[:, ::-1], axis=1)
        events = []
        for step, i in zip(*np.nonzero(live.T), strict=True):
            row = rows[i]
            if row is None:
                continue
            token = int(got.token[i, step])
            row.tokens.append(token)
            if row.constraint:
                row.constraint.accept(token)
            finish: Literal["stop", "length"] | None = None
            if got.finished[i] and step == last[i]:
                finish = "stop" if token in row.stop_tokens else "length"
            top = None
            if row.n_top and got.top is not None:
                best, ids = got.top[0][i, step, : row.n_top], got.top[1][i, step, : row.n_top]
                top = list(zip(ids.tolist(), best.tolist(), strict=True))
            events.append(Event(row.id, token, float(got.logprob[i, step]), finish, top))
        ended = {event.row for event in events if event.finish}
        self._seats = [None if row and row.id in ended else row for row in self._seats]
        return events


def _n_top(rows: Sequence[Request | None]) -> int:
    return MAX_TOP_LOGPROBS if any(row and row.n_top for row in rows) else 0

# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Tokens in, tokens out: rows join and leave a batch between bursts of decoding, as a handful of programs of fixed shapes.

A row is one sample of one prompt. It waits; its prompt is read in pieces, together with others of nearby length and
beside the decoding of the rows before it; it gets a seat in the batch; it leaves at its last token. Lengths are rounded
up to buckets, prompts to powers of two from 16 and caches to powers of two from 128, and the number of seats to a few
sizes, so that a program compiled for one request serves all like it. A prompt is padded on the right: whatever its
padding leaves in the cache is overwritten before a query can see it.

A token at place p of sample i of a prompt is drawn with fold_in(fold_in(key(seed), i), p), so it does not depend on
what else is in the batch, on the buckets, on how many tokens a burst has, or on what was proposed for it.
"""

import itertools
import math
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from mesh_transformer.config import ModelConfig, SampleConfig
from mesh_transformer.mesh import MeshLayout
from mesh_transformer.model.params import Params
from mesh_transformer.sample.engine.decode_batch import DecodeBatch
from mesh_transformer.sample.engine.prefill import SHORTEST_CACHE, PrefillBatch, bucket
from mesh_transformer.sample.engine.prefix_cache import PrefixCache
from mesh_transformer.sample.engine.programs import DECODE_CHUNK, EnginePrograms
from mesh_transformer.sample.engine.requests import Constraint, Event, PromptError, Request
from mesh_transformer.sample.engine.speculative import Drafter

BESIDE_READING = 4  # tokens of a burst while prompts are being read
READINGS = 2  # batches of prompts read in turn, so that a long one does not hold up short ones


class Completion(NamedTuple):
    """What was drawn for one sample, a stop token that ended it included."""

    tokens: list[int]
    logprobs: list[float]
    finish: Literal["stop", "length"]


class DecoderOnlyEngine:
    """One model on its devices, ready to continue prompts. Not for several threads at once."""

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        *,
        layout: MeshLayout | None = None,
        slots: int = 32,
        prefill_chunk: int = 512,
        prefix_bytes: int = 1 << 28,
        proposer: Drafter | None = None,
        weights: str = "saved",
        cache: str = "model",
    ):
        """`params` as `make_model(config).init` gives them, placed anywhere; they may be deleted afterwards.

        `layout` places weights and cache; without it everything stays on the default device. At most `slots` rows are
        decoded at once. Prompts longer than `prefill_chunk` are read in pieces of it. Caches of read prompts are kept
        up to `prefix_bytes` for prompts that begin alike (not where a mesh cuts the batch). `proposer` guesses tokens
        that are then checked several at a time. `weights` and `cache` are of the types that ServeConfig says. Raises
        ConfigError if an array does not divide over the mesh.
        """
        self.config = config
        self.programs = EnginePrograms(config, params, layout, weights=weights, cache=cache)
        self._pieces = layout.batch_shards if layout else 1
        self.slots = -(-slots // self._pieces) * self._pieces
        self.prefixes = PrefixCache(prefix_bytes if self._pieces == 1 else 0)
        self._prefill_chunk = prefill_chunk
        self._ids = itertools.count()
        self._waiting: deque[Request] = deque()
        self._readings: deque[PrefillBatch] = deque()
        self._seats = DecodeBatch(self.programs, self._pieces, self.cache_len, proposer)
        self._turns = 0

    @property
    def compilations(self) -> dict[str, int]:
        """How many programs of each kind were compiled so far."""
        return dict(self.programs.compilations)

    @property
    def seated(self) -> list[Request]:
        """Rows that are being decoded."""
        return self._seats.rows

    @property
    def queued(self) -> list[Request]:
        """Rows that have drawn nothing yet: those whose prompts are being read, and those that wait."""
        return [row for reading in self._readings for row in reading.rows] + list(self._waiting)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._waiting or self._readings or self.seated)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        options: SampleConfig | Sequence[SampleConfig],
        **wishes: Any,
    ) -> list[list[Completion]]:
        """The completions of every prompt; see `start`."""
        generation = self.start(prompts, options, **wishes)
        rows: list[list[Event]] = [[] for _ in range(generation.n_rows)]
        for event in generation.events(pause=math.inf):
            rows[event.request].append(event)
        done = [
            Completion([e.token for e in row], [e.logprob for e in row], row[-1].finish or "length") for row in rows
        ]
        n = generation.n_rows // len(prompts)
        return [done[first : first + n] for first in range(0, len(done), n)]

    def start(
        self,
        prompts: Sequence[Sequence[int]],
        options: SampleConfig | Sequence[SampleConfig],
        *,
        max_tokens: int | None = None,
        stop_tokens: Sequence[int] = (),
        seed: int = 0,
        n: int = 1,
    ) -> "Generation":
        """`n` samples of every prompt on their way: sample i of prompt j is row j n + i.

        `options` are for all prompts or one for each; `max_tokens` (default: theirs) counts drawn tokens. A row ends
        behind a token of `stop_tokens`, or at max_tokens. Raises PromptError for a prompt that is empty, has ids outside
        the vocabulary, or with max_tokens exceeds the model's seq_len.
        """
        each = [options] * len(prompts) if isinstance(options, SampleConfig) else list(options)
        if len(each) != len(prompts) or not prompts or n < 1:
            raise PromptError(
                f"{len(prompts)} prompts with {len(each)} options and n={n}: give one or more of each, matching"
            )
        wishes: dict[str, Any] = dict(max_tokens=max_tokens, stop_tokens=stop_tokens, seed=seed)
        rows = []
        for number, (prompt, option) in enumerate(zip(prompts, each, strict=True), start=1):
            name = f"prompt {number}" if len(prompts) > 1 else "the prompt"
            rows += [self.make_row(prompt, option, **wishes, sample=i, name=name) for i in range(n)]
        return Generation(self, [self.submit(row) for row in rows])

    def make_row(
        self,
        prompt: Sequence[int],
        options: SampleConfig,
        *,
        max_tokens: int | None = None,
        stop_tokens: Sequence[int] = (),
        seed: int = 0,
        sample: int = 0,
        logit_bias: Mapping[int, float] | None = None,
        n_top: int = 0,
        score_prompt: bool = False,
        constraint: Constraint | None = None,
        name: str = "the prompt",
    ) -> Request:
        """A row to submit; PromptError says what of it cannot be done."""
        bad = next((token for token in prompt if not -(2**31) <= token < 2**31), None)
        if bad is not None:
            raise PromptError(f"{name} has the token {bad}, but the model's vocabulary is 0..{self.config.n_vocab - 1}")
        row = Request(
            id=next(self._ids),
            prompt=np.asarray(prompt, np.int32),
            options=options,
            max_tokens=options.max_tokens if max_tokens is None else max_tokens,
            seed=seed,
            sample=sample,
            stop_tokens=list(dict.fromkeys(stop_tokens)),
            logit_bias=dict(logit_bias or {}),
            n_top=n_top,
            score_prompt=score_prompt,
            constraint=constraint,
        )
        row.check(self.config, name)
        return row

    def submit(self, row: Request) -> Request:
        """Queue a row; its events come from `step`."""
        self._waiting.append(row)
        return row

    def cancel(self, row: Request) -> None:
        """Draw no more for this row: no event of it comes from later steps, and its place is free for another."""
        row.cancelled = True

    def step(self, steps: int = DECODE_CHUNK) -> list[Event]:
        """One turn: admit, read one piece of prompts, draw up to `steps` tokens for all that have a seat."""
        self._turns += 1
        self._drop_cancelled()
        self._admit()
        events = self._read_on() if self._readings else []
        if self.seated:
            busy = bool(self._readings or self._waiting)
            # A first token waits for no burst.
            events += self._seats.draw(min(steps, 1 if events else BESIDE_READING if busy else DECODE_CHUNK))
        return events

    def cache_len(self, length: int) -> int:
        """Size of the cache's bucket for sequences of `length` tokens."""
        return bucket(length, SHORTEST_CACHE, self.config.seq_len)

    def _drop_cancelled(self) -> None:
        self._waiting = deque(row for row in self._waiting if not row.cancelled)
        for reading in list(self._readings):
            if all(row.cancelled for row in reading.rows):
                self._readings.remove(reading)

    def _admit(self) -> None:
        """Begin to read the prompts of rows for which there is a seat, those of one length together."""
        while self._waiting and len(self._readings) < READINGS:
            free = self.slots - len(self.seated) - sum(len(reading.rows) for reading in self._readings)
            if free <= 0:
                return
            kind = _reading_kind(self._waiting[0], self._prefill_chunk)
            rows = [row for row in self._waiting if _reading_kind(row, self._prefill_chunk) == kind][:free]
            chosen = {row.id for row in rows}
            self._waiting = deque(row for row in self._waiting if row.id not in chosen)
            self._readings.append(
                PrefillBatch(self.programs, self.prefixes, rows, self._prefill_chunk, self._pieces, self.cache_len)
            )

    def _read_on(self) -> list[Event]:
        """A piece of the prompts that are nearest their end, every second time of those that have waited longest."""
        reading = self._readings[0] if self._turns % 2 else min(self._readings, key=lambda reading: reading.left)
        reading.read_on()
        if reading.left:
            return []
        self._readings.remove(reading)
        rows = [row for row in reading.rows if not row.cancelled]
        return self._seats.take_in(reading, rows) if rows else []


class Generation:
    """Some rows on their way, from an engine that does nothing else meanwhile."""

    def __init__(self, engine: DecoderOnlyEngine, rows: list[Request]):
        """See Engine.start."""
        self._engine, self._rows = engine, rows
        self._numbers = {row.id: number for number, row in enumerate(rows)}
        self._unfinished = set(self._numbers)

    @property
    def n_rows(self) -> int:
        """Samples of all prompts together."""
        return len(self._rows)

    @property
    def done(self) -> bool:
        """Whether all rows have ended and all their events are taken."""
        return not self._unfinished

    def stop(self, row: int) -> None:
        """Draw no more tokens for this row."""
        self._engine.cancel(self._rows[row])
        self._unfinished.discard(self._rows[row].id)

    def draw(self, steps: int) -> list[Event]:
        """Events of the next turn of the engine, with at most `steps` tokens of every row."""
        if self.done:
            return []
        events = [event for event in self._engine.step(steps) if event.request in self._unfinished]
        self._unfinished -= {event.request for event in events if event.finish}
        return [event._replace(row=self._numbers[event.request]) for event in events]

    def events(self, *, pause: float = 0.1) -> Iterator[Event]:
        """All events, in bursts of so many tokens that about `pause` seconds lie between them."""
        pace = ChunkSizer(pause)
        while not self.done:
            with pace:
                events = self.draw(pace.steps)
            for event in events:
                if not self._rows[event.request].cancelled:
                    yield event


class ChunkSizer:
    """How many tokens a burst may have, so that one takes about `pause` seconds: `with pace:` times it."""

    def __init__(self, pause: float):
        """As many as there can be for an infinite pause."""
        self._pause, self.steps = pause, DECODE_CHUNK if math.isinf(pause) else 1
        self._start = 0.0

    def __enter__(self) -> None:
        self._start = time.monotonic()

    def __exit__(self, *failure: object) -> None:
        elapsed = time.monotonic() - self._start
        if elapsed > self._pause:
            self.steps = max(self.steps // 2, 1)
        elif 2 * elapsed < self._pause:
            self.steps = min(2 * self.steps, DECODE_CHUNK)


def _reading_kind(row: Request, chunk: int) -> tuple[int, bool]:
    """Rows of one kind are read together: the number of pieces of their prompts, and whether every token is scored."""
    return -(-len(row.prompt) // chunk), row.score_prompt

# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Tokens in, tokens out: batched prefill, and decoding in bursts, as a handful of programs of fixed shapes.

Lengths are rounded up to buckets, prompts to powers of two from 16 and caches to powers of two from 256, so that a
program compiled for one request serves all of nearby length. A prompt is padded on the right: whatever its padding
leaves in the cache is overwritten before a query can see it. A cache that fills up is copied into the next bucket.

A token at place p of sample i of a prompt is drawn with fold_in(fold_in(key(seed), i), p), so it does not depend on
what else is in the batch, on the buckets, or on how many tokens a burst has.
"""

import math
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from mesh_transformer.config import ModelConfig, SampleConfig
from mesh_transformer.mesh import Layout
from mesh_transformer.model.params import Params
from mesh_transformer.sample.programs import BURST, Programs, Request, State
from mesh_transformer.sample.sampling import Drawn, stack_options

SHORTEST_PROMPT, SHORTEST_CACHE = 16, 256  # smallest buckets
STOP_TOKENS = 8  # their number is rounded up to a multiple of this


class PromptError(ValueError):
    """A prompt the model cannot continue; the message says why and what would fit."""


class Event(NamedTuple):
    """One token that was drawn. Rows count samples: sample i of prompt j is row j n + i."""

    row: int
    token: int
    logprob: float  # natural log, in the model's own distribution
    finish: Literal["stop", "length"] | None  # why this is the row's last token, if it is


class Completion(NamedTuple):
    """What was drawn for one sample, a stop token that ended it included."""

    tokens: list[int]
    logprobs: list[float]
    finish: Literal["stop", "length"]


class Engine:
    """One model on its devices, ready to continue prompts. Not for several threads at once."""

    def __init__(self, config: ModelConfig, params: Params, *, layout: Layout | None = None, prefill_chunk: int = 512):
        """`params` as `make_model(config).init` gives them, placed anywhere; they may be deleted afterwards.

        `layout` places weights and cache; without it everything stays on the default device. Prompts longer than
        `prefill_chunk` are read in pieces of it. Raises ConfigError if an array does not divide over the mesh.
        """
        self.config = config
        self.programs = Programs(config, params, layout)
        self._chunk = _bucket(prefill_chunk, SHORTEST_PROMPT, config.seq_len)
        self._pieces = layout.batch_pieces if layout else 1

    @property
    def compilations(self) -> dict[str, int]:
        """How many programs of each kind were compiled so far."""
        return dict(self.programs.compilations)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        options: SampleConfig | Sequence[SampleConfig],
        *,
        max_tokens: int | None = None,
        stop_tokens: Sequence[int] = (),
        seed: int = 0,
        n: int = 1,
    ) -> list[list[Completion]]:
        """`n` completions of every prompt; see `start`."""
        generation = self.start(prompts, options, max_tokens=max_tokens, stop_tokens=stop_tokens, seed=seed, n=n)
        rows: list[list[Event]] = [[] for _ in range(len(prompts) * n)]
        for event in generation.events(pause=math.inf):
            rows[event.row].append(event)
        done = [
            Completion([e.token for e in row], [e.logprob for e in row], row[-1].finish or "length") for row in rows
        ]
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
        """Read the prompts and draw the first token of each of their `n` samples, which share the reading.

        `options` are for all prompts or one for each; `max_tokens` (default: theirs) counts drawn tokens. A row ends
        behind a token of `stop_tokens`, or at max_tokens. Raises PromptError for a prompt that is empty, has ids outside
        the vocabulary, or with max_tokens exceeds the model's seq_len.
        """
        each = [options] * len(prompts) if isinstance(options, SampleConfig) else list(options)
        if len(each) != len(prompts) or not prompts or n < 1:
            raise PromptError(
                f"{len(prompts)} prompts with {len(each)} options and n={n}: give one or more of each, matching"
            )
        room = [max_tokens or option.max_tokens for option in each]
        for number, (prompt, limit) in enumerate(zip(prompts, room, strict=True), start=1):
            self._check_prompt(prompt, limit, f"prompt {number}" if len(prompts) > 1 else "the prompt")
        read = [np.asarray(prompt, np.int32) for prompt in prompts]
        read += [read[0]] * (-len(read) % self._pieces)
        rows = np.repeat(np.arange(len(prompts)), n)
        real = len(rows)
        rows = np.concatenate([rows, np.zeros(-real % self._pieces, rows.dtype)])
        lengths = np.array([len(read[row]) for row in rows])
        request = Request(
            keys=_make_keys(seed, np.arange(len(rows)) % n),
            options=stack_options([each[row] for row in rows]),
            prompt=jnp.asarray(self._mark_tokens(read)[rows]),
            limit=jnp.asarray([length + room[row] - 1 for length, row in zip(lengths, rows, strict=True)], jnp.int32),
            stop_tokens=_pad_stop_tokens(stop_tokens),
        )
        caches, logits = self._read_prompts(read)
        live = np.arange(len(rows)) < real
        arrays = (jnp.asarray(x) for x in (rows.astype(np.int32), lengths.astype(np.int32), ~live))
        state, drawn = self.programs.begin(caches, logits, *arrays, request)
        return Generation(self, request, state, drawn, lengths, real)

    def _check_prompt(self, prompt: Sequence[int], max_tokens: int, name: str) -> None:
        length, longest = len(prompt), self.config.seq_len
        if not length:
            raise PromptError(f"{name} is empty; begin with the end-of-text token")
        if outside := [token for token in prompt if not 0 <= token < self.config.n_vocab]:
            raise PromptError(
                f"{name} has the token {outside[0]}, but the model's vocabulary is 0..{self.config.n_vocab - 1}"
            )
        if length >= longest:
            raise PromptError(
                f"{name} has {length} tokens, but the model reads at most seq_len={longest} with the answer; shorten it"
            )
        if length + max_tokens > longest:
            raise PromptError(
                f"{name} has {length} tokens and max_tokens={max_tokens} more exceed the model's seq_len={longest}; "
                f"ask for at most max_tokens={longest - length}, or shorten it"
            )

    def _mark_tokens(self, prompts: list[np.ndarray]) -> np.ndarray:
        seen = np.zeros((len(prompts), self.config.n_vocab), bool)
        for row, prompt in zip(seen, prompts, strict=True):
            row[prompt] = True
        return seen

    def _read_prompts(self, prompts: list[np.ndarray]) -> tuple[Any, Float[Array, "B V"]]:
        """Caches that hold the prompts, and the logits behind the last token of each."""
        lengths = np.array([len(prompt) for prompt in prompts])
        longest = int(lengths.max())
        caches = self.programs.make_caches(len(prompts), self.cache_len(longest + 1))
        logits = jnp.zeros((len(prompts), self.config.n_vocab), jnp.float32)
        for first in range(0, longest, self._chunk):
            size = _bucket(min(longest - first, self._chunk), SHORTEST_PROMPT, self._chunk)
            tokens = np.zeros((len(prompts), size), np.int32)
            for row, prompt in zip(tokens, prompts, strict=True):
                piece = prompt[first : first + size]
                row[: len(piece)] = piece
            caches, logits = self.programs.read(caches, logits, tokens, np.int32(first), (lengths - 1).astype(np.int32))
        return caches, logits

    def cache_len(self, length: int) -> int:
        """Size of the cache's bucket for sequences of `length` tokens."""
        return _bucket(length, SHORTEST_CACHE, self.config.seq_len)


class Generation:
    """A batch on its way: rows that draw until they finish or are stopped."""

    def __init__(self, engine: Engine, request: Request, state: State, drawn: Drawn, lengths: np.ndarray, rows: int):
        """`drawn` are the first tokens, and `rows` of the batch's rows real; see Engine.start."""
        self._engine, self._request, self._state = engine, request, state
        self._stop_tokens = set(np.asarray(request.stop_tokens).tolist())
        self._longest = int(lengths.max()) + 1  # tokens of the longest sequence
        self._live = np.arange(len(lengths)) < rows
        self._stopped = np.zeros(len(lengths), bool)
        self._ready: list[Event] = []
        first = {"token": drawn.token[:, None], "logprob": drawn.logprob[:, None], "live": self._live[:, None]}
        self._keep(first | {"finished": state.finished})

    @property
    def done(self) -> bool:
        """Whether all rows are finished and all their events taken."""
        return not self._ready and not self._live.any()

    def stop(self, row: int) -> None:
        """Draw no more tokens for this row; events of it that wait already are dropped."""
        self._stopped[row], self._live[row] = True, False
        self._ready = [event for event in self._ready if event.row != row]

    def draw(self, steps: int) -> list[Event]:
        """Events that wait, or else those of the next `steps` tokens of every row (at most BURST)."""
        if not self._ready and self._live.any():
            steps = min(steps, BURST)
            wanted = self._engine.cache_len(self._longest + steps)
            caches = self._state.caches
            if wanted > jax.tree.leaves(caches)[0].shape[2]:
                self._state = self._state._replace(caches=self._engine.programs.grow(caches, wanted))
            self._state, record = self._engine.programs.decode(
                self._state, self._request, np.int32(steps), self._stopped
            )
            self._longest += steps
            self._keep(record)
        events, self._ready = self._ready, []
        return events

    def events(self, *, pause: float = 0.1) -> Iterator[Event]:
        """All events, in bursts of so many tokens that about `pause` seconds lie between them."""
        steps = BURST if math.isinf(pause) else 1
        while not self.done:
            start = time.monotonic()
            events = self.draw(steps)
            elapsed = time.monotonic() - start
            if steps < BURST and elapsed < pause:
                steps = min(2 * steps, BURST) if 2 * elapsed < pause else steps
            elif not math.isinf(pause) and elapsed > pause:
                steps = max(steps // 2, 1)
            for event in events:
                if not self._stopped[event.row]:
                    yield event

    def _keep(self, record: dict[str, Any]) -> None:
        """Turn what a program drew into events, one token of every row after the other."""
        got = jax.device_get(record)
        self._live &= ~got["finished"]
        last = got["live"].shape[1] - 1 - np.argmax(got["live"][:, ::-1], axis=1)
        for step, row in zip(*np.nonzero(got["live"].T), strict=True):
            token = int(got["token"][row, step])
            finish = None
            if got["finished"][row] and step == last[row] and not self._stopped[row]:
                finish = "stop" if token in self._stop_tokens else "length"
            self._ready.append(Event(int(row), token, float(got["logprob"][row, step]), finish))


def _bucket(length: int, shortest: int, longest: int) -> int:
    """The smallest power of two from `shortest` that holds `length`, but at most `longest`."""
    return min(max(shortest, 1 << (length - 1).bit_length()), longest)


def _make_keys(seed: int, samples: np.ndarray) -> Key[Array, "B"]:
    return jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(jnp.asarray(samples, jnp.uint32))


def _pad_stop_tokens(tokens: Sequence[int]) -> Int[Array, "Z"]:
    kept = list(dict.fromkeys(tokens))
    return jnp.asarray(kept + [-1] * (-len(kept) % STOP_TOKENS or (0 if kept else STOP_TOKENS)), jnp.int32)

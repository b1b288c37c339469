# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Token sequences -> the log-probability of their ends: batched by length, over the mesh, the same for any batch and mesh.

Sequences of nearby length share a batch: lengths are rounded up to powers of two, and padding stands behind the text,
where no token of it can see it. The longest come first, so that memory that is too small is found out at once. Where a
model has experts with a capacity, scoring grants none: what a token's neighbours in a batch are changes nothing.
"""

import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import xxhash
from jaxtyping import Array, Bool, Float, Int

from mesh_transformer.config import ConfigError, ModelConfig
from mesh_transformer.storage.resume_log import ResumeLog
from mesh_transformer.mesh import MeshLayout, constrain
from mesh_transformer.model.attention.ring import from_zigzag, to_zigzag
from mesh_transformer.model.lm_head import lm_head, lm_logits
from mesh_transformer.model.transformer import Model, make_model
from mesh_transformer.sample.engine.buckets import bucket
from mesh_transformer.sample.engine.decoder_only import require_decoder_only
from mesh_transformer.sample.engine.engine import Engine
from mesh_transformer.sample.engine.weights import stack_layers
from mesh_transformer.train.compile import replicated, compile_barrier, with_layout

SHORTEST = 32  # smallest bucket of lengths
AHEAD = 2  # batches on their way while the results of an earlier one are read
LOGIT_BYTES = 1 << 28  # logits that exist at a time, over all devices


class ScoringError(ValueError):
    """Tokens that cannot be scored; the message says which and why."""


class ScoringRequest(NamedTuple):
    """A sequence whose last `n_scored` tokens are to be scored, each given all that stand before it."""

    tokens: Sequence[int]
    n_scored: int

    def digest(self) -> str:
        """A digest that no other query has."""
        return xxhash.xxh3_128_hexdigest(np.array([self.n_scored, *self.tokens], "<i4").tobytes())


class Loglikelihood(NamedTuple):
    """The answer to a query, one value for each scored token."""

    logprobs: Float[np.ndarray, "N"]  # natural logarithm
    greedy: Bool[np.ndarray, "N"]  # whether no other token was likelier

    @property
    def total(self) -> float:
        """Log-probability of all scored tokens together."""
        return float(self.logprobs.astype(np.float64).sum())


class TokenBatch(NamedTuple):
    """A batch of sequences, and what comes behind each token."""

    tokens: Int[Array, "B T"]
    targets: Int[Array, "B T"]


class LoglikelihoodScorer:
    """One model on its devices, ready to score. `params` may be exchanged, as training does."""

    def __init__(self, config: ModelConfig, params: Any, layout: MeshLayout | None, *, batch_tokens: int = 8192):
        """`params` as training has them, stacked, or as the engine has them, every layer by itself.

        A batch has about `batch_tokens` tokens, padding included.
        """
        if config.n_encoder_layers is not None or not config.causal:
            raise ConfigError(
                "evaluation scores what a decoder alone expects next; of a model with model.n_encoder_layers, or "
                "model.causal=false, only training's own validation sets are measured"
            )
        takes_all: dict[str, None] = dict(eval_capacity_factor=None, eval_capacity=None)
        experts = config.experts and dataclasses.replace(config.experts, **takes_all)
        self.config = dataclasses.replace(config, remat="none", dropout=0.0, experts=experts)
        self.params, self.layout, self._batch_tokens = params, layout, batch_tokens
        self._pieces = layout.batch_shards if layout else 1
        self.resume_log: ResumeLog | None = None  # what `total` has found already, and what it finds
        program = functools.partial(_score_rows, self.config, make_model(self.config))
        if layout is None:
            self._score = jax.jit(program)
        else:
            self._score = compile_barrier(jax.jit(with_layout(program, layout), out_shardings=replicated(layout)))

    def score_totals(
        self, queries: Sequence[ScoringRequest], report: Callable[[int, int], None] = lambda done, total: None
    ) -> list[tuple[float, bool]]:
        """Of every query the log-probability of all scored tokens, and whether each was the likeliest; as `score` else.

        What the journal has is not computed again.
        """
        keys = [query.digest() if self.resume_log else "" for query in queries]
        found: list[Any] = [self.resume_log.get(key) if self.resume_log else None for key in keys]
        missing = [i for i, answer in enumerate(found) if answer is None]
        n_known = len(queries) - len(missing)

        def keep(number: int, likelihood: Loglikelihood) -> None:
            i = missing[number]
            found[i] = likelihood.total, bool(likelihood.greedy.all())
            if self.resume_log:
                self.resume_log.put(keys[i], found[i])

        self.score([queries[i] for i in missing], lambda done, _: report(n_known + done, len(queries)), keep)
        return [(total, greedy) for total, greedy in found]

    def score(
        self,
        queries: Sequence[ScoringRequest],
        report: Callable[[int, int], None] = lambda done, total: None,
        keep: Callable[[int, Loglikelihood], None] = lambda number, likelihood: None,
    ) -> list[Loglikelihood]:
        """The likelihood of every query, in order; `report` gets (queries done, in all) after each batch, `keep` each one.

        Raises ScoringError for a query that is longer than the model's seq_len allows (one token more than it reads), has
        nothing before its first scored token, or ids outside the vocabulary.
        """
        for number, query in enumerate(queries):
            self._check(query, number)
        order = sorted(range(len(queries)), key=lambda i: -len(queries[i].tokens))
        found: list[Loglikelihood | None] = [None] * len(queries)
        waiting: deque[tuple[list[int], Any]] = deque()
        done = 0
        while order or waiting:
            if order:
                size = self._length(queries[order[0]])
                rows = self._rows(size)
                batch = [i for i in order[:rows] if self._length(queries[i]) == size]
                order = order[len(batch) :]
                waiting.append((batch, self._start([queries[i] for i in batch], size)))
            if len(waiting) > AHEAD or not order:
                batch, results = waiting.popleft()
                logprobs, greedy = (np.asarray(result) for result in results)
                for row, i in enumerate(batch):
                    end = len(queries[i].tokens) - 1
                    place = slice(end - queries[i].n_scored, end)
                    found[i] = likelihood = Loglikelihood(logprobs[row, place], greedy[row, place])
                    keep(i, likelihood)
                done += len(batch)
                report(done, len(queries))
        return [likelihood for likelihood in found if likelihood is not None]

    def _check(self, query: ScoringRequest, number: int) -> None:
        length = len(query.tokens)
        if not 0 < query.n_scored < length or length > self.config.seq_len + 1:
            raise ScoringError(
                f"query {number} scores the last {query.n_scored} of {length} tokens; at least one is scored, at least one "
                f"stands before, and with model.seq_len={self.config.seq_len} there are at most {self.config.seq_len + 1}"
            )
        low, high = min(query.tokens), max(query.tokens)
        if low < 0 or high >= self.config.n_vocab:
            bad = low if low < 0 else high
            raise ScoringError(f"query {number} has the token {bad}; the vocabulary is 0..{self.config.n_vocab - 1}")

    def _length(self, query: ScoringRequest) -> int:
        return bucket(len(query.tokens) - 1, min(SHORTEST, self.config.seq_len), self.config.seq_len)

    def _rows(self, size: int) -> int:
        """Rows of a whole batch of this length: a multiple of the pieces it is cut into."""
        return max(self._batch_tokens // size // self._pieces, 1) * self._pieces

    def _start(self, queries: list[ScoringRequest], size: int) -> tuple[Array, Array]:
        """Hand a batch over; one that is not full has as many rows as a power of two times the pieces."""
        parts = -(-len(queries) // self._pieces)
        rows = min(self._pieces << (parts - 1).bit_length(), self._rows(size))
        tokens, targets = np.zeros((2, rows, size), np.int32)
        for row, query in enumerate(queries):
            tokens[row, : len(query.tokens) - 1] = query.tokens[:-1]
            targets[row, : len(query.tokens) - 1] = query.tokens[1:]
        return self._score(self.params, TokenBatch(self._place(tokens), self._place(targets)))

    def _place(self, values: np.ndarray) -> Any:
        if self.layout is None:
            return values
        sharding = self.layout.sharding(("batch", "sequence"), values.shape, "batch")
        return jax.make_array_from_callback(values.shape, sharding, values.__getitem__)


def make_scorer(engine: Engine, *, batch_tokens: int = 8192) -> LoglikelihoodScorer:
    """A scorer that shares the engine's weights."""
    programs = require_decoder_only(engine, "evaluation").programs
    return LoglikelihoodScorer(programs.config, programs.weights, programs.layout, batch_tokens=batch_tokens)


def _score_rows(
    config: ModelConfig, model: Model, params: Any, rows: TokenBatch
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """Of every target its log-probability, and whether no other token is likelier; logits of one piece exist at a time."""
    params = stack_layers(params)
    x, _ = model.hidden_states(params, rows.tokens)
    head = lm_head(params, config)
    batch, length = rows.tokens.shape

    def score(piece: tuple[Array, Array]) -> tuple[Array, Array]:
        x, targets = piece
        logits = lm_logits(x, head, config)
        chosen = jnp.sum(jnp.where(jnp.arange(config.n_vocab)[None, None] == targets[..., None], logits, 0.0), axis=-1)
        return chosen - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == targets

    pieces = 1
    while batch * length // pieces * config.n_vocab * 4 > LOGIT_BYTES and length % (2 * pieces) == 0:
        pieces *= 2
    targets = to_zigzag(rows.targets)
    if pieces == 1:
        scores = score((x, targets))
    else:
        cut = lambda y: y.reshape(batch, pieces, -1, *y.shape[2:]).swapaxes(0, 1)  # noqa: E731
        scores = jax.lax.map(score, (cut(x), cut(targets)))
        scores = jax.tree.map(lambda y: y.swapaxes(0, 1).reshape(batch, length), scores)
    logprobs, greedy = (from_zigzag(constrain(y, "batch", "sequence")) for y in scores)
    return logprobs, greedy

# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of token sequences in batches of similar length; results depend neither on the batch nor on the mesh.

Lengths are rounded up to powers of two, so that sequences of similar length share a batch. Padding follows the text, where
the causal mask excludes it. The longest sequences come first, so that a lack of memory is an error of the first batch.
Experts have no capacity limit during scoring: otherwise a result would depend on the other sequences of its batch.
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
from mesh_transformer.mesh import MeshLayout, constrain
from mesh_transformer.model.attention.ring import from_zigzag, to_zigzag
from mesh_transformer.model.lm_head import lm_head, lm_logits
from mesh_transformer.model.transformer import Model, make_model
from mesh_transformer.sample.engine.buckets import bucket
from mesh_transformer.sample.engine.decoder_only import require_decoder_only
from mesh_transformer.sample.engine.engine import Engine
from mesh_transformer.sample.engine.weights import stack_layers
from mesh_transformer.storage.resume_log import ResumeLog
from mesh_transformer.train.compile import compile_barrier, replicated, with_layout

MIN_BUCKET = 32  # smallest padded length
MAX_IN_FLIGHT = 2  # batches in progress while the results of an earlier batch are read
MAX_LOGIT_BYTES = 1 << 28  # size of the logits in memory at a time, summed over all devices

BatchProgressFn = Callable[[int, int], None]  # number of finished requests, total
OnResult = Callable[[int, "Loglikelihood"], None]  # index of a request, and its result


def _ignore(*_: Any) -> None: ...


class ScoringError(ValueError):
    """Error for a request whose tokens cannot be scored."""


class ScoringRequest(NamedTuple):
    """A sequence whose last `n_scored` tokens are scored, each given all tokens before it."""

    tokens: Sequence[int]
    n_scored: int

    def digest(self) -> str:
        """Return a digest of the request, the key of its result in the resume log."""
        return xxhash.xxh3_128_hexdigest(np.array([self.n_scored, *self.tokens], "<i4").tobytes())


class Loglikelihood(NamedTuple):
    """The result of a request, with one value per scored token."""

    logprobs: Float[np.ndarray, "N"]  # natural logarithm
    greedy: Bool[np.ndarray, "N"]  # whether the token is the most probable token

    @property
    def total(self) -> float:
        """Log-probability of all scored tokens together."""
        return float(self.logprobs.astype(np.float64).sum())


class TokenBatch(NamedTuple):
    """A batch of sequences, and the next token of each position."""

    tokens: Int[Array, "B T"]
    targets: Int[Array, "B T"]


class LoglikelihoodScorer:
    """Scores token sequences with one model. `params` may be replaced between calls, as training does."""

    def __init__(self, config: ModelConfig, params: Any, layout: MeshLayout | None, *, batch_tokens: int = 8192):
        """`params` are stacked over layers, as in training, or separate for each layer, as in the engine.

        A batch has about `batch_tokens` tokens, including padding.
        """
        if config.n_encoder_layers is not None or not config.causal:
            kind = "causal=false" if not config.causal else f"n_encoder_layers={config.n_encoder_layers}"
            raise ConfigError(
                f"model.{kind}: evaluation scores only causal decoder-only models; use the validation sets of training "
                "([data.validation]) instead"
            )
        no_capacity: dict[str, None] = dict(eval_capacity_factor=None, eval_capacity=None)
        experts = config.experts and dataclasses.replace(config.experts, **no_capacity)
        self.config = dataclasses.replace(config, remat="none", dropout=0.0, experts=experts)
        self.params = params
        self.layout = layout
        self.resume_log: ResumeLog | None = None  # results of earlier attempts; `score_totals` reads and extends it
        self._batch_tokens = batch_tokens
        self._n_shards = layout.batch_shards if layout else 1  # shards of a batch
        program = functools.partial(_score_batch, self.config, make_model(self.config))
        if layout is None:
            self._score = jax.jit(program)
        else:
            self._score = compile_barrier(jax.jit(with_layout(program, layout), out_shardings=replicated(layout)))

    def score_totals(
        self, requests: Sequence[ScoringRequest], on_progress: BatchProgressFn = _ignore
    ) -> list[tuple[float, bool]]:
        """Return the total log-probability of each request, and whether every scored token is the most probable one.

        Results in the resume log are not computed again. Raises ScoringError like `score`.
        """
        digests = [request.digest() if self.resume_log else "" for request in requests]
        results: list[Any] = [self.resume_log.get(digest) if self.resume_log else None for digest in digests]
        missing = [i for i, result in enumerate(results) if result is None]
        n_known = len(requests) - len(missing)

        def store(number: int, loglikelihood: Loglikelihood) -> None:
            i = missing[number]
            results[i] = loglikelihood.total, bool(loglikelihood.greedy.all())
            if self.resume_log:
                self.resume_log.add(digests[i], results[i])

        self.score([requests[i] for i in missing], lambda done, _: on_progress(n_known + done, len(requests)), store)
        return [(total, greedy) for total, greedy in results]

    def score(
        self,
        requests: Sequence[ScoringRequest],
        on_progress: BatchProgressFn = _ignore,
        on_result: OnResult = _ignore,
    ) -> list[Loglikelihood]:
        """Return the log-likelihoods of the requests in order. `on_progress` is called after each batch.

        Raises ScoringError for a request with more than seq_len + 1 tokens, without a token before the first scored one, or
        with ids outside the vocabulary.
        """
        for number, request in enumerate(requests):
            self._check(request, number)
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].tokens))
        loglikelihoods: list[Loglikelihood | None] = [None] * len(requests)
        in_flight: deque[tuple[list[int], Any]] = deque()
        done = 0
        while order or in_flight:
            if order:
                length = self._bucket(requests[order[0]])
                batch_size = self._batch_size(length)
                batch = [i for i in order[:batch_size] if self._bucket(requests[i]) == length]
                order = order[len(batch) :]
                in_flight.append((batch, self._dispatch([requests[i] for i in batch], length)))
            if len(in_flight) > MAX_IN_FLIGHT or not order:
                batch, results = in_flight.popleft()
                logprobs, greedy = (np.asarray(result) for result in results)
                for row, i in enumerate(batch):
                    end = len(requests[i].tokens) - 1
                    scored = slice(end - requests[i].n_scored, end)
                    loglikelihoods[i] = result = Loglikelihood(logprobs[row, scored], greedy[row, scored])
                    on_result(i, result)
                done += len(batch)
                on_progress(done, len(requests))
        return [result for result in loglikelihoods if result is not None]

    def _check(self, request: ScoringRequest, number: int) -> None:
        length = len(request.tokens)
        if not 0 < request.n_scored < length or length > self.config.seq_len + 1:
            raise ScoringError(
                f"request {number} scores {request.n_scored} of {length} tokens; it must score at least 1, have at least 1 "
                f"token before the first scored one, and have at most model.seq_len + 1 = {self.config.seq_len + 1} tokens"
            )
        lowest = min(request.tokens)
        highest = max(request.tokens)
        if lowest < 0 or highest >= self.config.n_vocab:
            bad = lowest if lowest < 0 else highest
            raise ScoringError(
                f"request {number} has token {bad}; the vocabulary is 0..{self.config.n_vocab - 1}; use the model's tokenizer"
            )

    def _bucket(self, request: ScoringRequest) -> int:
        limit = self.config.padded_len_limit(len(request.tokens) - 1)
        return bucket(len(request.tokens) - 1, min(MIN_BUCKET, limit), limit)

    def _batch_size(self, length: int) -> int:
        """Return the number of sequences of `length` in a full batch, a multiple of the number of batch shards."""
        return max(self._batch_tokens // length // self._n_shards, 1) * self._n_shards

    def _dispatch(self, requests: list[ScoringRequest], length: int) -> tuple[Array, Array]:
        """Start computing a batch, padded to a power of two sequences per shard, which limits the number of compilations."""
        per_shard = -(-len(requests) // self._n_shards)
        batch_size = min(self._n_shards << (per_shard - 1).bit_length(), self._batch_size(length))
        tokens, targets = np.zeros((2, batch_size, length), np.int32)
        for row, request in enumerate(requests):
            tokens[row, : len(request.tokens) - 1] = request.tokens[:-1]
            targets[row, : len(request.tokens) - 1] = request.tokens[1:]
        return self._score(self.params, TokenBatch(self._to_devices(tokens), self._to_devices(targets)))

    def _to_devices(self, values: np.ndarray) -> Any:
        if self.layout is None:
            return values
        sharding = self.layout.sharding(("batch", "sequence"), values.shape, "batch")
        return jax.make_array_from_callback(values.shape, sharding, values.__getitem__)


def make_scorer(engine: Engine, *, batch_tokens: int = 8192) -> LoglikelihoodScorer:
    """Return a scorer that shares the engine's weights. Raises ConfigError for a model with an encoder."""
    programs = require_decoder_only(engine, "evaluation").programs
    return LoglikelihoodScorer(programs.config, programs.weights, programs.layout, batch_tokens=batch_tokens)


def _score_batch(
    config: ModelConfig, model: Model, params: Any, batch: TokenBatch
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """Return the log-probability of every target, and whether it is the most probable token.

    The sequence is processed in chunks, so that only the logits of one chunk are in memory at a time.
    """
    params = stack_layers(params)
    x, _ = model.hidden_states(params, batch.tokens)
    head = lm_head(params, config)
    batch_size, length = batch.tokens.shape

    def score(chunk: tuple[Array, Array]) -> tuple[Array, Array]:
        x, targets = chunk
        logits = lm_logits(x, head, config)
        is_target = jnp.arange(config.n_vocab)[None, None] == targets[..., None]
        target_logits = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
        return target_logits - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == targets

    n_chunks = 1
    while batch_size * length // n_chunks * config.n_vocab * 4 > MAX_LOGIT_BYTES and length % (2 * n_chunks) == 0:
        n_chunks *= 2

    def to_chunks(y: Array) -> Array:
        return y.reshape(batch_size, n_chunks, -1, *y.shape[2:]).swapaxes(0, 1)

    targets = to_zigzag(batch.targets)
    if n_chunks == 1:
        scores = score((x, targets))
    else:
        scores = jax.lax.map(score, (to_chunks(x), to_chunks(targets)))
        scores = jax.tree.map(lambda y: y.swapaxes(0, 1).reshape(batch_size, length), scores)
    logprobs, greedy = (from_zigzag(constrain(y, "batch", "sequence")) for y in scores)
    return logprobs, greedy

# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Sampling of a token from logits, with penalties, temperature, and top-k, top-p and min-p filters.

All options are arrays with one value per request, so requests with different options share one compiled program. The
order is

    repetition penalty -> presence and frequency penalties -> bias -> allowed tokens -> temperature -> top-k -> top-p
    -> min-p -> sample

Each filter is applied to the renormalized result of the previous filter. Tokens are ranked by probability, and tokens of
equal probability by id in ascending order; every filter keeps at least the first token. Requests are independent: a request
samples the same tokens alone and in a batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from mesh_transformer.config import ConfigError, SampleConfig


class SamplingOptions(NamedTuple):
    """Sampling options of each request. Values that disable an option are in parentheses."""

    temperature: Float[Array, "B"]  # (1) divides the logits; 0: greedy decoding
    top_k: Int[Array, "B"]  # (0) keep the k most probable tokens
    top_p: Float[Array, "B"]  # (1) keep the smallest set of most probable tokens with at least this total probability
    min_p: Float[Array, "B"]  # (0) drop tokens less probable than this factor times the most probable token
    repetition_penalty: Float[Array, "B"]  # (1) for tokens that occurred: divides positive, multiplies negative logits
    presence_penalty: Float[Array, "B"]  # (0) subtracted from the logits of generated tokens
    frequency_penalty: Float[Array, "B"]  # (0) subtracted once for every time a token was generated


class Sampled(NamedTuple):
    """A sampled token per request, with its log-probabilities (natural log)."""

    token: Int[Array, "B"]
    logprob: Float[Array, "B"]  # in the unmodified distribution of the model: no penalties, temperature or filters
    sampling_logprob: Float[Array, "B"]  # in the distribution that was sampled; 0 at temperature 0


def make_options(config: SampleConfig, batch_size: int) -> SamplingOptions:
    """Return the same options for `batch_size` requests."""
    return stack_options([config] * batch_size)


def stack_options(configs: list[SampleConfig]) -> SamplingOptions:
    """Return the options of several requests as arrays. Raises ConfigError for an empty list."""
    if not configs:
        raise ConfigError("got no sampling options; at least 1 request is required")
    columns = ([getattr(config, field) for config in configs] for field in SamplingOptions._fields)
    types = [jnp.int32 if field == "top_k" else jnp.float32 for field in SamplingOptions._fields]
    return SamplingOptions(*(jnp.asarray(column, dtype) for column, dtype in zip(columns, types, strict=True)))


def position_keys(keys: Key[Array, "B"], positions: Int[Array, "B"]) -> Key[Array, "B"]:
    """Return the random key of each request for the token at its position."""
    return jax.vmap(jax.random.fold_in)(keys, positions)


def sample(
    logits: Float[Array, "B V"],
    options: SamplingOptions,
    counts: Int[Array, "B V"],
    keys: Key[Array, "B"],
    *,
    prompt: Bool[Array, "B V"] | None = None,
    bias: Float[Array, "B V"] | None = None,
    allowed: Bool[Array, "B V"] | None = None,
) -> Sampled:
    """Sample one token per request.

    Args:
      logits: Scores of the model.
      options: Sampling options.
      counts: How often each request has generated each token.
      keys: Random keys for this position; see position_keys.
      prompt: Tokens of each request's prompt, for the repetition penalty.
      bias: Added to the logits after the penalties.
      allowed: Tokens that may be sampled, at least one per request.
    """
    raw = logits.astype(jnp.float32)
    penalized = penalize_repetition(raw, counts > 0 if prompt is None else prompt | (counts > 0), options)
    penalized = penalize_counts(penalized, counts, options)
    if bias is not None:
        penalized = penalized + bias
    if allowed is not None:
        penalized = jnp.where(allowed, penalized, -jnp.inf)
    greedy = options.temperature <= 0.0
    best = jnp.argmax(penalized, axis=-1).astype(jnp.int32)

    def sample_filtered() -> tuple[Array, Array]:
        filtered = filter_logits(penalized, options)
        token = jnp.where(greedy, best, jax.vmap(jax.random.categorical)(keys, filtered).astype(jnp.int32))
        return token, jnp.where(greedy, 0.0, _logprob(filtered, token))

    def take_best() -> tuple[Array, Array]:
        return best, jnp.zeros_like(options.temperature)

    token, sampling_logprob = jax.lax.cond(jnp.all(greedy), take_best, sample_filtered)
    return Sampled(token, _logprob(raw, token), sampling_logprob)


def top_logprobs(logits: Float[Array, "B V"], n: int) -> tuple[Float[Array, "B n"], Int[Array, "B n"]]:
    """Return log-probabilities and ids of the `n` most probable tokens, by decreasing probability and then by id."""
    logprobs, tokens = jax.lax.top_k(jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1), n)
    return logprobs, tokens


def penalize_repetition(
    logits: Float[Array, "B V"], occurred: Bool[Array, "B V"], options: SamplingOptions
) -> Float[Array, "B V"]:
    """Divide positive logits of `occurred` tokens by the penalty, and multiply negative logits (Keskar et al. 2019, CTRL)."""
    penalty = options.repetition_penalty[:, None]
    return jnp.where(occurred, jnp.where(logits > 0.0, logits / penalty, logits * penalty), logits)


def penalize_counts(
    logits: Float[Array, "B V"], counts: Int[Array, "B V"], options: SamplingOptions
) -> Float[Array, "B V"]:
    """Return logit - count frequency_penalty - [count > 0] presence_penalty, as in OpenAI's API."""
    frequency = options.frequency_penalty[:, None]
    presence = options.presence_penalty[:, None]
    return logits - counts.astype(jnp.float32) * frequency - (counts > 0).astype(jnp.float32) * presence


def filter_logits(logits: Float[Array, "B V"], options: SamplingOptions) -> Float[Array, "B V"]:
    """Return `scale_temperature(logits)`, with -inf for tokens that a filter drops.

    Filters that no request uses are not computed. Requests of temperature 0 use no filter, because filters do
    not change the most probable token.
    """
    scaled = scale_temperature(logits, options.temperature)
    stochastic = options.temperature > 0.0
    k = jnp.where(stochastic & (options.top_k > 0), options.top_k, scaled.shape[-1])
    p = jnp.where(stochastic, options.top_p, 1.0)
    all_tokens = jnp.ones(scaled.shape, bool)
    keep = jax.lax.cond(jnp.any(k < scaled.shape[-1]), lambda: keep_top_k(scaled, k), lambda: all_tokens)
    keep &= jax.lax.cond(jnp.any(p < 1.0), lambda: keep_top_p(scaled, p, keep), lambda: all_tokens)
    keep &= keep_min_p(scaled, options.min_p)
    return jnp.where(keep, scaled, -jnp.inf)


def scale_temperature(logits: Float[Array, "B V"], temperature: Float[Array, "B"]) -> Float[Array, "B V"]:
    """Return (logits - max) / temperature, with 1 instead of a temperature of 0.

    The maximum is subtracted first, because a small temperature could otherwise make several logits infinite.
    """
    shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
    return shifted / jnp.where(temperature > 0.0, temperature, 1.0)[:, None]


def keep_top_k(scaled: Float[Array, "B V"], k: Int[Array, "B"]) -> Bool[Array, "B V"]:
    """Return a mask of the `k` most probable tokens of each request. `scaled` is from scale_temperature."""
    return _keep_first(scaled, jnp.ones_like(scaled), k.astype(jnp.float32))


def keep_top_p(scaled: Float[Array, "B V"], p: Float[Array, "B"], keep: Bool[Array, "B V"]) -> Bool[Array, "B V"]:
    """Return a mask of the smallest set of most probable tokens with a fraction `p` of the probability of `keep`.

    If `p` is 1, the mask contains all tokens.

    This is nucleus sampling (Holtzman et al. 2020, arXiv 1904.09751): a token is kept if the total probability of the tokens ranked
    before it is less than `p`. Weights are exp(logit) without normalization, so that sums of equal weights are exact.
    """
    weights = jnp.where(keep, jnp.exp(scaled), 0.0)
    wanted = jnp.maximum(p * jnp.sum(weights, axis=-1), jnp.finfo(jnp.float32).tiny)
    return _keep_first(scaled, weights, jnp.where(p < 1.0, wanted, jnp.inf))


def keep_min_p(scaled: Float[Array, "B V"], min_p: Float[Array, "B"]) -> Bool[Array, "B V"]:
    """Return a mask of tokens that are at least `min_p` times as probable as the most probable token, whose logit is 0."""
    return jnp.exp(scaled) >= min_p[:, None]


def _keep_first(
    scaled: Float[Array, "B V"], weights: Float[Array, "B V"], wanted: Float[Array, "B"]
) -> Bool[Array, "B V"]:
    """Return a mask of the tokens whose preceding tokens in the ranking have a total weight of less than `wanted`.

    The mask is found by bisection instead of sorting: first the smallest logit that is kept, then the largest id among
    tokens of that logit. This needs only sums over the vocabulary. Their cost does not depend on the distribution (sorting
    50,000 logits takes ten times as long on a CPU), and a sharded vocabulary need not be gathered.
    """
    # Logits are <= 0, and the bits of non-negative floats have the order of the floats.
    rank = jax.lax.bitcast_convert_type(jnp.abs(scaled), jnp.int32)
    last = _bisect(rank, weights, wanted, bits=31)[:, None]
    tied = rank == last
    before = jnp.sum(jnp.where(rank < last, weights, 0.0), axis=-1)
    n_vocab = scaled.shape[-1]
    ids = jnp.arange(n_vocab, dtype=jnp.int32)[None]
    last_id = _bisect(ids, jnp.where(tied, weights, 0.0), wanted - before, bits=n_vocab.bit_length())[:, None]
    return (rank < last) | (tied & (ids <= last_id))


def _bisect(
    rank: Int[Array, "R V"], weights: Float[Array, "B V"], wanted: Float[Array, "B"], *, bits: int
) -> Int[Array, "B"]:
    """Return the largest `bits`-bit integer r such that tokens of rank < r weigh less than `wanted`; 0 if there is none."""

    def set_bit(i: Array, largest: Array) -> Array:
        candidate = largest | (1 << (bits - 1 - i))
        weight = jnp.sum(jnp.where(rank < candidate[:, None], weights, 0.0), axis=-1)
        return jnp.where(weight < wanted, candidate, largest)

    return jax.lax.fori_loop(0, bits, set_bit, jnp.zeros(weights.shape[:1], jnp.int32))


def _logprob(logits: Float[Array, "B V"], token: Int[Array, "B"]) -> Float[Array, "B"]:
    """Return the log-probability of each request's `token`."""
    token_logits = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return token_logits - jax.nn.logsumexp(logits, axis=-1)

# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""logits -> token: penalties, temperature, the filters top-k, top-p and min-p, and the draw.

Everything is an array per request, so requests with different options share one compiled program. The order is

    repetition penalty -> presence and frequency penalties -> bias -> what is allowed -> temperature -> top-k -> top-p
    -> min-p -> draw

where each filter sees the distribution the one before it left, renormalised. Tokens are ranked by probability, equal
ones by id, the lowest first; every filter keeps the first. Rows do not influence each other: a request draws the same
tokens alone and among others.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from mesh_transformer.config import ConfigError, SampleConfig


class SamplingOptions(NamedTuple):
    """How each request draws; the value that turns an option off in brackets."""

    temperature: Float[Array, "B"]  # (1) divides the logits; 0: the most probable token
    top_k: Int[Array, "B"]  # (0) keep the k most probable tokens
    top_p: Float[Array, "B"]  # (1) keep the fewest most probable tokens that have this probability together
    min_p: Float[Array, "B"]  # (0) drop tokens less probable than this times the most probable one
    repetition_penalty: Float[Array, "B"]  # (1) of seen tokens: divides positive logits, multiplies negative ones
    presence_penalty: Float[Array, "B"]  # (0) subtracted from the logits of tokens drawn before
    frequency_penalty: Float[Array, "B"]  # (0) subtracted once for every time a token was drawn


class Sampled(NamedTuple):
    """A token per request, and how probable it was."""

    token: Int[Array, "B"]
    logprob: Float[Array, "B"]  # natural log, in the model's own distribution: no penalty, temperature or filter
    drawn_logprob: Float[Array, "B"]  # in the distribution it was drawn from; 0 at temperature 0


def make_options(config: SampleConfig, batch_size: int) -> SamplingOptions:
    """`config`'s options for every one of `batch_size` requests."""
    return stack_options([config] * batch_size)


def stack_options(configs: list[SampleConfig]) -> SamplingOptions:
    """Options of requests that differ, in order. Raises ConfigError for none at all."""
    if not configs:
        raise ConfigError("no request to make sampling options for")
    columns = ([getattr(config, field) for config in configs] for field in SamplingOptions._fields)
    types = [jnp.int32 if field == "top_k" else jnp.float32 for field in SamplingOptions._fields]
    return SamplingOptions(*(jnp.asarray(column, dtype) for column, dtype in zip(columns, types, strict=True)))


def position_keys(keys: Key[Array, "B"], positions: Int[Array, "B"]) -> Key[Array, "B"]:
    """[B] keys, each a request's own key folded with the position of the token to be drawn."""
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
    """One token per request.

    `counts` says how often each request has drawn each token so far; `prompt` which tokens its prompt has, which only
    the repetition penalty regards; `bias` is added to the logits; no token is drawn that is not `allowed` (each row must
    allow one). `keys` [B] are used up: fold in the position (`position_keys`).
    """
    raw = logits.astype(jnp.float32)
    penalised = penalize_repetition(raw, counts > 0 if prompt is None else prompt | (counts > 0), options)
    penalised = penalize_counts(penalised, counts, options)
    if bias is not None:
        penalised = penalised + bias
    if allowed is not None:
        penalised = jnp.where(allowed, penalised, -jnp.inf)
    greedy = options.temperature <= 0.0
    best = jnp.argmax(penalised, axis=-1).astype(jnp.int32)

    def draw() -> tuple[Array, Array]:
        filtered = filter_logits(penalised, options)
        token = jnp.where(greedy, best, jax.vmap(jax.random.categorical)(keys, filtered).astype(jnp.int32))
        return token, jnp.where(greedy, 0.0, _logprob(filtered, token))

    token, drawn_logprob = jax.lax.cond(jnp.all(greedy), lambda: (best, jnp.zeros_like(options.temperature)), draw)
    return Sampled(token, _logprob(raw, token), drawn_logprob)


def top_logprobs(logits: Float[Array, "B V"], n: int) -> tuple[Float[Array, "B n"], Int[Array, "B n"]]:
    """Log-probabilities and ids of the model's `n` most probable tokens, in order, equal ones by id."""
    logprobs, tokens = jax.lax.top_k(jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1), n)
    return logprobs, tokens


def penalize_repetition(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], options: SamplingOptions
) -> Float[Array, "B V"]:
    """Positive logits of seen tokens divided by the penalty, negative ones multiplied (Keskar et al. 2019, CTRL)."""
    penalty = options.repetition_penalty[:, None]
    return jnp.where(seen, jnp.where(logits > 0.0, logits / penalty, logits * penalty), logits)


def penalize_counts(
    logits: Float[Array, "B V"], counts: Int[Array, "B V"], options: SamplingOptions
) -> Float[Array, "B V"]:
    """logit - count frequency_penalty - [count > 0] presence_penalty, as OpenAI's API defines them."""
    frequency, presence = options.frequency_penalty[:, None], options.presence_penalty[:, None]
    return logits - counts.astype(jnp.float32) * frequency - (counts > 0).astype(jnp.float32) * presence


def filter_logits(logits: Float[Array, "B V"], options: SamplingOptions) -> Float[Array, "B V"]:
    """Logits divided by the temperature, -inf where a filter drops the token, the greatest of each row 0.

    A filter that no row uses is not computed. Rows of temperature 0 use none: their token does not depend on it.
    """
    scaled = scale_temperature(logits, options.temperature)
    draws = options.temperature > 0.0
    k = jnp.where(draws & (options.top_k > 0), options.top_k, scaled.shape[-1])
    p = jnp.where(draws, options.top_p, 1.0)
    everything = jnp.ones(scaled.shape, bool)
    keep = jax.lax.cond(jnp.any(k < scaled.shape[-1]), lambda: keep_top_k(scaled, k), lambda: everything)
    keep &= jax.lax.cond(jnp.any(p < 1.0), lambda: keep_top_p(scaled, p, keep), lambda: everything)
    keep &= keep_min_p(scaled, options.min_p)
    return jnp.where(keep, scaled, -jnp.inf)


def scale_temperature(logits: Float[Array, "B V"], temperature: Float[Array, "B"]) -> Float[Array, "B V"]:
    """(logits - the row's greatest) / temperature; as if it were 1 where it is 0.

    The greatest goes first, because a small temperature would otherwise make several logits infinite.
    """
    shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
    return shifted / jnp.where(temperature > 0.0, temperature, 1.0)[:, None]


def keep_top_k(scaled: Float[Array, "B V"], k: Int[Array, "B"]) -> Bool[Array, "B V"]:
    """The `k` most probable tokens of each row; all if there are no more. `scaled` as from `scale_temperature`."""
    return _keep_first(scaled, jnp.ones_like(scaled), k.astype(jnp.float32))


def keep_top_p(scaled: Float[Array, "B V"], p: Float[Array, "B"], keep: Bool[Array, "B V"]) -> Bool[Array, "B V"]:
    """The fewest most probable tokens that have the share `p` of the probability of those in `keep`; all if p is 1.

    That is Holtzman et al. 2020 (arXiv 1904.09751): a token stays if those ranked before it have less than `p`. Weights
    are exp(logit) undivided, so that equal tokens add up exactly.
    """
    weights = jnp.where(keep, jnp.exp(scaled), 0.0)
    share = jnp.maximum(p * jnp.sum(weights, axis=-1), jnp.finfo(jnp.float32).tiny)
    return _keep_first(scaled, weights, jnp.where(p < 1.0, share, jnp.inf))


def keep_min_p(scaled: Float[Array, "B V"], min_p: Float[Array, "B"]) -> Bool[Array, "B V"]:
    """Tokens at least `min_p` times as probable as the row's most probable one, whose logit is 0."""
    return jnp.exp(scaled) >= min_p[:, None]


def _keep_first(
    scaled: Float[Array, "B V"], weights: Float[Array, "B V"], wanted: Float[Array, "B"]
) -> Bool[Array, "B V"]:
    """Tokens before which, in order of rank, there is less than the weight `wanted`.

    Found without sorting, by bisection of the greatest logit that ends the kept ones and then, among tokens of that
    logit, of the id: sums over the vocabulary only, whose cost does not depend on the distribution (a sort of 50,000
    logits costs ten times as much on a CPU) and which need no gathering where the vocabulary is sharded.
    """
    rank = jax.lax.bitcast_convert_type(jnp.abs(scaled), jnp.int32)  # logits are 0 or less: bits of floats are ordered
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
    """The greatest number of `bits` bits such that the tokens of lesser rank weigh less than `wanted`; 0 if none is."""

    def set_bit(i: Array, found: Array) -> Array:
        tried = found | (1 << (bits - 1 - i))
        weight = jnp.sum(jnp.where(rank < tried[:, None], weights, 0.0), axis=-1)
        return jnp.where(weight < wanted, tried, found)

    return jax.lax.fori_loop(0, bits, set_bit, jnp.zeros(weights.shape[:1], jnp.int32))


def _logprob(logits: Float[Array, "B V"], token: Int[Array, "B"]) -> Float[Array, "B"]:
    """Log-probability of each row's `token`."""
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)

# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""What lies on the devices while rows are decoded, and what a program reports of the tokens it drew."""

from typing import Any, NamedTuple

from jaxtyping import Array, Bool, Float, Int, Key

from mesh_transformer.sample.sampling import SamplingOptions


class BatchParams(NamedTuple):
    """What each row wants; it does not change while the row is seated."""

    keys: Key[Array, "B"]
    options: SamplingOptions
    prompt: Bool[Array, "B V"]  # tokens of the row's prompt
    bias: Float[Array, "B V"]  # added to the logits
    limit: Int[Array, "B"]  # place of the last token the row may draw
    stop_tokens: Int[Array, "B Z"]  # padded with -1


class DecodeState(NamedTuple):
    """The seated rows, of which finished ones are empty seats."""

    caches: Any  # as init_cache, every layer an array [B, K, S, C] of its own
    token: Int[Array, "B"]  # drawn last, not in the cache yet
    place: Int[Array, "B"]  # of `token` in its sequence
    finished: Bool[Array, "B"]
    counts: Int[Array, "B V"]  # how often each token was drawn
    asked: BatchParams


class StepOutput(NamedTuple):
    """What was drawn: N tokens for every row, of which those that are `live` count."""

    token: Int[Array, "B N"]
    logprob: Float[Array, "B N"]  # natural log, in the model's own distribution
    live: Bool[Array, "B N"]
    top: tuple[Float[Array, "B N M"], Int[Array, "B N M"]] | None  # log-probabilities and ids of the likeliest tokens
    finished: Bool[Array, "B"]

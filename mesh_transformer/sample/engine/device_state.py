# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""On-device state of the decode batch, and the output that each decode program returns."""

from typing import Any, NamedTuple

from jaxtyping import Array, Bool, Float, Int, Key

from mesh_transformer.sample.sampling import SamplingOptions


class BatchParams(NamedTuple):
    """Parameters of the requests in a batch, constant while a request is in its slot."""

    keys: Key[Array, "B"]
    options: SamplingOptions
    prompt: Bool[Array, "B V"]  # tokens that occur in the request's prompt
    bias: Float[Array, "B V"]  # added to the logits
    last_position: Int[Array, "B"]  # largest position at which the request may generate a token
    stop_tokens: Int[Array, "B Z"]  # padded with -1


class DecodeState(NamedTuple):
    """State of the decode slots. Slots of finished requests are empty."""

    caches: Any  # from init_cache, but with a separate array [B, K, S, C] for every layer
    token: Int[Array, "B"]  # last sampled token, not in the KV cache yet
    position: Int[Array, "B"]  # position of `token` in its sequence
    finished: Bool[Array, "B"]
    counts: Int[Array, "B V"]  # how often each token was generated
    params: BatchParams


class StepOutput(NamedTuple):
    """N tokens for every slot; only the tokens marked `valid` were generated, and the others are discarded."""

    token: Int[Array, "B N"]
    logprob: Float[Array, "B N"]  # natural log-probability in the unmodified distribution of the model
    valid: Bool[Array, "B N"]
    # log-probabilities and ids of the M most probable tokens; None if they are not requested
    top: tuple[Float[Array, "B N M"], Int[Array, "B N M"]] | None
    finished: Bool[Array, "B"]

# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Synthetic warm-up requests that compile an engine's programs before real requests arrive."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from mesh_transformer.config import SampleConfig
from mesh_transformer.sample.engine.buckets import MIN_PREFILL_LEN
from mesh_transformer.sample.engine.decoder_only import DecoderOnlyEngine
from mesh_transformer.sample.engine.programs import DECODE_CHUNK
from mesh_transformer.sample.engine.requests import RequestParams


class WarmupRequest(NamedTuple):
    """A request of the warm-up."""

    prompt: list[int]
    max_tokens: int
    top_logprobs: int


def warm_up(engine: DecoderOnlyEngine, max_len: int) -> Iterator[tuple[int, int]]:
    """Compile the programs for single requests of up to `max_len` tokens, prompt and output together.

    The requests run during the iteration, which yields the numbers of finished requests and of all requests before each
    request. Programs for several samples at once and for constraints are not compiled. With speculative decoding every
    request runs with and without draft tokens. The engine must be idle; its prefix cache is cleared afterwards.
    """
    requests = list(_warmup_requests(engine, max_len))
    drafter = engine.drafter
    try:
        for done, request in enumerate(requests):
            yield done, len(requests)
            params = RequestParams(SampleConfig(), max_tokens=request.max_tokens, top_logprobs=request.top_logprobs)
            for engine.drafter in (None, drafter) if drafter else (None,):
                engine.submit(engine.make_request(request.prompt, params))
                while not engine.idle:
                    engine.step()
    finally:
        engine.drafter = drafter
        engine.prefix_cache.clear()


def _warmup_requests(engine: DecoderOnlyEngine, max_len: int) -> Iterator[WarmupRequest]:
    """Yield requests for every cache length and, for each cache length, for every length of the last prefill chunk."""
    n_vocab, seq_len = engine.config.n_vocab, engine.config.seq_len
    cache_len = engine.buckets.cache_len
    # Distinct first tokens, so that the prompts do not hit the prefix cache.
    tokens = (number % n_vocab for number in itertools.count())
    length = cache_len(1)
    last_length = cache_len(min(max_len + DECODE_CHUNK, seq_len))  # a decode chunk may end after the output
    shorter: list[int] = []
    while max_len:
        if length < last_length:  # output that grows into the next cache length
            yield WarmupRequest([next(tokens)] * (length - 2), 4, 0)
        longest = [next(tokens)] * max(length - 2 * DECODE_CHUNK, 1)  # a prompt whose output needs no larger cache
        for top_logprobs in (0, 1):  # the web page requests alternatives
            yield WarmupRequest(longest, min(2, seq_len - len(longest)), top_logprobs)
        if shorter:  # continue a cached prompt of a smaller cache length
            yield WarmupRequest(shorter + [next(tokens)] * (2 * DECODE_CHUNK + MIN_PREFILL_LEN), 1, 0)
        for chunk in (MIN_PREFILL_LEN << i for i in range(length.bit_length())):
            if 2 * chunk > length:
                break
            if shorter:  # shares a cached prefix with `longest`, so that only one chunk is left to prefill
                yield WarmupRequest(
                    longest[: length // 2] + [next(tokens)] * min(chunk, length // 2 - 2 * DECODE_CHUNK), 1, 0
                )
            else:
                yield WarmupRequest([next(tokens)] * chunk, 1, 0)
        if length == last_length:
            return
        length = cache_len(length + 1)
        shorter = longest

# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Requests that nobody made, so that those somebody makes find their programs compiled."""

import itertools
from collections.abc import Iterator

from mesh_transformer.config import SampleConfig
from mesh_transformer.sample.engine.engine import DecoderOnlyEngine
from mesh_transformer.sample.engine.prefill import SHORTEST_PIECE
from mesh_transformer.sample.engine.programs import DECODE_CHUNK


def warm_up(engine: DecoderOnlyEngine, longest: int) -> Iterator[tuple[int, int]]:
    """Compile what one request at a time needs, as long as prompt and answer have at most `longest` tokens.

    Works while it is iterated, and says before every piece of work how many are done, and how many there are. Left out
    are programs for several samples at once and for constraints. The engine must be idle, and forgets the prompts.
    """
    prompts = list(_make_prompts(engine, longest))
    try:
        for done, (prompt, max_tokens, n_top) in enumerate(prompts):
            yield done, len(prompts)
            engine.submit(engine.make_row(prompt, SampleConfig(), max_tokens=max_tokens, n_top=n_top))
            while not engine.idle:
                engine.step()
    finally:
        engine.prefixes.forget()


def _make_prompts(engine: DecoderOnlyEngine, longest: int) -> Iterator[tuple[list[int], int, int]]:
    """(prompt, max_tokens, n_top) for every size of the cache, and within it for every size of a piece that is read last."""
    n_vocab, seq_len = engine.config.n_vocab, engine.config.seq_len
    fresh = (number % n_vocab for number in itertools.count())  # a token each, lest prompts begin alike
    size, last = (
        engine.cache_len(1),
        engine.cache_len(min(longest + DECODE_CHUNK, seq_len)),
    )  # a burst may end behind the answer
    before: list[int] = []
    while longest:
        if size < last:  # an answer that grows into the next size
            yield [next(fresh)] * (size - 2), 4, 0
        whole = [next(fresh)] * max(size - 2 * DECODE_CHUNK, 1)  # so that the answer needs no larger cache
        for n_top in (0, 1):  # without and with the likeliest tokens, as the page asks
            yield whole, min(2, seq_len - len(whole)), n_top
        if before:  # what goes on from something shorter
            yield before + [next(fresh)] * (2 * DECODE_CHUNK + SHORTEST_PIECE), 1, 0
        for piece in (SHORTEST_PIECE << i for i in range(size.bit_length())):
            if 2 * piece > size:
                break
            if before:  # what begins as `whole` does, so that no more than a piece is left to be read
                yield whole[: size // 2] + [next(fresh)] * min(piece, size // 2 - 2 * DECODE_CHUNK), 1, 0
            else:
                yield [next(fresh)] * piece, 1, 0
        if size == last:
            return
        size, before = engine.cache_len(size + 1), whole

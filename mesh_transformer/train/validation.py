# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Validation: loss, perplexity and bits per byte of a validation set, and bits per byte of general compressors."""

import lzma
import math
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from mesh_transformer.data.dataset import ValidationSet
from mesh_transformer.data.loader import Batch
from mesh_transformer.train.loss import TokenLosses

MAX_COMPRESSED_BYTES = 64_000_000  # larger sets are not compressed for comparison: xz takes a second per megabyte
COMPRESS_BYTES = 1_000_000  # compressed between two checks of should_stop


class ValidationScore(NamedTuple):
    """Results of one validation set."""

    loss: float  # nats per token
    perplexity: float
    bits_per_byte: float
    tokens: int


def validate(
    validation: ValidationSet,
    score_batch: Callable[[Batch], TokenLosses],
    *,
    rows: Sequence[int] | None = None,
    max_batches: int | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> ValidationScore | None:
    """Compute the loss of the first `max_batches` batches (default: all); return None if `should_stop()` is true.

    The sums of the batches stay on the devices until the end. Bits per byte are the bits of all tokens, including
    end-of-text tokens, per byte of text; for a part of a set, the bytes are estimated in proportion to the tokens.
    `score_batch` receives the `rows` of each batch that this process reads (None: all) and returns sums over all processes.
    """
    total = min(validation.n_batches, max_batches or validation.n_batches)
    sums: list[TokenLosses] = []
    for index, batch in enumerate(validation.batches(rows)):
        if index == total:
            break
        if should_stop():
            return None
        sums.append(score_batch(batch))
        if index >= 2:
            jax.block_until_ready(sums[index - 2])  # dispatch at most two batches ahead
        on_progress(index + 1, total)
    sum_loss = math.fsum(float(part.sum_loss) for part in sums)
    tokens = math.fsum(float(part.tokens) for part in sums)
    n_bytes = validation.n_bytes * tokens / validation.n_tokens
    loss = sum_loss / tokens
    return ValidationScore(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        bits_per_byte=sum_loss / math.log(2) / n_bytes,
        tokens=int(tokens),
    )


def compressed_bits_per_byte(text: bytes, should_stop: Callable[[], bool] = lambda: False) -> dict[str, float]:
    """Return bits per byte of `gzip -9` and `xz -9` on the whole text; empty above 64 MB, or if `should_stop()` is true."""
    if not text or len(text) > MAX_COMPRESSED_BYTES:
        return {}
    bits_per_byte = {}
    tools = {
        "gzip": zlib.compressobj(9, zlib.DEFLATED, 31),  # 31: with a gzip header
        "xz": lzma.LZMACompressor(preset=9),
    }
    for name, tool in tools.items():
        n_bytes = 0
        for start in range(0, len(text), COMPRESS_BYTES):
            if should_stop():
                return {}
            n_bytes += len(tool.compress(text[start : start + COMPRESS_BYTES]))
        bits_per_byte[f"{name}_bits_per_byte"] = 8 * (n_bytes + len(tool.flush())) / len(text)
    return bits_per_byte

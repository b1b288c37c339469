# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The engine of a model with an encoder: the prompt is read once, and what the decoder writes is the answer.

Rows that wait are answered in batches, one after the other; a batch ends with its last row. The encoder's keys and
values stay in the cache, so a token costs one pass through the decoder. Every token is taken by its experts, in the
encoder too, so that a row's answer depends neither on padding nor on its neighbours. A token at place p of sample i is
drawn as in engine.py.
"""

import dataclasses
import itertools
from collections import deque
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from mesh_transformer.config import ConfigError, ModelConfig
from mesh_transformer.mesh import MeshLayout
from mesh_transformer.sample.engine.encoder_decoder_programs import EncoderDecoderPrograms, EncoderDecoderState
from mesh_transformer.sample.engine.engine import DecoderOnlyEngine
from mesh_transformer.sample.engine.prefill import SHORTEST_CACHE, bucket, count_rows
from mesh_transformer.sample.engine.programs import DECODE_CHUNK
from mesh_transformer.sample.engine.requests import Event, PromptError, Request
from mesh_transformer.sample.sampling import stack_options

SHORTEST_SOURCE = 16


@dataclasses.dataclass
class Batch:
    """Rows that are being answered together."""

    rows: list[Request]
    writing: EncoderDecoderState
    sources: Int[Array, "B S"] | None  # until they are read
    ended: set[int] = dataclasses.field(default_factory=set)  # rows, by id

    @property
    def unfinished(self) -> list[Request]:
        """Rows that are to get more tokens."""
        return [row for row in self.rows if not (row.cancelled or row.id in self.ended)]


class EncoderDecoderEngine(DecoderOnlyEngine):
    """As Engine, of a model with an encoder; what only a decoder alone can do is refused."""

    def __init__(
        self,
        config: ModelConfig,
        params: Mapping[str, Mapping[str, Any]],
        *,
        start: int,
        end: int,
        layout: MeshLayout | None = None,
        slots: int = 32,
        weights: str = "saved",
        cache: str = "model",
    ):
        """`params`, `layout`, `slots`, `weights` and `cache` as Engine's.

        `start` is what the decoder is given first, `end` what follows a text that the encoder reads (data/span_corruption.py).
        """
        self.writer = EncoderDecoderPrograms(config, params, layout, weights=weights, cache=cache)
        self.config, self.slots, self.start_token, self.end_token = config, slots, start, end
        self._pieces = layout.batch_shards if layout else 1
        self._ids, self._waiting, self._batch = itertools.count(), deque[Request](), None

    @property
    def programs(self) -> Any:  # type: ignore[override]
        """There are none of Engine's."""
        raise ConfigError("model.n_encoder_layers: serving and scoring are for decoders alone; use device_sample.py")

    def submit(self, row: Request) -> Request:
        """See Engine; PromptError for what this engine does not do."""
        if row.logit_bias or row.n_top or row.score_prompt or row.constraint:
            raise PromptError("a model with an encoder draws tokens alone: no bias, scores or constraint")
        return super().submit(row)

    @property
    def seated(self) -> list[Request]:
        """See Engine."""
        return [] if self._batch is None else self._batch.unfinished

    @property
    def queued(self) -> list[Request]:
        """See Engine."""
        return list(self._waiting)

    @property
    def idle(self) -> bool:
        """See Engine."""
        return not (self._waiting or self.seated)

    def step(self, steps: int = DECODE_CHUNK) -> list[Event]:
        """See Engine; all rows of a batch get up to `steps` tokens."""
        events: list[Event] = []
        if not self.seated:
            self._batch = self._admit()
        for _ in range(steps):
            if self._batch is None or not self.seated:
                break
            events += self._advance(self._batch)
        return events

    def _admit(self) -> Batch | None:
        rows = [row for row in self._waiting if not row.cancelled]
        rows, self._waiting = rows[: self.slots], deque(rows[self.slots :])
        if not rows:
            return None
        texts = [[*row.prompt.tolist(), self.end_token][: self.config.seq_len] for row in rows]
        length = bucket(max(map(len, texts)), SHORTEST_SOURCE, self.config.seq_len)
        size = count_rows(len(rows), self._pieces)
        padded = np.zeros((2, size, length), np.int32)  # tokens, and 1 where there is one
        for i in range(size):
            text = texts[min(i, len(texts) - 1)]
            padded[0, i, : len(text)], padded[1, i, : len(text)] = text, 1
        filled = [rows[min(i, len(rows) - 1)] for i in range(size)]
        room = bucket(max(row.max_tokens for row in rows), SHORTEST_CACHE, self.config.seq_len)
        keys = jnp.stack([jax.random.fold_in(jax.random.key(row.seed), row.sample) for row in filled])
        options = stack_options([row.options for row in filled])
        sources, segments = map(self.writer.place, padded)
        return Batch(rows, self.writer.begin(segments, options, keys, self.start_token, room), sources)

    def _advance(self, batch: Batch) -> list[Event]:
        """One token of every row."""
        if batch.sources is None:
            batch.writing, drawn = self.writer.write(batch.writing)
        else:
            batch.writing, drawn = self.writer.read(batch.writing, batch.sources)
            batch.sources = None
        tokens, logprobs = np.asarray(drawn.token).tolist(), np.asarray(drawn.logprob).tolist()
        events = []
        for row, token, logprob in zip(batch.rows, tokens, logprobs, strict=False):
            if row.cancelled or row.id in batch.ended:
                continue
            row.tokens.append(token)
            finish = "stop" if token in row.stop_tokens else "length" if len(row.tokens) >= row.max_tokens else None
            batch.ended |= {row.id} if finish else set()
            events.append(Event(row.id, token, logprob, finish))
        return events

# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Engine of decoder-only models: continuous batching with chunked prefill and a few programs of fixed shapes.

A request waits, its prompt is prefilled in chunks together with prompts of similar length, and its output is decoded in a slot
until its last token. Prefill and decode alternate, so neither blocks the other. Prompt lengths are rounded up to powers of two
from 16, cache lengths to powers of two from 128, and the number of slots to a few sizes, so that compiled programs are
reused (buckets.py). Prompts are padded on the right: KV cache entries of the padding are overwritten before any query
reads them.
"""

from collections import deque
from collections.abc import Sequence

import numpy as np

from mesh_transformer.config import ConfigError, ModelConfig
from mesh_transformer.mesh import MeshLayout
from mesh_transformer.model.params import Params
from mesh_transformer.sample.engine.buckets import Buckets, round_up
from mesh_transformer.sample.engine.decode_batch import DecodeBatch
from mesh_transformer.sample.engine.device_state import DecodeState
from mesh_transformer.sample.engine.engine import Engine, EngineOptions
from mesh_transformer.sample.engine.prefill import PrefillBatch
from mesh_transformer.sample.engine.prefix_cache import PrefixCache
from mesh_transformer.sample.engine.programs import DECODE_CHUNK, EnginePrograms
from mesh_transformer.sample.engine.requests import Event, PromptError, Request, SpeculativeStats
from mesh_transformer.sample.engine.speculative import Drafter

DECODE_CHUNK_DURING_PREFILL = 4  # maximum number of tokens per decode chunk while prompts are prefilled
MAX_PREFILLS = 2  # prefill batches processed in turn, so that a long prompt does not block short ones


class DecoderOnlyEngine(Engine):
    """Continuous batching for a decoder-only model, with prefix caching and speculative decoding."""

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        options: EngineOptions | None = None,
        *,
        layout: MeshLayout | None = None,
        drafter: Drafter | None = None,
    ):
        """Put `params`, as returned by `make_model(config).init`, on the devices; the originals may be deleted afterwards.

        Args:
          config: The model.
          params: The weights, on any devices.
          options: Capacity and data types. The prefix cache is disabled if `layout` shards the batch.
          layout: Sharding of weights and caches. None: everything is on the default device.
          drafter: Source of draft tokens for speculative decoding.

        Raises:
          ConfigError: an array cannot be divided evenly over the mesh, or the model or mesh is not supported.
        """
        options = options or EngineOptions()
        shards = layout.batch_shards if layout else 1
        self.config = config
        self.programs = EnginePrograms(
            config, params, layout, weight_dtype=options.weight_dtype, kv_cache_dtype=options.kv_cache_dtype
        )
        self.slots = round_up(options.slots, shards)
        self.buckets = Buckets(config.seq_len, shards)
        self.prefix_cache = PrefixCache(options.prefix_cache_bytes if shards == 1 else 0)
        self._prefill_chunk = options.prefill_chunk
        self._waiting: deque[Request] = deque()
        self._prefills: deque[PrefillBatch] = deque()
        self._decode_batch = DecodeBatch(self.programs, self.buckets, drafter)
        self._iterations = 0

    @property
    def compilations(self) -> dict[str, int]:
        return dict(self.programs.compilations)

    @property
    def active(self) -> list[Request]:
        return self._decode_batch.requests

    @property
    def queued(self) -> list[Request]:
        return [request for prefill in self._prefills for request in prefill.requests] + list(self._waiting)

    @property
    def is_speculative(self) -> bool:
        return self._decode_batch.drafter is not None

    @property
    def drafter(self) -> Drafter | None:
        """Source of draft tokens; may be replaced between steps."""
        return self._decode_batch.drafter

    @drafter.setter
    def drafter(self, drafter: Drafter | None) -> None:
        self._decode_batch.drafter = drafter

    @property
    def speculative_stats(self) -> SpeculativeStats:
        """Counts of draft tokens over all requests so far."""
        return self._decode_batch.stats

    @property
    def state(self) -> DecodeState | None:
        """State of the decode slots on the devices; None before the first request."""
        return self._decode_batch.state

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Return the logits of the next token after each of `tokens`, float32 [len(tokens), n_vocab].

        Raises:
          PromptError: there are no tokens, more than seq_len, or ids outside the vocabulary.
        """
        seq_len, n_vocab = self.config.seq_len, self.config.n_vocab
        if not 0 < len(tokens) <= seq_len:
            raise PromptError(f"got {len(tokens)} tokens; logits need at least 1 token and at most seq_len={seq_len}")
        if outside := [token for token in tokens if not 0 <= token < n_vocab]:
            raise PromptError(
                f"got the token {outside[0]}, but the model's vocabulary is 0..{n_vocab - 1}; use the model's tokenizer"
            )
        padded = np.zeros((self.buckets.batch_size(1), self._padded_len(tokens)), np.int32)
        padded[:, : len(tokens)] = tokens
        return np.asarray(self.programs.logits(padded)[0, : len(tokens)])

    def _padded_len(self, tokens: Sequence[int]) -> int:
        return self.buckets.prefill_len(len(tokens), self.config.padded_len_limit(len(tokens)))

    def submit(self, request: Request) -> Request:
        self._waiting.append(request)
        return request

    def step(self, steps: int = DECODE_CHUNK) -> list[Event]:
        """Admit requests, prefill one chunk, and decode up to `steps` tokens in every slot.

        With speculative decoding, a slot generates one token plus the accepted draft tokens instead.
        """
        self._iterations += 1
        self._drop_cancelled()
        self._start_prefills()
        events = self._prefill() if self._prefills else []
        if self.active:
            is_busy = bool(self._prefills or self._waiting)
            # After a prefill only one more token is decoded, so that first tokens are returned at once.
            limit = 1 if events else DECODE_CHUNK_DURING_PREFILL if is_busy else DECODE_CHUNK
            events += self._decode_batch.decode(min(steps, limit))
        return events

    def _drop_cancelled(self) -> None:
        self._waiting = deque(request for request in self._waiting if not request.cancelled)
        for prefill in list(self._prefills):
            if all(request.cancelled for request in prefill.requests):
                self._prefills.remove(prefill)

    def _start_prefills(self) -> None:
        """Start the prefill of waiting requests for which slots are free, grouped by similar length."""
        while self._waiting and len(self._prefills) < MAX_PREFILLS:
            free = self.slots - len(self.active) - sum(len(prefill.requests) for prefill in self._prefills)
            if free <= 0:
                return
            kind = self._prefill_kind(self._waiting[0])
            requests = [request for request in self._waiting if self._prefill_kind(request) == kind][:free]
            chosen = {request.id for request in requests}
            self._waiting = deque(request for request in self._waiting if request.id not in chosen)
            self._prefills.append(
                PrefillBatch(self.programs, self.prefix_cache, self.buckets, requests, self._prefill_chunk)
            )

    def _prefill_kind(self, request: Request) -> tuple[int, bool]:
        """Return the key by which requests are grouped for prefill: number of chunks, and whether the prompt is scored."""
        return -(-len(request.prompt) // self._prefill_chunk), request.params.score_prompt

    def _prefill(self) -> list[Event]:
        """Prefill one chunk: alternately of the batch with the fewest remaining tokens and of the oldest batch."""
        shortest = min(self._prefills, key=lambda prefill: prefill.remaining)
        prefill = self._prefills[0] if self._iterations % 2 else shortest
        prefill.prefill_chunk()
        if prefill.remaining:
            return []
        self._prefills.remove(prefill)
        requests = [request for request in prefill.requests if not request.cancelled]
        return self._decode_batch.admit(prefill, requests) if requests else []


def require_decoder_only(engine: Engine, purpose: str) -> DecoderOnlyEngine:
    """Return `engine` if its model is decoder-only. Otherwise raises ConfigError, which states the `purpose`."""
    if not isinstance(engine, DecoderOnlyEngine):
        raise ConfigError(
            f"model.n_encoder_layers={engine.config.n_encoder_layers}: {purpose} supports only decoder-only models; use "
            "device_sample.py for this model"
        )
    return engine

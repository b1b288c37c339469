# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Compiled programs of the engines: prefill, slot insertion, decode, and draft and verify of speculative decoding.

Decoding one token reads every weight once, so the time per token is bound by memory bandwidth; weights.py stores the
weights such that no additional bytes are read.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mesh_transformer.config import ConfigError, ModelConfig
from mesh_transformer.mesh import MeshLayout, constrain, use_layout
from mesh_transformer.model.attention.kv_cache import cache_axes
from mesh_transformer.model.shapes import init_cache
from mesh_transformer.model.transformer import make_model
from mesh_transformer.sample.engine.device_state import BatchParams, DecodeState, StepOutput
from mesh_transformer.sample.engine.requests import MAX_TOP_LOGPROBS
from mesh_transformer.sample.engine.weights import (
    choose_compiler_options,
    prepare_weights,
    stack_layers,
    unstack_layers,
)
from mesh_transformer.sample.sampling import position_keys, sample, top_logprobs

DECODE_CHUNK = 16  # maximum number of tokens per slot that one call of the decode program generates


class CompiledModel:
    """A model with its weights, its mesh, and jitted programs whose compilations are counted.

    Weights may be shapes (jax.ShapeDtypeStruct); the programs can then be lowered but not run.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Mapping[str, Mapping[str, Any]],
        layout: MeshLayout | None,
        *,
        weight_dtype: str = "saved",
        kv_cache_dtype: str = "model",
    ):
        """Prepare the weights; for the dtypes see ServeConfig.

        Raises:
          ConfigError: the mesh has context or pipeline parallelism.
        """
        if layout and (layout.mesh.shape["context"] > 1 or layout.mesh.shape["pipeline"] > 1):
            sizes = layout.mesh.shape
            raise ConfigError(
                f"mesh.context={sizes['context']}, mesh.pipeline={sizes['pipeline']}: inference does not support context or "
                "pipeline parallelism; set both to 1"
            )
        # Layers are unrolled, nothing is differentiated, and sequences are not sharded, because decoding has length 1.
        unroll = max(config.n_layers, config.n_encoder_layers or 0)
        self.config = dataclasses.replace(config, scan_unroll=unroll, remat="none", dropout=0.0)
        self.layout = layout and layout._replace(rules={**layout.rules, "sequence": (), "activation_seq": ()})
        self.compilations: Counter[str] = Counter()
        self.weights = prepare_weights(params, self.config, self.layout, weight_dtype)
        self._cache_dtype = None if kv_cache_dtype == "model" else kv_cache_dtype
        self._model = make_model(self.config)
        with use_layout(self.layout):
            self._compiler_options = choose_compiler_options(self.weights, self.config)

    def _program(self, name: str, function: Callable[..., Any], **jit_options: Any) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            self.compilations[name] += 1
            with use_layout(self.layout):
                return function(*arguments)

        return jax.jit(counted, compiler_options=self._compiler_options, **jit_options)

    def _empty_caches(self, batch_size: int, cache_len: int, encoder_len: int = 0) -> Any:
        caches = init_cache(self.config, batch_size, cache_len, self._cache_dtype, encoder_len=encoder_len)
        return constrain_caches(unstack_layers(caches))


class PromptChunk(NamedTuple):
    """Consecutive tokens of every prompt of a prefill batch."""

    tokens: Int[Array | np.ndarray, "B T"]  # padded on the right
    start: Int[Array | np.ndarray, "B"]  # position of the first token of the chunk
    last: Int[Array | np.ndarray, "B"]  # position of the prompt's last token, in this chunk or another
    targets: Int[Array | np.ndarray, "B T"] | None = None  # next tokens, to be scored; None: no scores
    reached_len: Int[Array | np.ndarray, "B"] | None = None  # see `make_rotation`; None: last + 1


class EnginePrograms(CompiledModel):
    """Programs of a decoder-only model, which donate the caches, logits and states passed to them."""

    def __init__(
        self,
        config: ModelConfig,
        params: Mapping[str, Mapping[str, Any]],
        layout: MeshLayout | None,
        *,
        weight_dtype: str = "saved",
        kv_cache_dtype: str = "model",
    ):
        """See CompiledModel."""
        if not config.causal:
            raise ConfigError(
                "model.causal=false: an encoder-only model cannot generate text; load it with mesh_transformer.load_model and use "
                "the Encoder that it returns"
            )
        if config.n_encoder_layers is not None:
            raise ConfigError(
                f"model.n_encoder_layers={config.n_encoder_layers}: DecoderOnlyEngine supports only decoder-only models; use "
                "EncoderDecoderEngine, as device_sample.py does"
            )
        super().__init__(config, params, layout, weight_dtype=weight_dtype, kv_cache_dtype=kv_cache_dtype)
        self.make_caches = self._program("make_caches", self._empty_caches, static_argnums=(0, 1))
        self.make_state = self._program("make_state", self.empty_state, static_argnums=(1, 2))
        self.copy_out = self._program("copy_out", self._copy_out)
        self.copy_in = self._program("copy_in", self._copy_in, donate_argnums=(0,))
        self.resize = self._program("resize", self._resize, static_argnums=(2,))
        self.first_token = self._program("first_token", self._first_token, static_argnums=(4,))
        self.insert = self._program("insert", self._insert, donate_argnums=(0,))
        self._logits_program = self._program("logits", self._logits)
        self._prefill_program = self._program("prefill", self._prefill, static_argnums=(4,), donate_argnums=(1, 2))
        self._decode_program = self._program("decode", self._decode, static_argnums=(5,), donate_argnums=(1,))
        self._verify_program = self._program("verify", self._verify, static_argnums=(4,), donate_argnums=(1,))
        self._draft_program = self._program("draft", self._draft, static_argnums=(6,), donate_argnums=(1,))

    def logits(self, tokens: Int[np.ndarray, "B T"]) -> Float[Array, "B T V"]:
        """Return the logits of the next token after each token, float32, without a KV cache."""
        return self._logits_program(self.weights, tokens)

    def prefill(self, *arguments: Any) -> tuple[Any, Float[Array, "B V"], tuple[Array, Array, Array] | None]:
        """Call the compiled `_prefill` with the engine's weights."""
        return self._prefill_program(self.weights, *arguments)

    def decode(self, *arguments: Any) -> tuple[DecodeState, StepOutput]:
        """Call the compiled `_decode` with the engine's weights."""
        return self._decode_program(self.weights, *arguments)

    def verify(self, *arguments: Any) -> tuple[DecodeState, StepOutput]:
        """Call the compiled `_verify` with the engine's weights."""
        return self._verify_program(self.weights, *arguments)

    def draft(self, *arguments: Any) -> tuple[Any, Int[Array, "B N"]]:
        """Call the compiled `_draft` with the engine's weights."""
        return self._draft_program(self.weights, *arguments)

    def lower_decode(self, state: DecodeState) -> Any:
        """Lower the decode program for a state given as shapes, without compiling it."""
        steps = jax.ShapeDtypeStruct((), jnp.int32)
        empty = jax.ShapeDtypeStruct(state.token.shape, jnp.bool_)
        return self._decode_program.lower(self.weights, state, steps, empty, None, 0)

    def empty_state(self, like: BatchParams, slots: int, cache_len: int) -> DecodeState:
        """Return a state of empty slots; `like` has the shapes and dtypes of request parameters."""
        params = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], (slots, *x.shape[1:])), like)
        zeros = jnp.zeros(slots, jnp.int32)
        counts = jnp.zeros((slots, self.config.n_vocab), jnp.int32)
        return DecodeState(self._empty_caches(slots, cache_len), zeros, zeros, jnp.ones(slots, bool), counts, params)

    def _resize(self, state: DecodeState, order: Int[Array, "B"], cache_len: int) -> DecodeState:
        """Return a state whose slot i is slot order[i] of `state`, or empty where order[i] is negative."""
        moved: DecodeState = jax.tree.map(lambda x: x[jnp.maximum(order, 0)], state)

        def fit(x: Array) -> Array:
            return jnp.pad(x[:, :, :cache_len], ((0, 0), (0, 0), (0, max(cache_len - x.shape[2], 0)), (0, 0)))

        caches = constrain_caches(jax.tree.map(fit, moved.caches))
        return moved._replace(caches=caches, finished=moved.finished | (order < 0))

    def _copy_out(self, caches: Any, index: Int[Array, ""]) -> Any:
        """Return the cache [1, ...] of the sequence at `index`."""
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, index, 1), caches)

    def _copy_in(self, caches: Any, new: Any, index: Int[Array, ""]) -> Any:
        """Return `caches` with the cache `new` [1, ...], truncated to their length, at `index`."""

        def put(x: Array, y: Array) -> Array:
            return jax.lax.dynamic_update_slice(x, y[:, :, : x.shape[2]], (index, 0, 0, 0))

        return jax.tree.map(put, caches, new)

    def _forward(
        self,
        weights: Any,
        tokens: Int[Array | np.ndarray, "B T"],
        positions: Int[Array | np.ndarray, "B T"],
        caches: Any,
        logits_at: Any = None,
        reached_len: Any = None,
    ) -> tuple[Float[Array, "B U V"], Any]:
        inputs = dict(positions=positions, cache=stack_layers(caches), logits_at=logits_at, reached_len=reached_len)
        logits, stacked = self._model.apply(stack_layers(weights), tokens, **inputs)
        return constrain(logits, "batch", "sequence", "activation_embed"), constrain_caches(unstack_layers(stacked))

    def _logits(self, weights: Any, tokens: Int[Array | np.ndarray, "B T"]) -> Float[Array, "B T V"]:
        logits, _ = self._model.apply(stack_layers(weights), tokens)
        return constrain(logits, "batch", "sequence", "activation_embed").astype(jnp.float32)

    def _prefill(
        self, weights: Any, caches: Any, logits: Float[Array, "B V"], chunk: PromptChunk, with_scores: bool
    ) -> tuple[Any, Float[Array, "B V"], tuple[Array, Array, Array] | None]:
        """Return the caches with `chunk` added, next-token logits, and scores of the targets (None without targets).

        The logits of a prompt are replaced if its last token is in the chunk. Scores are the log-probabilities of the
        targets [B, T], and the log-probabilities and ids [B, T, M] of the most probable tokens.
        """
        chunk_len = chunk.tokens.shape[1]
        positions = chunk.start[:, None] + jnp.arange(chunk_len, dtype=jnp.int32)[None]
        last = jnp.clip(chunk.last - chunk.start, 0, chunk_len - 1)
        reached_len = chunk.last + 1 if chunk.reached_len is None else chunk.reached_len
        # Only the logits of the last position are computed, unless all positions are scored.
        logits_at = None if with_scores else last
        new, caches = self._forward(weights, chunk.tokens, positions, caches, logits_at, reached_len)
        last_logits = jnp.take_along_axis(new, last[:, None, None], axis=1)[:, 0] if with_scores else new[:, 0]
        ends_here = (chunk.last >= chunk.start) & (chunk.last < chunk.start + chunk_len)
        scores = self._score(new, chunk.targets) if with_scores and chunk.targets is not None else None
        return caches, jnp.where(ends_here[:, None], last_logits, logits), scores

    def _score(
        self, logits: Float[Array, "B T V"], targets: Int[Array | np.ndarray, "B T"]
    ) -> tuple[Array, Array, Array]:
        flat = logits.reshape(-1, logits.shape[-1])
        best, ids = top_logprobs(flat, min(MAX_TOP_LOGPROBS, self.config.n_vocab))
        logprobs = jnp.take_along_axis(flat, targets.reshape(-1, 1), axis=1)[:, 0] - jax.nn.logsumexp(flat, axis=1)
        shape = targets.shape
        return logprobs.reshape(shape), best.reshape(*shape, -1), ids.reshape(*shape, -1)

    def _first_token(
        self,
        logits: Float[Array, "N V"],
        params: BatchParams,
        lengths: Int[Array, "N"],
        allowed: Bool[Array, "N V"] | None,
        n_top: int,
    ) -> tuple[DecodeState, StepOutput]:
        """Sample the first token after prompts of `lengths` tokens; return a state without caches."""
        zeros = jnp.zeros(lengths.shape, jnp.int32)
        counts = jnp.zeros((lengths.size, self.config.n_vocab), jnp.int32)
        state = DecodeState(None, zeros, lengths - 1, zeros.astype(bool), counts, params)
        state, output = self._sample(state, logits, ~state.finished, allowed, n_top)
        return state, jax.tree.map(lambda x: x[:, None], output)._replace(finished=state.finished)

    def _insert(self, state: DecodeState, new: DecodeState, slots: Int[Array, "N"]) -> DecodeState:
        """Return `state` with `new` in `slots`, both without caches; indices past the last slot are ignored."""
        return jax.tree.map(lambda x, y: x.at[slots].set(y, mode="drop"), state, new)

    def _sample(
        self,
        state: DecodeState,
        logits: Float[Array, "B V"],
        active: Bool[Array, "B"],
        allowed: Bool[Array, "B V"] | None,
        n_top: int,
    ) -> tuple[DecodeState, StepOutput]:
        """Sample the next token of every `active` slot; the arrays of the output have no dimension N."""
        params = state.params
        position = state.position + 1
        keys = position_keys(params.keys, position)
        sampled = sample(
            logits, params.options, state.counts, keys, prompt=params.prompt, bias=params.bias, allowed=allowed
        )
        stopped = jnp.any(sampled.token[:, None] == params.stop_tokens, axis=1)
        slots = jnp.arange(active.size)
        updated = state._replace(
            token=jnp.where(active, sampled.token, state.token),
            position=jnp.where(active, position, state.position),
            finished=state.finished | (active & (stopped | (position >= params.last_position))),
            counts=state.counts.at[slots, sampled.token].add(active.astype(jnp.int32)),
        )
        top = top_logprobs(logits, n_top) if n_top else None
        return updated, StepOutput(sampled.token, sampled.logprob, active, top, updated.finished)

    def _decode(
        self,
        weights: Any,
        state: DecodeState,
        steps: Int[Array, ""],
        empty: Bool[Array, "B"],
        allowed: Bool[Array, "B V"] | None,
        n_top: int,
    ) -> tuple[DecodeState, StepOutput]:
        """Generate up to `steps` tokens (at most DECODE_CHUNK) in every slot that is not `empty` or finished."""
        state = state._replace(finished=state.finished | empty)
        shape = (state.token.size, DECODE_CHUNK)
        top = (jnp.zeros((*shape, n_top)), jnp.zeros((*shape, n_top), jnp.int32)) if n_top else None
        blank = StepOutput(jnp.zeros(shape, jnp.int32), jnp.zeros(shape), jnp.zeros(shape, bool), top, state.finished)

        def unfinished(carry: Any) -> Bool[Array, ""]:
            i, state, _ = carry
            return (i < steps) & ~jnp.all(state.finished)

        def step(carry: Any) -> Any:
            i, state, output = carry
            logits, caches = self._forward(weights, state.token[:, None], state.position[:, None], state.caches)
            state, new = self._sample(state._replace(caches=caches), logits[:, 0], ~state.finished, allowed, n_top)
            written = jax.tree.map(
                lambda x, y: x.at[:, i].set(y), output._replace(finished=None), new._replace(finished=None)
            )
            return i + 1, state, written._replace(finished=new.finished)

        _, state, output = jax.lax.while_loop(unfinished, step, (jnp.int32(0), state, blank))
        return state, output

    def _verify(
        self, weights: Any, state: DecodeState, draft_tokens: Int[Array, "B N"], empty: Bool[Array, "B"], n_top: int
    ) -> tuple[DecodeState, StepOutput]:
        """Generate tokens while they equal `draft_tokens`, and one more token, in a single forward pass.

        Each position is sampled with its own random key, so the tokens do not depend on the draft. KV cache entries of rejected
        tokens are overwritten before any query reads them.
        """
        state = state._replace(finished=state.finished | empty)
        tokens = jnp.concatenate([state.token[:, None], draft_tokens], axis=1)
        positions = state.position[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        logits, caches = self._forward(weights, tokens, positions, state.caches)

        def step(
            carry: tuple[DecodeState, Array], x: tuple[Array, Array]
        ) -> tuple[tuple[DecodeState, Array], StepOutput]:
            state, active = carry
            position_logits, draft_token = x
            state, output = self._sample(state, position_logits, active, None, n_top)
            return (state, active & ~state.finished & (output.token == draft_token)), output

        no_draft = jnp.full_like(state.token, -1)[None]  # after the last draft token
        carry = (state._replace(caches=None), ~state.finished)
        xs = (logits.swapaxes(0, 1), jnp.concatenate([draft_tokens.T, no_draft]))
        (state, _), output = jax.lax.scan(step, carry, xs)
        output = jax.tree.map(lambda x: x.swapaxes(0, 1), output)
        return state._replace(caches=caches), output._replace(finished=state.finished)

    def _draft(
        self,
        weights: Any,
        caches: Any,
        logits: Float[Array, "B V"],
        position: Int[Array, "B"],
        counts: Int[Array, "B V"],
        params: BatchParams,
        n: int,
    ) -> tuple[Any, Int[Array, "B N"]]:
        """Sample `n` draft tokens after `position` with the requests' random keys; another model verifies them."""
        unfinished = jnp.zeros(position.shape, bool)
        params = params._replace(last_position=jnp.full_like(position, self.config.seq_len))
        state = DecodeState(None, position, position, unfinished, counts, params)
        draft_tokens = []
        for i in range(n):
            state, output = self._sample(state, logits, ~unfinished, None, 0)
            draft_tokens.append(output.token)
            if i + 1 < n:
                new, caches = self._forward(weights, state.token[:, None], state.position[:, None], caches)
                logits = new[:, 0]
        return caches, jnp.stack(draft_tokens, axis=1)


def constrain_caches(caches: Any) -> Any:
    """Constrain the sharding of per-layer caches, each array [B, K, S, C]."""
    return jax.tree.map(lambda x: constrain(x, *cache_axes(x.shape[1])), caches)

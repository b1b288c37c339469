# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The compiled programs of the engine: read a piece of prompts, seat rows, draw a burst of tokens, check proposed ones.

Decoding one token reads every weight once, and takes as long as that; weights.py lays them out so that it takes no longer.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mesh_transformer.config import ConfigError, ModelConfig
from mesh_transformer.mesh import MeshLayout, constrain
from mesh_transformer.sample.engine.compiled_model import CompiledModel, constrain_caches
from mesh_transformer.sample.engine.device_state import BatchParams, StepOutput, DecodeState
from mesh_transformer.sample.engine.weights import unstack_layers, stack_layers
from mesh_transformer.sample.sampling import position_keys, sample, top_logprobs

DECODE_CHUNK = 16  # tokens at most that one call of the decoding program draws for every row
MAX_TOP_LOGPROBS = 20  # alternatives reported for a token where a row asks for any


class EnginePrograms(CompiledModel):
    """What the engine calls: jitted functions of one model, its weights bound, which count their compilations."""

    def __init__(
        self,
        config: ModelConfig,
        params: Mapping[str, Mapping[str, Any]],
        layout: MeshLayout | None,
        *,
        weights: str = "saved",
        cache: str = "model",
    ):
        """See Engine; of weights given as shapes, programs can only be lowered."""
        if not config.causal or config.n_encoder_layers is not None:
            raise ConfigError(
                "this engine continues texts with a decoder alone; one with an encoder is sampled by RewritingEngine "
                "(device_sample.py), and an encoder alone (model.causal=false) writes nothing"
            )
        super().__init__(config, params, layout, weights=weights, cache=cache)
        self.make_caches = self._program("make_caches", self._empty_caches, static_argnums=(0, 1))
        self.make_state = self._program("make_state", self.empty_state, static_argnums=(1, 2))
        self.take_row = self._program("take_row", self._take_row)
        self.put_row = self._program("put_row", self._put_row, donate_argnums=(0,))
        self.resize = self._program("resize", self._resize, static_argnums=(2,))
        self.begin = self._program("begin", self._begin, static_argnums=(2,))
        self.seat = self._program("seat", self._seat, donate_argnums=(0,))
        self._read = self._program("read", self._read_chunk, donate_argnums=(1, 2))
        self._score = self._program("score", self._score_chunk, donate_argnums=(1, 2))
        self._decode = self._program("decode", self._draw_burst, static_argnums=(5,), donate_argnums=(1,))
        self._verify = self._program("verify", self._verify_proposed, static_argnums=(4,), donate_argnums=(1,))
        self._propose = self._program("propose", self._draw_proposals, static_argnums=(6,), donate_argnums=(1,))

    def read(self, *arguments: Any) -> tuple[Any, Float[Array, "B V"]]:
        """See _read_chunk; caches and logits that go in are gone."""
        return self._read(self.weights, *arguments)

    def score(self, *arguments: Any) -> tuple[Any, Float[Array, "B V"], tuple[Array, Array, Array]]:
        """See _score_chunk; caches and logits that go in are gone."""
        return self._score(self.weights, *arguments)

    def decode(self, *arguments: Any) -> tuple[DecodeState, StepOutput]:
        """See _draw_burst; the state that goes in is gone."""
        return self._decode(self.weights, *arguments)

    def lower_decode(self, state: DecodeState) -> Any:
        """The program of `decode` for a state given as shapes, lowered and not compiled; weights may be shapes as well."""
        steps, cancelled = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct(state.token.shape, jnp.bool_)
        return self._decode.lower(self.weights, state, steps, cancelled, None, 0)

    def empty_state(self, like: BatchParams, rows: int, cache_len: int) -> DecodeState:
        """All seats empty; `like` gives the kinds and widths of what rows ask for."""
        asked = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], (rows, *x.shape[1:])), like)
        zeros = jnp.zeros(rows, jnp.int32)
        counts = jnp.zeros((rows, self.config.n_vocab), jnp.int32)
        return DecodeState(self._empty_caches(rows, cache_len), zeros, zeros, jnp.ones(rows, bool), counts, asked)

    def verify(self, *arguments: Any) -> tuple[DecodeState, StepOutput]:
        """See _verify_proposed; the state that goes in is gone."""
        return self._verify(self.weights, *arguments)

    def propose(self, *arguments: Any) -> tuple[Any, Int[Array, "B N"]]:
        """See _draw_proposals; the caches that go in are gone."""
        return self._propose(self.weights, *arguments)

    def _resize(self, state: DecodeState, order: Int[Array, "B"], cache_len: int) -> DecodeState:
        """Row i of the result is row order[i] of `state`, or an empty seat where that is negative."""
        moved: DecodeState = jax.tree.map(lambda x: x[jnp.maximum(order, 0)], state)

        def fit(x: Array) -> Array:
            return jnp.pad(x[:, :, :cache_len], ((0, 0), (0, 0), (0, max(cache_len - x.shape[2], 0)), (0, 0)))

        caches = constrain_caches(jax.tree.map(fit, moved.caches))
        return moved._replace(caches=caches, finished=moved.finished | (order < 0))

    def _take_row(self, caches: Any, row: Int[Array, ""]) -> Any:
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, row, 1), caches)

    def _put_row(self, caches: Any, own: Any, row: Int[Array, ""]) -> Any:
        """`caches` with what `own` [1, ...] holds in its row, as far as it has room for it."""
        put = lambda x, y: jax.lax.dynamic_update_slice(x, y[:, :, : x.shape[2]], (row, 0, 0, 0))  # noqa: E731
        return jax.tree.map(put, caches, own)

    def _forward(
        self, params: Any, tokens: Int[Array, "B T"], places: Int[Array, "B T"], caches: Any, logits_at: Any = None
    ) -> tuple[Float[Array, "B U V"], Any]:
        logits, stacked = self._model.apply(
            stack_layers(params), tokens, positions=places, cache=stack_layers(caches), logits_at=logits_at
        )
        return constrain(logits, "batch", "sequence", "activation_embed"), constrain_caches(unstack_layers(stacked))

    def _read_chunk(
        self,
        params: Any,
        caches: Any,
        logits: Float[Array, "B V"],
        tokens: Int[Array, "B T"],
        first: Int[Array, "B"],
        last: Int[Array, "B"],
    ) -> tuple[Any, Float[Array, "B V"]]:
        """The caches with `tokens` at places `first`..., and the logits of rows whose place `last` is among them."""
        size = tokens.shape[1]
        places = first[:, None] + jnp.arange(size, dtype=jnp.int32)[None]
        found, caches = self._forward(params, tokens, places, caches, jnp.clip(last - first, 0, size - 1))
        here = (last >= first) & (last < first + size)
        return caches, jnp.where(here[:, None], found[:, 0], logits)

    def _score_chunk(
        self,
        params: Any,
        caches: Any,
        logits: Float[Array, "B V"],
        tokens: Int[Array, "B T"],
        first: Int[Array, "B"],
        last: Int[Array, "B"],
        targets: Int[Array, "B T"],
    ) -> tuple[Any, Float[Array, "B V"], tuple[Array, Array, Array]]:
        """As _read_chunk; also of every place the log-probability of its target and of the likeliest tokens, and their ids."""
        size = tokens.shape[1]
        places = first[:, None] + jnp.arange(size, dtype=jnp.int32)[None]
        found, caches = self._forward(params, tokens, places, caches)
        here = (last >= first) & (last < first + size)
        at_last = jnp.take_along_axis(found, jnp.clip(last - first, 0, size - 1)[:, None, None], axis=1)[:, 0]
        flat = found.reshape(-1, found.shape[-1])
        best, ids = top_logprobs(flat, min(MAX_TOP_LOGPROBS, self.config.n_vocab))
        chosen = jnp.take_along_axis(flat, targets.reshape(-1, 1), axis=1)[:, 0] - jax.nn.logsumexp(flat, axis=1)
        scores = (chosen.reshape(targets.shape), best.reshape(*targets.shape, -1), ids.reshape(*targets.shape, -1))
        return caches, jnp.where(here[:, None], at_last, logits), scores

    def _begin(
        self,
        logits: Float[Array, "N V"],
        new: tuple[BatchParams, Int[Array, "N"], Bool[Array, "N V"] | None],
        n_top: int,
    ) -> tuple[DecodeState, StepOutput]:
        """The first tokens of rows whose prompts have been read: their state, which has no caches yet.

        `new` has what they ask for, the lengths of their prompts, and the tokens they are allowed (None: all).
        """
        asked, lengths, allowed = new
        zeros = jnp.zeros(lengths.shape, jnp.int32)
        counts = jnp.zeros((lengths.size, self.config.n_vocab), jnp.int32)
        fresh = DecodeState(None, zeros, lengths - 1, zeros.astype(bool), counts, asked)
        fresh, record = self._draw(fresh, logits, ~fresh.finished, allowed, n_top)
        return fresh, jax.tree.map(lambda x: x[:, None], record)._replace(finished=fresh.finished)

    def _seat(self, state: DecodeState, fresh: DecodeState, seats: Int[Array, "N"]) -> DecodeState:
        """`state` with the rows of `fresh` on `seats`, both without caches; seats beyond the last drop out."""
        return jax.tree.map(lambda x, y: x.at[seats].set(y, mode="drop"), state, fresh)

    def _draw(
        self,
        state: DecodeState,
        logits: Float[Array, "B V"],
        live: Bool[Array, "B"],
        allowed: Bool[Array, "B V"] | None,
        n_top: int,
    ) -> tuple[DecodeState, StepOutput]:
        """The next token of every `live` row; the record has no dim of tokens yet."""
        place, asked = state.place + 1, state.asked
        keys = position_keys(asked.keys, place)
        drawn = sample(logits, asked.options, state.counts, keys, prompt=asked.prompt, bias=asked.bias, allowed=allowed)
        stopped = jnp.any(drawn.token[:, None] == asked.stop_tokens, axis=1)
        rows = jnp.arange(live.size)
        updated = state._replace(
            token=jnp.where(live, drawn.token, state.token),
            place=jnp.where(live, place, state.place),
            finished=state.finished | (live & (stopped | (place >= asked.limit))),
            counts=state.counts.at[rows, drawn.token].add(live.astype(jnp.int32)),
        )
        top = top_logprobs(logits, n_top) if n_top else None
        return updated, StepOutput(drawn.token, drawn.logprob, live, top, updated.finished)

    def _draw_burst(
        self,
        params: Any,
        state: DecodeState,
        steps: Int[Array, ""],
        cancelled: Bool[Array, "B"],
        allowed: Bool[Array, "B V"] | None,
        n_top: int,
    ) -> tuple[DecodeState, StepOutput]:
        """Up to `steps` tokens (at most BURST) for every row, fewer when all rows finish before."""
        state = state._replace(finished=state.finished | cancelled)
        shape = (state.token.size, DECODE_CHUNK)
        top = (jnp.zeros((*shape, n_top)), jnp.zeros((*shape, n_top), jnp.int32)) if n_top else None
        blank = StepOutput(jnp.zeros(shape, jnp.int32), jnp.zeros(shape), jnp.zeros(shape, bool), top, state.finished)

        def unfinished(carry: Any) -> Bool[Array, ""]:
            i, state, _ = carry
            return (i < steps) & ~jnp.all(state.finished)

        def step(carry: Any) -> Any:
            i, state, record = carry
            logits, caches = self._forward(params, state.token[:, None], state.place[:, None], state.caches)
            state, new = self._draw(state._replace(caches=caches), logits[:, 0], ~state.finished, allowed, n_top)
            write = lambda x, y: x.at[:, i].set(y)  # noqa: E731
            written = jax.tree.map(write, record._replace(finished=None), new._replace(finished=None))
            return i + 1, state, written._replace(finished=new.finished)

        _, state, record = jax.lax.while_loop(unfinished, step, (jnp.int32(0), state, blank))
        return state, record

    def _verify_proposed(
        self, params: Any, state: DecodeState, proposed: Int[Array, "B N"], cancelled: Bool[Array, "B"], n_top: int
    ) -> tuple[DecodeState, StepOutput]:
        """The tokens rows would draw one by one, as long as they are the `proposed` ones, and one more: one forward pass.

        Each place draws from its own key, so what is drawn does not depend on what was proposed. What the cache holds
        behind the last token kept is overwritten before a query can see it.
        """
        state = state._replace(finished=state.finished | cancelled)
        tokens = jnp.concatenate([state.token[:, None], proposed], axis=1)
        places = state.place[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        logits, caches = self._forward(params, tokens, places, state.caches)

        def step(carry: tuple[DecodeState, Array], x: tuple[Array, Array]) -> tuple[tuple[DecodeState, Array], StepOutput]:
            state, running = carry
            own_logits, guess = x
            state, record = self._draw(state, own_logits, running, None, n_top)
            return (state, running & ~state.finished & (record.token == guess)), record

        last = jnp.full_like(state.token, -1)[None]
        carry = (state._replace(caches=None), ~state.finished)
        (state, _), record = jax.lax.scan(step, carry, (logits.swapaxes(0, 1), jnp.concatenate([proposed.T, last])))
        record = jax.tree.map(lambda x: x.swapaxes(0, 1), record)
        return state._replace(caches=caches), record._replace(finished=state.finished)

    def _draw_proposals(
        self,
        params: Any,
        caches: Any,
        logits: Float[Array, "B V"],
        place: Int[Array, "B"],
        counts: Int[Array, "B V"],
        asked: BatchParams,
        n: int,
    ) -> tuple[Any, Int[Array, "B N"]]:
        """`n` tokens as this model would draw them with the keys that its rows have, behind a token at `place`."""
        rows = jnp.zeros(place.shape, bool)
        state = DecodeState(None, place, place, rows, counts, asked._replace(limit=jnp.full_like(place, self.config.seq_len)))
        proposed = []
        for i in range(n):
            state, record = self._draw(state, logits, ~rows, None, 0)
            proposed.append(record.token)
            if i + 1 < n:
                found, caches = self._forward(params, state.token[:, None], state.place[:, None], caches)
                logits = found[:, 0]
        return caches, jnp.stack(proposed, axis=1)

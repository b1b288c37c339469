# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The compiled programs of the engine: read a piece of prompts, draw the first tokens, draw a burst of tokens.

Decoding one token reads every weight once, and takes as long as that. Two things keep it from taking longer: layers
are separate arrays and laid out one after the other (slicing stacked weights copies them, which doubles the traffic
or worse), and weights are cast to the type they are used in once, here.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from mesh_transformer.config import ModelConfig
from mesh_transformer.mesh import Layout, constrain, use_layout
from mesh_transformer.model.params import STACK, Params
from mesh_transformer.model.transformer import describe_params, init_cache, make_model
from mesh_transformer.sample.sampling import Drawn, SamplingOptions, position_keys, sample

WIDEN_LATE = {
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    "xla_disable_hlo_passes": "while-loop-invariant-code-motion,while-loop-expensive-invariant-code-motion",
}
BURST = 16  # tokens at most that one call of the decoding program draws for every row


class Request(NamedTuple):
    """What does not change while a batch is decoded."""

    keys: Key[Array, "B"]
    options: SamplingOptions
    prompt: Bool[Array, "B V"]  # tokens of the row's prompt
    limit: Int[Array, "B"]  # place of the last token the row may draw
    stop_tokens: Int[Array, "Z"]  # padded with -1


class State(NamedTuple):
    """What decoding a token changes."""

    caches: Any  # as init_cache, every layer an array [B, K, S, C] of its own
    token: Int[Array, "B"]  # drawn last, not in the cache yet
    place: Int[Array, "B"]  # of `token` in its sequence
    finished: Bool[Array, "B"]
    counts: Int[Array, "B V"]  # how often each token was drawn


class Programs:
    """What the engine calls: jitted functions of one model, its weights bound, which count their compilations."""

    def __init__(self, config: ModelConfig, params: Params, layout: Layout | None):
        """See Engine."""
        # All layers in one piece; a sequence of one token cannot be cut, and nothing is differentiated.
        self.config = dataclasses.replace(config, unroll=config.n_layers, remat="none", dropout=0.0)
        self.layout = layout and layout._replace(rules={**layout.rules, "sequence": ()})
        self.compilations: Counter[str] = Counter()
        self._model = make_model(self.config)
        self._params = self._lay_out(params)
        self._compiler_options = self._choose_compiler_options()
        self.make_caches = self._program("make_caches", self._empty_caches, static_argnums=(0, 1))
        self.grow = self._program("grow", self._copy_caches, static_argnums=(1,))
        self.begin = self._program("begin", self._draw_first)
        self._read = self._program("read", self._read_chunk, donate_argnums=(1, 2))
        self._decode = self._program("decode", self._draw_burst, donate_argnums=(1,))

    def read(self, *arguments: Any) -> tuple[Any, Float[Array, "B V"]]:
        """See _read_chunk; caches and logits that go in are gone."""
        return self._read(self._params, *arguments)

    def decode(self, *arguments: Any) -> tuple[State, dict[str, Array]]:
        """See _draw_burst; the state that goes in is gone."""
        return self._decode(self._params, *arguments)

    def _program(self, name: str, function: Callable[..., Any], **jit_options: Any) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            self.compilations[name] += 1
            with use_layout(self.layout):
                return function(*arguments)

        return jax.jit(counted, compiler_options=self._compiler_options, **jit_options)

    def _choose_compiler_options(self) -> dict[str, Any] | None:
        """On a CPU weights narrower than the activations are widened one by one, where they are used.

        Otherwise XLA widens all of them first, before a burst's loop as well: in three times the memory.
        """
        widest = jnp.dtype(self.config.dtype).itemsize
        has_narrow = any(
            leaf.dtype.itemsize < max(widest, 4) for leaf in jax.tree.leaves(self._params) if leaf.ndim > 1
        )
        return WIDEN_LATE if has_narrow and jax.default_backend() == "cpu" else None

    def _lay_out(self, params: Params) -> Any:
        """`params` with every layer an array of its own, in the type and place they are used in."""
        described, dtype = describe_params(self.config), self.config.dtype

        def place(module: str, name: str, array: Array) -> Any:
            # Products and tables cast weights to the activations' type wherever they use them; the rest stays as it is,
            # and so do weights that were saved in a narrower type: twice as wide they would not fit where they did.
            axes, saved = described[module][name].axes, (array[0] if isinstance(array, tuple) else array).dtype
            narrower = name.startswith("w_") and jnp.dtype(dtype).itemsize < saved.itemsize
            wanted = dtype if narrower else saved
            if axes[:1] != (STACK,):
                return self._place(array.astype(wanted), axes, f"{module}/{name}")
            return tuple(self._place(layer.astype(wanted), axes[1:], f"{module}/{name}") for layer in array)

        return {
            module: {name: place(module, name, a) for name, a in arrays.items()} for module, arrays in params.items()
        }

    def _place(self, array: Array, axes: tuple[str, ...], name: str) -> Array:
        return array if self.layout is None else jax.device_put(array, self.layout.sharding(axes, array.shape, name))

    def _empty_caches(self, batch_size: int, cache_len: int) -> Any:
        return _constrain_caches(_split_layers(init_cache(self.config, batch_size, cache_len)))

    def _copy_caches(self, caches: Any, cache_len: int) -> Any:
        longer = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, cache_len - x.shape[2]), (0, 0)))  # noqa: E731
        return _constrain_caches(jax.tree.map(longer, caches))

    def _forward(
        self, params: Any, tokens: Int[Array, "B T"], places: Int[Array, "B T"], caches: Any, logits_at: Any
    ) -> Any:
        logits, stacked = self._model.apply(
            _stack_layers(params), tokens, positions=places, cache=_stack_layers(caches), logits_at=logits_at
        )
        return constrain(logits[:, 0], "batch", "residual"), _constrain_caches(_split_layers(stacked))

    def _read_chunk(
        self,
        params: Any,
        caches: Any,
        logits: Float[Array, "B V"],
        tokens: Int[Array, "B T"],
        first: Int[Array, ""],
        last: Int[Array, "B"],
    ) -> tuple[Any, Float[Array, "B V"]]:
        """The caches with `tokens` at places `first`..., and the logits of rows whose `last` token is among them."""
        size = tokens.shape[1]
        places = jnp.broadcast_to(first + jnp.arange(size, dtype=jnp.int32), tokens.shape)
        found, caches = self._forward(params, tokens, places, caches, jnp.clip(last - first, 0, size - 1))
        here = (last >= first) & (last < first + size)
        return caches, jnp.where(here[:, None], found, logits)

    def _draw_first(
        self,
        caches: Any,
        logits: Float[Array, "P V"],
        rows: Int[Array, "B"],
        lengths: Int[Array, "B"],
        padding: Bool[Array, "B"],
        request: Request,
    ) -> tuple[State, Drawn]:
        """Every sample's own copy of its prompt's cache, and its first token."""
        caches = _constrain_caches(jax.tree.map(lambda x: x[rows], caches))
        zeros = jnp.zeros(rows.shape, jnp.int32)
        counts = jnp.zeros((rows.size, self.config.n_vocab), jnp.int32)
        return self._draw(State(caches, zeros, lengths - 1, padding, counts), logits[rows], request)

    def _draw(self, state: State, logits: Float[Array, "B V"], request: Request) -> tuple[State, Drawn]:
        """The next token of every row that is not finished."""
        place = state.place + 1
        keys = position_keys(request.keys, place)
        drawn = sample(logits, request.options, state.counts, keys, prompt=request.prompt)
        live = ~state.finished
        stopped = jnp.any(drawn.token[:, None] == request.stop_tokens[None], axis=1)
        rows = jnp.arange(live.size)
        updated = State(
            caches=state.caches,
            token=jnp.where(live, drawn.token, state.token),
            place=jnp.where(live, place, state.place),
            finished=state.finished | stopped | (place >= request.limit),
            counts=state.counts.at[rows, drawn.token].add(live.astype(jnp.int32)),
        )
        return updated, drawn

    def _draw_burst(
        self, params: Any, state: State, request: Request, steps: Int[Array, ""], cancelled: Bool[Array, "B"]
    ) -> tuple[State, dict[str, Array]]:
        """Up to `steps` tokens (at most BURST) for every row, fewer when all rows finish before."""
        state = state._replace(finished=state.finished | cancelled)
        shape = (state.token.size, BURST)
        record = {"token": jnp.zeros(shape, jnp.int32), "logprob": jnp.zeros(shape), "live": jnp.zeros(shape, bool)}

        def unfinished(carry: Any) -> Bool[Array, ""]:
            i, state, _ = carry
            return (i < steps) & ~jnp.all(state.finished)

        def step(carry: Any) -> Any:
            i, state, record = carry
            live = ~state.finished
            logits, caches = self._forward(params, state.token[:, None], state.place[:, None], state.caches, None)
            state, drawn = self._draw(state._replace(caches=caches), logits, request)
            new = {"token": drawn.token, "logprob": drawn.logprob, "live": live}
            record = {name: record[name].at[:, i].set(new[name]) for name in record}
            return i + 1, state, record

        _, state, record = jax.lax.while_loop(unfinished, step, (jnp.int32(0), state, record))
        return state, record | {"finished": state.finished}


def _split_layers(stacked: Any) -> Any:
    """Every array [L, ...] as a tuple of its layers."""
    return jax.tree.map(lambda x: tuple(x[i] for i in range(x.shape[0])), stacked)


def _stack_layers(split: Any) -> Any:
    """Tuples of arrays stacked again, which costs nothing: XLA takes a slice of a concatenation from its operand."""
    is_split = lambda x: type(x) is tuple and bool(x) and isinstance(x[0], jax.Array)  # noqa: E731
    return jax.tree.map(lambda x: jnp.stack(x) if is_split(x) else x, split, is_leaf=is_split)


def _constrain_caches(caches: Any) -> Any:
    return jax.tree.map(lambda x: constrain(x, "batch", "kv_heads", "position", "head_dim"), caches)

# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Token embeddings, looked up in a matrix whose rows may be sharded over devices and are never gathered."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mesh_transformer.config import ModelConfig
from mesh_transformer.mesh import MeshLayout, axes_of, current_layout, psum_or_scatter
from mesh_transformer.model.quantization import Quantized, dequantize


def default_positions(tokens: Int[Array, "B T"], config: ModelConfig) -> Int[Array, "B T"]:
    """Return the position of each token: its index in the sequence, not counting `position_padding_token` if it is set."""
    if config.position_padding_token is None:
        return jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return jnp.maximum(jnp.cumsum(tokens != config.position_padding_token, axis=1) - 1, 0)


def position_rows(positions: Int[Array, "B T"], tokens: Int[Array, "B T"], config: ModelConfig) -> Int[Array, "B T"]:
    """Return the row of the learned position embeddings for each token."""
    rows = positions + config.position_offset
    if config.position_padding_token is None:
        return rows
    return jnp.where(tokens == config.position_padding_token, config.position_offset - 1, rows)


def embed_tokens(
    w_tokens: Float[Array, "V D"] | Quantized, tokens: Int[Array, "B T"], dtype: str
) -> Float[Array, "B T D"]:
    """Return `w_tokens[tokens]` in `dtype`. The gradient sums all uses of a token in float32.

    On several devices, each device looks up the tokens whose rows are in its shard, and the results are summed: B T D
    elements of `dtype` over the mesh axes of the vocabulary. The matrix is gathered along embed only, and its gradient is
    scattered along embed.
    """
    if isinstance(w_tokens, Quantized):
        return dequantize(jax.tree.map(lambda x: x[tokens], w_tokens), dtype)
    layout = current_layout()
    if layout is None:
        # The cast follows the lookup, so that the gradient is summed in float32.
        return w_tokens[tokens].astype(dtype)
    return _embed_sharded(w_tokens, tokens, layout, dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _embed_sharded(w_tokens: Array, tokens: Array, layout: MeshLayout, dtype: str) -> Array:
    w_spec, tokens_spec, output_spec, vocab_axes = _specs(w_tokens, tokens, layout)

    def embed_local(w_tokens: Array, tokens: Array) -> Array:
        index, is_local = _local_index(w_tokens, tokens, vocab_axes)
        return psum_or_scatter(jnp.where(is_local[..., None], w_tokens[index], 0).astype(dtype), vocab_axes)

    return jax.shard_map(
        embed_local, mesh=layout.mesh, in_specs=(w_spec, tokens_spec), out_specs=output_spec, check_vma=False
    )(w_tokens, tokens)


def _forward(w_tokens: Array, tokens: Array, layout: MeshLayout, dtype: str) -> tuple[Array, tuple]:
    return _embed_sharded(w_tokens, tokens, layout, dtype), (w_tokens, tokens)


def _backward(layout: MeshLayout, dtype: str, residuals: tuple, gradient: Array) -> tuple[Array, None]:
    w_tokens, tokens = residuals
    w_spec, tokens_spec, output_spec, vocab_axes = _specs(w_tokens, tokens, layout)
    gradient_spec = layout.spec(("vocab", "embed"), w_tokens.shape, "w_tokens")
    token_axes = tuple(axis for part in tokens_spec for axis in axes_of(part))
    embed_axes = axes_of(gradient_spec[1]) if len(gradient_spec) > 1 else ()
    if not set(embed_axes) <= set(token_axes):
        gradient_spec = w_spec
        embed_axes = ()

    def sum_local(w_tokens: Array, tokens: Array, gradient: Array) -> Array:
        index, is_local = _local_index(w_tokens, tokens, vocab_axes)
        gradient = jnp.where(is_local[..., None], gradient.astype(jnp.float32), 0.0)
        total = jnp.zeros(w_tokens.shape, jnp.float32).at[index].add(gradient)
        return psum_or_scatter(total, token_axes, scatter_axes=embed_axes, dim=1)

    in_specs = (w_spec, tokens_spec, output_spec)
    run = jax.shard_map(sum_local, mesh=layout.mesh, in_specs=in_specs, out_specs=gradient_spec, check_vma=False)
    return run(w_tokens, tokens, gradient), None


_embed_sharded.defvjp(_forward, _backward)


def _specs(w_tokens: Array, tokens: Array, layout: MeshLayout) -> tuple[Any, Any, Any, tuple[str, ...]]:
    """Return the specs of the matrix, the tokens and the embeddings, and the mesh axes of the vocabulary."""
    w_spec = layout.spec(("vocab", "activation_embed"), w_tokens.shape, "w_tokens")
    tokens_spec = layout.spec(("batch", "sequence"), tokens.shape, "activation [tokens]")
    output_shape = (*tokens.shape, w_tokens.shape[1])
    output_spec = layout.spec(("batch", "sequence", "activation_embed"), output_shape, "activation [embedded]")
    return w_spec, tokens_spec, output_spec, axes_of(w_spec[0]) if len(w_spec) else ()


def _local_index(w_tokens: Array, tokens: Array, vocab_axes: tuple[str, ...]) -> tuple[Array, Array]:
    """Return the row of each token in this device's shard of the matrix, and whether the shard holds that row."""
    first = jax.lax.axis_index(vocab_axes) * w_tokens.shape[0] if vocab_axes else 0
    index = tokens - first
    return jnp.clip(index, 0, w_tokens.shape[0] - 1), (index >= 0) & (index < w_tokens.shape[0])

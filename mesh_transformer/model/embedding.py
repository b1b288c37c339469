# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Rows of a table by token, where the table's rows may lie on many devices and are never gathered."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mesh_transformer.mesh import MeshLayout, psum_or_scatter, axes_of, current_layout
from mesh_transformer.model.quantization import Quantized, dequantize


def embed_tokens(table: Float[Array, "V D"] | Quantized, tokens: Int[Array, "B T"], dtype: str) -> Float[Array, "B T D"]:
    """table[tokens] in `dtype`; the gradient adds up every use of a token in float32.

    Over devices, each looks up the tokens whose rows it has and the results are added up: B T D elements in `dtype` over
    the axes of the vocabulary. The table is gathered along embed alone, and its gradient scattered along it again.
    """
    if isinstance(table, Quantized):
        return dequantize(jax.tree.map(lambda x: x[tokens], table), dtype)
    layout = current_layout()
    if layout is None:
        # Gathered before the cast, so that the gradient is added up before it too.
        return table[tokens].astype(dtype)
    return _embed_sharded(table, tokens, layout, dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _embed_sharded(table: Array, tokens: Array, layout: MeshLayout, dtype: str) -> Array:
    rows, flat, stream, vocab_on = _specs(table, tokens, layout)

    def here(table: Array, tokens: Array) -> Array:
        index, is_here = _own_rows(table, tokens, vocab_on)
        return psum_or_scatter(jnp.where(is_here[..., None], table[index], 0).astype(dtype), vocab_on)

    return jax.shard_map(here, mesh=layout.mesh, in_specs=(rows, flat), out_specs=stream, check_vma=False)(
        table, tokens
    )


def _forward(table: Array, tokens: Array, layout: MeshLayout, dtype: str) -> tuple[Array, tuple]:
    return _embed_sharded(table, tokens, layout, dtype), (table, tokens)


def _backward(layout: MeshLayout, dtype: str, kept: tuple, gradient: Array) -> tuple[Array, None]:
    table, tokens = kept
    rows, flat, stream, vocab_on = _specs(table, tokens, layout)
    own = layout.spec(("vocab", "embed"), table.shape, "w_tokens")
    rows_on = tuple(axis for part in flat for axis in axes_of(part))
    embed_on = axes_of(own[1]) if len(own) > 1 else ()
    if not set(embed_on) <= set(rows_on):
        own, embed_on = rows, ()

    def here(table: Array, tokens: Array, gradient: Array) -> Array:
        index, is_here = _own_rows(table, tokens, vocab_on)
        wide = jnp.where(is_here[..., None], gradient.astype(jnp.float32), 0.0)
        return psum_or_scatter(jnp.zeros(table.shape, jnp.float32).at[index].add(wide), rows_on, scatter_axes=embed_on, dim=1)

    run = jax.shard_map(here, mesh=layout.mesh, in_specs=(rows, flat, stream), out_specs=own, check_vma=False)
    return run(table, tokens, gradient), None


_embed_sharded.defvjp(_forward, _backward)


def _specs(table: Array, tokens: Array, layout: MeshLayout) -> tuple[Any, Any, Any, tuple[str, ...]]:
    rows = layout.spec(("vocab", "activation_embed"), table.shape, "w_tokens")
    flat = layout.spec(("batch", "sequence"), tokens.shape, "activation [tokens]")
    stream = layout.spec(
        ("batch", "sequence", "activation_embed"), (*tokens.shape, table.shape[1]), "activation [embedded]"
    )
    return rows, flat, stream, axes_of(rows[0]) if len(rows) else ()


def _own_rows(table: Array, tokens: Array, vocab_on: tuple[str, ...]) -> tuple[Array, Array]:
    """Where a token's row is in this device's part of the table, and whether it is there at all."""
    index = tokens - (jax.lax.axis_index(vocab_on) * table.shape[0] if vocab_on else 0)
    return jnp.clip(index, 0, table.shape[0] - 1), (index >= 0) & (index < table.shape[0])

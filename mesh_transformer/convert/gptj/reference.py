# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""NumPy reference implementation of mesh-transformer-jax, computed from the shards of its checkpoints.

It shares no code with the importer (leaf order, layouts, configuration), so it reveals mistakes of the importer.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mesh_transformer.convert.huggingface.reference import (
    Array,
    apply_rope_interleaved,
    attend,
    gelu_tanh,
    layer_norm,
    matmul,
    read_rows,
    read_vector,
    split_heads,
)
from mesh_transformer.convert.lazy_arrays import LazyArray

Leaves = list[LazyArray]  # the leaf at one position of every shard


class _Weights(NamedTuple):
    """Leaves of a model, grouped by purpose."""

    positions: Leaves  # empty unless pe is "fixed"
    embedding_bias: Leaves
    embedding: Leaves
    layers: dict[int, list[Leaves]]
    b_head: Leaves
    w_head: Leaves
    norm_out: list[Leaves]
    relative: list[Array]  # empty unless pe is "t5"


def run_mtj(shards: Sequence[Sequence[LazyArray]], config: Mapping[str, Any], tokens: Array) -> Array:
    """Return the logits [B, T, V] for tokens [B, T] from the weights of each shard, as `open_raw_weights` returns them.

    The residual stream is the sum of the outputs of all shards, as in tensor parallelism.
    """
    n = len(shards)
    d_head = config["d_model"] // config["n_heads"]
    weights = _group_leaves(shards, config)
    x = _embed(weights, tokens, config["d_model"])
    for layer in range(config["layers"]):
        w_q, w_v, w_k, w_o, b_in, w_in, b_out, w_out, *norm = weights.layers[layer]
        normed = _norm(x, norm, config["norm"])
        for s in range(n):
            q, k, v = (split_heads(matmul(normed, w[s]), config["n_heads"] // n) for w in (w_q, w_k, w_v))
            if config["pe"] == "rotary":
                r = min(config.get("pe_rotary_dims", d_head), d_head)
                q, k = apply_rope_interleaved(q, r), apply_rope_interleaved(k, r)
            bias = _t5_bias(weights.relative[s], tokens.shape[1]) if weights.relative else 0.0
            hidden = gelu_tanh(matmul(normed, w_in[s]) + read_vector(b_in[s]))
            attention = attend(q, k, v, scale=d_head**-0.5, bias=bias)
            x = x + matmul(attention, w_o[s]) + matmul(hidden, w_out[s]) + read_vector(b_out[s])
    normed = _norm(x, weights.norm_out, config["norm"])
    heads = zip(weights.w_head, weights.b_head, strict=True)
    return np.concatenate([matmul(normed, w) + read_vector(b) for w, b in heads], axis=-1)


def _group_leaves(shards: Sequence[Sequence[LazyArray]], config: Mapping[str, Any]) -> _Weights:
    iterators = [iter(shard) for shard in shards]

    def take() -> Leaves:
        return [next(iterator) for iterator in iterators]

    positions = take() if config["pe"] == "fixed" else []
    embedding_bias = take()
    embedding = take()
    n_norm = 2 if config["norm"].startswith("layernorm") or config["norm"].endswith("-bias") else 1
    order = sorted(range(config["layers"]), key=lambda layer: f"layer_{layer}")
    layers = {layer: [take() for _ in range(8 + n_norm)] for layer in order}
    b_head = take()
    w_head = take()
    norm_out = [take() for _ in range(n_norm)]
    relative = [read_vector(leaf) for leaf in take()] if config["pe"] == "t5" else []
    return _Weights(positions, embedding_bias, embedding, layers, b_head, w_head, norm_out, relative)


def _embed(weights: _Weights, tokens: Array, d_model: int) -> Array:
    bias = sum(read_vector(b) for b in weights.embedding_bias)
    x = bias + np.zeros((*tokens.shape, d_model), np.float32)
    for s, matrix in enumerate(weights.embedding):
        rows = matrix.shape[0]
        in_shard = tokens // rows == s
        x = x + np.where(in_shard[..., None], read_rows(matrix, np.where(in_shard, tokens % rows, 0)), 0)
    if weights.positions:
        indices = np.arange(tokens.shape[1])
        x = x + np.concatenate([read_rows(matrix, indices) for matrix in weights.positions], axis=-1)
    return x


def _norm(x: Array, leaves: list[Leaves], norm: str) -> Array:
    """Return x [B, T, D] normalized over D.

    LayerNorm uses the parameters of shard 0, the other norms the mean over shards. The offset of "layernorm-nobias" is
    not used.
    """
    if not norm.startswith("layernorm"):
        *offset, scale = (sum(map(read_vector, leaf)) / len(leaf) for leaf in leaves)
        return x / (np.linalg.norm(x, axis=-1, keepdims=True) + 1e-5) * scale + (offset[0] if offset else 0.0)
    scale = read_vector(leaves[1][0])
    return layer_norm(x, 1e-5) * scale + (read_vector(leaves[0][0]) if norm == "layernorm" else 0.0)


def _t5_bias(table: Array, length: int) -> Array:
    """Return the bias [H, T, T] by bucket of the distance: 16 exact buckets, then 16 logarithmic ones up to 128."""
    distance = np.maximum(np.subtract.outer(np.arange(length), np.arange(length)), 0)
    large = 16 + (np.log(np.maximum(distance, 1) / 16) / math.log(128 / 16) * 16).astype(int)
    return table[:, np.where(distance < 16, distance, np.minimum(large, 31))]

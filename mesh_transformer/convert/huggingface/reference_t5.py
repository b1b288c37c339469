# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""NumPy reference implementation of T5, mT5, umT5 and SwitchTransformers, computed from the tensors of their files."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mesh_transformer.convert.huggingface.reference import (
    ACTIVATIONS,
    Array,
    ExternalTensors,
    matmul,
    split_heads,
)
from mesh_transformer.convert.lazy_arrays import LazyArray


def run_t5(
    tensors: Mapping[str, LazyArray], c: Mapping[str, Any], tokens: Array, encoder_tokens: Array, mask: Array
) -> Array:
    """Return the logits [B, T, V] of T5, mT5, umT5 or SwitchTransformers for the decoder's tokens [B, T].

    `encoder_tokens` [B, S] are the encoder's input; `mask` [B, S] is 0 for padding.
    """
    t = ExternalTensors(tensors, "")
    encoder_output = _run_stack(t, c, "encoder", encoder_tokens, mask, None)
    x = _run_stack(t, c, "decoder", tokens, mask, encoder_output)
    if c["model_type"] != "mt5" and c.get("scale_decoder_outputs", c.get("tie_word_embeddings") is not False):
        x = x * c["d_model"] ** -0.5
    head = "lm_head.weight" if "lm_head.weight" in t else "shared.weight"
    return matmul(x, t.find(head), transposed=True)


def _run_stack(
    t: ExternalTensors, c: Mapping[str, Any], stack: str, tokens: Array, mask: Array, encoder_output: Array | None
) -> Array:
    """Return the output of the encoder, or of the decoder if `encoder_output` is given."""
    eps = c["layer_norm_epsilon"]
    is_encoder = encoder_output is None
    x = t.rows("shared.weight", tokens)
    positions = np.arange(tokens.shape[1])
    offset = positions[None] - positions[:, None]  # position of the key minus position of the query
    buckets = _bucket(offset, c, two_sided=is_encoder)
    visible = (mask if is_encoder else np.ones_like(tokens))[:, None, None] > 0
    if not is_encoder:
        visible = visible & (offset <= 0)
    n_layers = c["num_layers"] if is_encoder or c["num_decoder_layers"] is None else c["num_decoder_layers"]
    for i in range(n_layers):
        layer = f"{stack}.block.{i}.layer."
        table_layer = i if c["model_type"] == "umt5" else 0
        table = t.vector(f"{stack}.block.{table_layer}.layer.0.SelfAttention.relative_attention_bias.weight")
        bias = np.where(visible, np.moveaxis(table[buckets], -1, 0)[None], -np.inf)
        normed = t.rms(f"{layer}0.layer_norm", x, eps)
        x = x + _attend(t, f"{layer}0.SelfAttention", normed, normed, bias, c["num_heads"])
        if encoder_output is not None:
            normed = t.rms(f"{layer}1.layer_norm", x, eps)
            padding = np.where(mask[:, None, None] > 0, 0.0, -np.inf)
            x = x + _attend(t, f"{layer}1.EncDecAttention", normed, encoder_output, padding, c["num_heads"])
        last = f"{layer}{1 if is_encoder else 2}."
        x = x + _feed_forward(t, c, last, t.rms(f"{last}layer_norm", x, eps))
    return t.rms(f"{stack}.final_layer_norm", x, eps)


def _attend(t: ExternalTensors, name: str, x: Array, keys_from: Array, bias: Array, n: int) -> Array:
    inputs = (("q", x), ("k", keys_from), ("v", keys_from))
    q, k, v = (split_heads(t.linear(f"{name}.{y}", z), n) for y, z in inputs)
    scores = q @ k.swapaxes(-1, -2) + bias  # not scaled
    weights = np.exp(scores - np.maximum(scores.max(axis=-1, keepdims=True), -1e30))
    output = weights / np.maximum(weights.sum(axis=-1, keepdims=True), 1e-30) @ v
    return t.linear(f"{name}.o", output.swapaxes(1, 2).reshape(*x.shape[:2], -1).astype(np.float32))


def _feed_forward(t: ExternalTensors, c: Mapping[str, Any], name: str, x: Array) -> Array:
    if f"{name}mlp.router.classifier.weight" not in t:
        return _dense(t, c, f"{name}{'mlp' if f'{name}mlp.wi.weight' in t else 'DenseReluDense'}", x)
    scores = t.linear(f"{name}mlp.router.classifier", x)
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    p = p / p.sum(axis=-1, keepdims=True)
    expert = scores.argmax(axis=-1)
    y = np.zeros_like(x)
    for e in range(c["num_experts"]):
        is_routed = expert == e
        # The capacity of an expert is filled by the first tokens of each sequence that are routed to it
        is_routed &= np.cumsum(is_routed, axis=1) <= c["expert_capacity"]
        if is_routed.any():
            y[is_routed] = p[is_routed][:, e, None] * _dense(t, c, f"{name}mlp.experts.expert_{e}", x[is_routed])
    return y


def _dense(t: ExternalTensors, c: Mapping[str, Any], name: str, x: Array) -> Array:
    kind = c.get("feed_forward_proj", "")
    computed = "gelu_new" if kind == "gated-gelu" else kind.removeprefix("gated-")
    act = ACTIVATIONS[c.get("dense_act_fn") or computed]
    if f"{name}.wi_0.weight" in t:
        return t.linear(f"{name}.wo", act(t.linear(f"{name}.wi_0", x)) * t.linear(f"{name}.wi_1", x))
    return t.linear(f"{name}.wo", act(t.linear(f"{name}.wi", x)))


def _bucket(offset: Array, c: Mapping[str, Any], *, two_sided: bool) -> Array:
    """Return the bucket of a relative position: exact for near distances, then logarithmic (arXiv 1910.10683, section 2.1).

    If `two_sided`, half of the buckets are for keys after the query.
    """
    count, furthest = c.get("relative_attention_num_buckets", 32), c.get("relative_attention_max_distance", 128)
    count, later = (count // 2, np.where(offset > 0, count // 2, 0)) if two_sided else (count, 0)
    distance = np.abs(offset) if two_sided else np.maximum(-offset, 0)
    near = count // 2
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / near) / np.float32(math.log(furthest / near))
    large = near + (ratio * (count - near)).astype(int)
    return later + np.where(distance < near, distance, np.minimum(large, count - 1))

# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""What a T5 or Switch checkpoint computes, from its own tensors, in NumPy: as originals.py, of models with an encoder."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mesh_transformer.convert.huggingface.reference import ACTIVATIONS, Array, Tensors, gelu_tanh, heads, product
from mesh_transformer.convert.lazy_arrays import Lazy


def run_t5(tensors: Mapping[str, Lazy], c: Mapping[str, Any], tokens: Array, sources: Array, mask: Array) -> Array:
    """T5ForConditionalGeneration and SwitchTransformersForConditionalGeneration: logits [B, T, V].

    `sources` [B, S] are read by the encoder, and `mask` is 1 where they are no padding.
    """
    t, eps = Tensors(tensors, ""), c.get("layer_norm_epsilon", 1e-6)
    memory = None
    for stack, ids in (("encoder", sources), ("decoder", tokens)):
        x, length = t.rows("shared.weight", ids), ids.shape[1]
        there = np.arange(length)[None] - np.arange(length)[:, None]  # how far behind its query a key stands
        table = t.vector(f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight")
        bias = np.moveaxis(table[_bucket(there, two_sided=stack == "encoder")], -1, 0)[None]
        bias = np.where((mask if stack == "encoder" else np.ones_like(ids))[:, None, None] > 0, bias, -np.inf)
        if stack == "decoder":
            bias = np.where(there > 0, -np.inf, bias)
        for i in range(c["num_layers" if stack == "encoder" else "num_decoder_layers"]):
            b = f"{stack}.block.{i}.layer."
            normed = t.rms(f"{b}0.layer_norm", x, eps)
            x = x + _attend(t, f"{b}0.SelfAttention", normed, normed, bias, c["num_heads"])
            if memory is not None:
                normed, hidden = t.rms(f"{b}1.layer_norm", x, eps), np.where(mask[:, None, None] > 0, 0.0, -np.inf)
                x = x + _attend(t, f"{b}1.EncDecAttention", normed, memory, hidden, c["num_heads"])
            last = f"{b}{1 if memory is None else 2}."
            x = x + _feed(t, c, last, t.rms(f"{last}layer_norm", x, eps))
        memory = t.rms(f"{stack}.final_layer_norm", x, eps)
    assert memory is not None
    if c.get("scale_decoder_outputs", c.get("tie_word_embeddings", True)):
        memory = memory * c["d_model"] ** -0.5
    head = "lm_head.weight" if "lm_head.weight" in t else "shared.weight"
    return product(memory, t.find(head), transposed=True)


def _attend(t: Tensors, name: str, x: Array, memory: Array, bias: Array, n: int) -> Array:
    q, k, v = (heads(t.linear(f"{name}.{y}", z), n) for y, z in (("q", x), ("k", memory), ("v", memory)))
    scores = q @ k.swapaxes(-1, -2) + bias  # not scaled
    weights = np.exp(scores - np.maximum(scores.max(axis=-1, keepdims=True), -1e30))
    mixed = weights / np.maximum(weights.sum(axis=-1, keepdims=True), 1e-30) @ v
    return t.linear(f"{name}.o", mixed.swapaxes(1, 2).reshape(*x.shape[:2], -1).astype(np.float32))


def _feed(t: Tensors, c: Mapping[str, Any], name: str, x: Array) -> Array:
    if f"{name}mlp.router.classifier.weight" not in t:
        return _dense(t, c, f"{name}{'mlp' if f'{name}mlp.wi.weight' in t else 'DenseReluDense'}", x)
    scores = t.linear(f"{name}mlp.router.classifier", x)
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    p, chosen = p / p.sum(axis=-1, keepdims=True), scores.argmax(axis=-1)
    y = np.zeros_like(x)
    for e in range(c["num_experts"]):
        own = chosen == e
        own &= np.cumsum(own, axis=1) <= c["expert_capacity"]  # of each sequence, the first ones
        if own.any():
            y[own] = p[own][:, e, None] * _dense(t, c, f"{name}mlp.experts.expert_{e}", x[own])
    return y


def _dense(t: Tensors, c: Mapping[str, Any], name: str, x: Array) -> Array:
    words = c.get("feed_forward_proj") or c.get("dense_act_fn", "relu")
    act = gelu_tanh if words == "gated-gelu" else ACTIVATIONS[words.removeprefix("gated-")]
    if words.startswith("gated-"):
        return t.linear(f"{name}.wo", act(t.linear(f"{name}.wi_0", x)) * t.linear(f"{name}.wi_1", x))
    return t.linear(f"{name}.wo", act(t.linear(f"{name}.wi", x)))


def _bucket(there: Array, *, two_sided: bool) -> Array:
    """Of 32: one for each near distance, then ever wider ones up to 128; half of them for keys that come after."""
    count, later = (16, np.where(there > 0, 16, 0)) if two_sided else (32, 0)
    far = np.abs(there) if two_sided else np.maximum(-there, 0)
    near = count // 2
    ratio = np.log(np.maximum(far, 1).astype(np.float32) / near) / np.float32(math.log(128 / near))
    grown = near + (ratio * (count - near)).astype(int)
    return later + np.where(far < near, far, np.minimum(grown, count - 1))

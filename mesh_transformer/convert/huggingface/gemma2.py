# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Gemma 2 (arXiv 2408.00118): tensor names, config.json, and a NumPy reference implementation."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mesh_transformer.config import ModelConfig
from mesh_transformer.convert.huggingface import reference
from mesh_transformer.convert.huggingface.config_map import (
    ACTIVATIONS,
    HFConfig,
    read_layer_types,
    read_sizes,
    require_even,
    require_full_rotation,
    write_layer_types,
    write_sizes,
)
from mesh_transformer.convert.huggingface.reference import ExternalTensors, apply_rope_half, matmul, split_heads
from mesh_transformer.convert.huggingface.rope_map import read_rope, write_rope
from mesh_transformer.convert.huggingface.tensor_map import LLAMA, M, norms

TENSORS = LLAMA | norms(
    norm_1=f"{M}.input_layernorm",
    norm_1_post=f"{M}.post_attention_layernorm",
    norm_2=f"{M}.pre_feedforward_layernorm",
    norm_2_post=f"{M}.post_feedforward_layernorm",
)
HF_ACTIVATIONS = {"gelu-tanh": "gelu_pytorch_tanh", "gelu-erf": "gelu", "relu": "relu", "silu": "silu"}


def read_config(s: HFConfig) -> dict[str, Any]:
    """Return the [model] section for a Gemma2Config; absent keys have the defaults of that class."""
    s.require("use_bidirectional_attention", False)
    rope, fields = read_rope(s)
    require_full_rotation(s, rope)
    n_layers = s["num_hidden_layers"]
    # layers alternate between sliding-window and full attention; the first one has a window
    alternating = [("sliding_attention", "full_attention")[i % 2] for i in range(n_layers)]
    return (
        fields
        | read_sizes(s)
        | dict(
            n_kv_heads=s["num_key_value_heads"],
            d_head=require_even(s, s["head_dim"], "head_dim"),
            norm="gemma-rmsnorm",
            norm_eps=s["rms_norm_eps"],
            residual="sandwich",
            positions="rope-half",
            activation=s.translate(ACTIVATIONS, "hidden_activation"),
            gated_ffn=True,
            attention_pattern=read_layer_types(s, s.get("layer_types", default=alternating), n_layers),
            attention_window=s["sliding_window"],
            attention_scale=float(s["query_pre_attn_scalar"]) ** -0.5,
            attention_softcap=s["attn_logit_softcapping"],
            logit_softcap=s["final_logit_softcapping"],
            embedding_scale="sqrt_d_model",
            qkv_bias=s["attention_bias"],
            attention_out_bias=s["attention_bias"],
            ff_bias=False,
        )
    )


def write_config(c: ModelConfig) -> dict[str, Any]:
    """Return the keys of a Gemma2Config."""
    return write_sizes(c) | dict(
        head_dim=c.head_dim,
        rms_norm_eps=c.norm_eps,
        **write_rope(c),
        hidden_activation=HF_ACTIVATIONS[c.activation],
        attention_bias=c.qkv_bias,
        sliding_window=c.attention_window,
        layer_types=write_layer_types(c),
        query_pre_attn_scalar=query_scalar(c),
        attn_logit_softcapping=c.attention_softcap,
        final_logit_softcapping=c.logit_softcap,
    )


def query_scalar(c: ModelConfig) -> int | float:
    """Return query_pre_attn_scalar, whose inverse square root is the factor of the scores."""
    if c.attention_scale == "none":
        return 1
    return _inverse_square(c.head_dim**-0.5 if c.attention_scale == "rsqrt_d_head" else c.attention_scale)


def _inverse_square(scale: float) -> int | float:
    """Return a query_pre_attn_scalar whose inverse square root is `scale`, exactly if possible: an integer or a float."""
    value = scale**-2
    candidates = (round(value), value, math.nextafter(value, 0.0), math.nextafter(value, math.inf))
    return next((n for n in candidates if n > 0 and float(n) ** -0.5 == scale), value)


def run(t: ExternalTensors, c: Mapping[str, Any], tokens: np.ndarray) -> np.ndarray:
    """Return the float32 logits [B, T, V] of Gemma2ForCausalLM for tokens [B, T], from its tensors and config.json."""
    eps = c["rms_norm_eps"]
    heads = c["num_attention_heads"]
    kv_heads = c["num_key_value_heads"]
    d_head = c["head_dim"]
    frequencies = c["rope_parameters"]["rope_theta"] ** (-np.arange(0, d_head, 2) / d_head)
    scale = c["query_pre_attn_scalar"] ** -0.5
    activation = reference.ACTIVATIONS[c["hidden_activation"]]

    def norm(name: str, x: np.ndarray) -> np.ndarray:  # the stored weight is scale - 1
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * (1 + t.vector(f"{name}.weight"))

    x = t.rows("model.embed_tokens.weight", tokens) * np.float32(math.sqrt(c["hidden_size"]))
    for i in range(c["num_hidden_layers"]):
        h = f"model.layers.{i}."
        kind = c["layer_types"][i] if c["layer_types"] else ("sliding_attention", "full_attention")[i % 2]
        normed = norm(f"{h}input_layernorm", x)
        q, k, v = (
            split_heads(t.linear(f"{h}self_attn.{y}_proj", normed), n)
            for y, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        q, k = apply_rope_half(q, d_head, frequencies), apply_rope_half(k, d_head, frequencies)
        window = c["sliding_window"] if kind == "sliding_attention" else None
        mixed = _attend(q * scale, k, v, c["attn_logit_softcapping"], window)
        x = x + norm(f"{h}post_attention_layernorm", t.linear(f"{h}self_attn.o_proj", mixed))
        normed = norm(f"{h}pre_feedforward_layernorm", x)
        hidden = activation(t.linear(f"{h}mlp.gate_proj", normed)) * t.linear(f"{h}mlp.up_proj", normed)
        x = x + norm(f"{h}post_feedforward_layernorm", t.linear(f"{h}mlp.down_proj", hidden))
    x = norm("model.norm", x)
    tied = c["tie_word_embeddings"]
    logits = matmul(x, t.find("model.embed_tokens.weight"), transposed=True) if tied else t.linear("lm_head", x)
    return _soft_cap(logits, c["final_logit_softcapping"]).astype(np.float32)


def _soft_cap(x: np.ndarray, cap: float | None) -> np.ndarray:
    return x if cap is None else np.tanh(x / cap) * cap


def _attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, cap: float | None, window: int | None) -> np.ndarray:
    """Return causal attention with capped scores: q [B, H, T, C], k and v [B, K, T, C] -> [B, T, H C]."""
    batch, heads, length, _ = q.shape
    k, v = (np.repeat(y, heads // k.shape[1], axis=1) for y in (k, v))
    scores = _soft_cap(q @ k.swapaxes(-1, -2), cap)
    distance = np.arange(length)[:, None] - np.arange(length)[None]
    visible = (distance >= 0) & (distance < (window or length))
    scores = np.where(visible, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights = weights / weights.sum(axis=-1, keepdims=True)
    return (weights @ v).swapaxes(1, 2).reshape(batch, length, -1)

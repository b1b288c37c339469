# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Gemma 2 (arXiv 2408.00118): tensor names, config.json, and a NumPy reference implementation."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mesh_transformer.checkpoint.manifest import CheckpointError
from mesh_transformer.config import ModelConfig
from mesh_transformer.convert.huggingface.config_map import ACTIVATIONS, HFConfig, read_layer_types, write_layer_types
from mesh_transformer.convert.huggingface.reference import (
    ExternalTensors,
    apply_rope_half,
    gelu_tanh,
    matmul,
    split_heads,
)
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
    rope = s.table.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default" or s.table.get("rope_scaling"):
        raise CheckpointError(f"{s.where}: scaled rotary embeddings of Gemma 2 are not supported; supported: 'default'")
    n_layers = s.get("num_hidden_layers", default=26)
    # layers alternate between sliding-window and full attention; the first one has a window
    alternating = [("sliding_attention", "full_attention")[i % 2] for i in range(n_layers)]
    pattern = read_layer_types(s, s.table.get("layer_types") or alternating, n_layers)
    bias = s.table.get("attention_bias", False)
    return dict(
        n_layers=n_layers,
        d_model=s.get("hidden_size", default=2304),
        n_heads=s.get("num_attention_heads", default=8),
        n_kv_heads=s.get("num_key_value_heads", default=4),
        d_head=s.get("head_dim", default=256),
        d_ff=s.get("intermediate_size", default=9216),
        n_vocab=s.get("vocab_size", default=256_000),
        seq_len=s.get("max_position_embeddings", default=8192),
        norm="gemma-rmsnorm",
        norm_eps=s.get("rms_norm_eps", default=1e-6),
        residual="sandwich",
        positions="rope-half",
        rope_theta=float(rope.get("rope_theta") or s.get("rope_theta", default=10_000.0)),
        activation=s.translate(ACTIVATIONS, "hidden_activation", "hidden_act", default="gelu_pytorch_tanh"),
        gated_ffn=True,
        attention_pattern=pattern,
        attention_window=s.get("sliding_window", default=4096),
        attention_scale=float(s.get("query_pre_attn_scalar", default=256)) ** -0.5,
        attention_softcap=_cap(s, "attn_logit_softcapping", 50.0),
        logit_softcap=_cap(s, "final_logit_softcapping", 30.0),
        embedding_scale="sqrt_d_model",
        qkv_bias=bias,
        attention_out_bias=bias,
        ff_bias=False,
        tied_embeddings=s.table.get("tie_word_embeddings", True),
    )


def _cap(s: HFConfig, key: str, default: float) -> float | None:
    """Return a cap. An absent key has the default of Gemma2Config; null means no cap."""
    value = s.table.get(key, default)
    return None if value is None else float(value)


def write_config(c: ModelConfig) -> dict[str, Any]:
    """Return the keys of a Gemma2Config."""
    scale = c.head_dim**-0.5 if c.attention_scale == "rsqrt_d_head" else c.attention_scale
    return dict(
        num_hidden_layers=c.n_layers,
        hidden_size=c.d_model,
        num_attention_heads=c.n_heads,
        num_key_value_heads=c.kv_heads,
        head_dim=c.head_dim,
        intermediate_size=c.ff_dim,
        vocab_size=c.n_vocab,
        max_position_embeddings=c.seq_len,
        rms_norm_eps=c.norm_eps,
        rope_theta=c.rope_theta,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        hidden_activation=HF_ACTIVATIONS[c.activation],
        attention_bias=c.qkv_bias,
        sliding_window=c.attention_window,
        layer_types=write_layer_types(c),
        query_pre_attn_scalar=1.0 if scale == "none" else _inverse_square(float(scale)),
        attn_logit_softcapping=c.attention_softcap,
        final_logit_softcapping=c.logit_softcap,
    )


def _inverse_square(scale: float) -> int | float:
    """Return a query_pre_attn_scalar whose inverse square root is exactly `scale`, an integer if possible."""
    value = scale**-2
    candidates = (round(value), value, math.nextafter(value, 0.0), math.nextafter(value, math.inf))
    return next((one for one in candidates if one > 0 and float(one) ** -0.5 == scale), value)


def run(t: ExternalTensors, c: Mapping[str, Any], tokens: np.ndarray) -> np.ndarray:
    """Return the logits [B, T, V] of a Gemma 2 model from its own tensors and config.json, in float32."""
    eps = c.get("rms_norm_eps", 1e-6)
    heads, kv_heads = c.get("num_attention_heads", 8), c.get("num_key_value_heads", 4)
    d_head = c.get("head_dim", 256)
    theta = (c.get("rope_parameters") or {}).get("rope_theta") or c.get("rope_theta", 10_000.0)
    frequencies = theta ** (-np.arange(0, d_head, 2) / d_head)
    scale = c.get("query_pre_attn_scalar", 256) ** -0.5
    activation = {"gelu_pytorch_tanh": gelu_tanh, "gelu_new": gelu_tanh, "silu": lambda x: x / (1 + np.exp(-x))}[
        c.get("hidden_activation") or c.get("hidden_act", "gelu_pytorch_tanh")
    ]

    def norm(name: str, x: np.ndarray) -> np.ndarray:  # the stored weight is the difference from 1
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * (1 + t.vector(f"{name}.weight"))

    x = t.rows("model.embed_tokens.weight", tokens) * np.float32(math.sqrt(c.get("hidden_size", 2304)))
    for i in range(c.get("num_hidden_layers", 26)):
        h = f"model.layers.{i}."
        kind = ((c.get("layer_types") or {}) and c["layer_types"][i]) or ("sliding_attention", "full_attention")[i % 2]
        normed = norm(f"{h}input_layernorm", x)
        q, k, v = (
            split_heads(t.linear(f"{h}self_attn.{y}_proj", normed), n)
            for y, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        q, k = apply_rope_half(q, d_head, frequencies), apply_rope_half(k, d_head, frequencies)
        window = c.get("sliding_window", 4096) if kind == "sliding_attention" else None
        mixed = _attend(q * scale, k, v, c.get("attn_logit_softcapping", 50.0), window)
        x = x + norm(f"{h}post_attention_layernorm", t.linear(f"{h}self_attn.o_proj", mixed))
        normed = norm(f"{h}pre_feedforward_layernorm", x)
        hidden = activation(t.linear(f"{h}mlp.gate_proj", normed)) * t.linear(f"{h}mlp.up_proj", normed)
        x = x + norm(f"{h}post_feedforward_layernorm", t.linear(f"{h}mlp.down_proj", hidden))
    x = norm("model.norm", x)
    tied = c.get("tie_word_embeddings", True)
    logits = matmul(x, t.find("model.embed_tokens.weight"), transposed=True) if tied else t.linear("lm_head", x)
    return _soft_cap(logits, c.get("final_logit_softcapping", 30.0)).astype(np.float32)


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

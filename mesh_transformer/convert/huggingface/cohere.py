# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Command R and R+ of Cohere: tensor names and config.json."""

from typing import Any

from mesh_transformer.config import ModelConfig
from mesh_transformer.convert.huggingface.config_map import ACTIVATIONS, HF_ACTIVATIONS, read_sizes, write_sizes
from mesh_transformer.convert.huggingface.hf_config import HFConfig
from mesh_transformer.convert.huggingface.rope_map import read_rope, write_rope
from mesh_transformer.convert.huggingface.tensor_map import LLAMA, M, TensorMapping

TENSORS = LLAMA | {
    "attention/norm_q/scale": TensorMapping(f"{M}.self_attn.q_norm.weight", "heads head_dim"),
    "attention/norm_k/scale": TensorMapping(f"{M}.self_attn.k_norm.weight", "kv_heads head_dim"),
}


def read_config(s: HFConfig) -> dict[str, Any]:
    """Return the [model] section for a CohereConfig."""
    heads, bias = s["num_attention_heads"], s["attention_bias"]
    return read_sizes(s) | dict(
        n_kv_heads=s.get("num_key_value_heads", default=heads),
        d_head=s.find("head_dim") or s["hidden_size"] // heads,
        norm="layernorm",
        norm_bias=False,
        norm_eps=s["layer_norm_eps"],
        residual="parallel",
        positions="rope-interleaved",
        activation=s.translate(ACTIVATIONS, "hidden_act"),
        gated_ffn=True,
        qk_norm="layernorm-per-head" if s["use_qk_norm"] else False,
        qkv_bias=bias,
        attention_out_bias=bias,
        ff_bias=False,
        logit_scale=float(s["logit_scale"]),
        **read_rope(s)[1],
    )


def write_config(c: ModelConfig) -> dict[str, Any]:
    """Return the keys of a CohereConfig."""
    scales = {"none": 1.0, "rsqrt_d_model": c.d_model**-0.5}
    return (
        write_sizes(c)
        | write_rope(c)
        | dict(
            layer_norm_eps=c.norm_eps,
            hidden_act=HF_ACTIVATIONS[c.activation],
            attention_bias=c.qkv_bias,
            use_qk_norm=c.qk_norm == "layernorm-per-head",
            logit_scale=scales.get(str(c.logit_scale), c.logit_scale),
        )
    )

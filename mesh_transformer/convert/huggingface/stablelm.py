# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""StableLM 3B, 2 1.6B and 2 12B (arXiv 2402.17834): tensor names and config.json."""

from typing import Any

from mesh_transformer.config import ModelConfig
from mesh_transformer.convert.huggingface.config_map import ACTIVATIONS, HF_ACTIVATIONS, read_sizes, write_sizes
from mesh_transformer.convert.huggingface.hf_config import HFConfig
from mesh_transformer.convert.huggingface.rope_map import read_rope, write_partial_rope
from mesh_transformer.convert.huggingface.tensor_map import LLAMA, M, TensorMapping

# The norms of queries and keys have one tensor for each head; {e} is the index of the head here
TENSORS = LLAMA | {
    f"attention/norm_{x}/scale": TensorMapping(f"{M}.self_attn.{x}_layernorm.norms.{{e}}.weight", "head_dim")
    for x in "qk"
}


def read_config(s: HFConfig) -> dict[str, Any]:
    """Return the [model] section for a StableLmConfig."""
    rope, fields = read_rope(s)
    d_head = s["hidden_size"] // s["num_attention_heads"]
    return read_sizes(s) | dict(
        n_kv_heads=s["num_key_value_heads"],
        norm="layernorm",
        norm_eps=s["layer_norm_eps"],
        residual="parallel" if s["use_parallel_residual"] else "serial",
        positions="rope-half",
        rope_dims=int(d_head * rope.get("partial_rotary_factor", 0.25)),
        activation=s.translate(ACTIVATIONS, "hidden_act"),
        gated_ffn=True,
        qk_norm="layernorm-per-head" if s["qk_layernorm"] else False,
        qkv_bias=s["use_qkv_bias"],
        attention_out_bias=False,
        ff_bias=False,
        **fields,
    )


def write_config(c: ModelConfig) -> dict[str, Any]:
    """Return the keys of a StableLmConfig."""
    return (
        write_sizes(c)
        | write_partial_rope(c)
        | dict(
            layer_norm_eps=c.norm_eps,
            hidden_act=HF_ACTIVATIONS[c.activation],
            use_qkv_bias=c.qkv_bias,
            qk_layernorm=c.qk_norm == "layernorm-per-head",
            use_parallel_residual=c.residual == "parallel",
        )
    )

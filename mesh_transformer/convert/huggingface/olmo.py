# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""OLMo (arXiv 2402.00838) and OLMo 2 (arXiv 2501.00656): tensor names and config.json."""

from typing import Any

from mesh_transformer.config import ModelConfig
from mesh_transformer.convert.huggingface.config_map import ACTIVATIONS, HF_ACTIVATIONS, read_sizes, write_sizes
from mesh_transformer.convert.huggingface.hf_config import HFConfig
from mesh_transformer.convert.huggingface.rope_map import read_rope, write_rope
from mesh_transformer.convert.huggingface.tensor_map import LLAMA, M, TensorMapping, norms

OLMO = {name: mapping for name, mapping in LLAMA.items() if not name.startswith("norm_")}
OLMO2 = (
    OLMO
    | norms(
        norm_1_post=f"{M}.post_attention_layernorm",
        norm_2_post=f"{M}.post_feedforward_layernorm",
        norm_out="model.norm",
    )
    | {
        "attention/norm_q/scale": TensorMapping(f"{M}.self_attn.q_norm.weight", "(heads head_dim)"),
        "attention/norm_k/scale": TensorMapping(f"{M}.self_attn.k_norm.weight", "(kv_heads head_dim)"),
    }
)


def read_olmo(s: HFConfig) -> dict[str, Any]:
    """Return the [model] section for an OlmoConfig or Olmo2Config."""
    heads, bias = s["num_attention_heads"], s["attention_bias"]
    model = read_sizes(s) | dict(
        n_kv_heads=s.get("num_key_value_heads", default=heads),
        d_head=s.find("head_dim") or s["hidden_size"] // heads,
        positions="rope-half",
        activation=s.translate(ACTIVATIONS, "hidden_act"),
        gated_ffn=True,
        qkv_bias=bias,
        attention_out_bias=bias,
        ff_bias=False,
        **read_rope(s)[1],
    )
    if s.kind == "olmo":
        clip = s["clip_qkv"]
        return model | dict(norm="nonparametric-layernorm", clip_qkv=None if clip is None else float(clip))
    return model | dict(
        norm="rmsnorm", norm_eps=s["rms_norm_eps"], residual="reordered-norm", qk_norm="rmsnorm-all-heads"
    )


def write_olmo(c: ModelConfig) -> dict[str, Any]:
    """Return the keys of an OlmoConfig."""
    return _write_shared(c) | dict(clip_qkv=c.clip_qkv)


def write_olmo2(c: ModelConfig) -> dict[str, Any]:
    """Return the keys of an Olmo2Config."""
    return _write_shared(c) | dict(rms_norm_eps=c.norm_eps)


def _write_shared(c: ModelConfig) -> dict[str, Any]:
    return (
        write_sizes(c)
        | write_rope(c)
        | dict(
            hidden_act=HF_ACTIVATIONS[c.activation],
            attention_bias=c.qkv_bias,
        )
    )

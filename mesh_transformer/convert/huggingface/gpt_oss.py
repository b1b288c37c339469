# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""gpt-oss (arXiv 2508.10925): tensor names and config.json.

The names are those of files with floating-point experts: `gate_up_proj` [E, D, 2 F], with gate and input of a hidden unit
next to each other. The published files store the experts as MXFP4 under the names `*_blocks` and `*_scales`.
quantized/mxfp4.py dequantizes them to lazy arrays with the names and shapes above.
"""

from typing import Any

from mesh_transformer.config import ModelConfig
from mesh_transformer.convert.huggingface.config_map import (
    read_layer_types,
    read_sizes,
    require_full_rotation,
    write_layer_types,
    write_sizes,
)
from mesh_transformer.convert.huggingface.hf_config import HFConfig
from mesh_transformer.convert.huggingface.rope_map import read_rope, write_rope
from mesh_transformer.convert.huggingface.tensor_map import LLAMA, M, TensorMapping, linear
from mesh_transformer.model.feed_forward import SWIGLU_ALPHA, SWIGLU_LIMIT

E = f"{M}.mlp.experts"
TENSORS = {
    **{name: mapping for name, mapping in LLAMA.items() if not name.startswith("feed_forward/")},
    "attention/sinks": TensorMapping(f"{M}.self_attn.sinks", "heads"),
    **linear("experts/w_router", f"{M}.mlp.router", "router", "embed", "experts/b_router"),
    "experts/w_gate": TensorMapping(f"{E}.gate_up_proj", "expert embed (ff 2)", 0),
    "experts/w_in": TensorMapping(f"{E}.gate_up_proj", "expert embed (ff 2)", 1),
    "experts/b_gate": TensorMapping(f"{E}.gate_up_proj_bias", "expert (ff 2)", 0),
    "experts/b_in": TensorMapping(f"{E}.gate_up_proj_bias", "expert (ff 2)", 1),
    "experts/w_out": TensorMapping(f"{E}.down_proj", "expert ff embed"),
    "experts/b_out": TensorMapping(f"{E}.down_proj_bias", "expert embed"),
}


def read_config(s: HFConfig) -> dict[str, Any]:
    """Return the [model] section for a GptOssConfig."""
    rope, fields = read_rope(s)
    require_full_rotation(s, rope)
    s.require("swiglu_alpha", SWIGLU_ALPHA)
    s.require("swiglu_limit", SWIGLU_LIMIT)
    s.require("hidden_act", "silu")
    n_layers = s["num_hidden_layers"]
    alternating = [("sliding_attention", "full_attention")[i % 2] for i in range(n_layers)]
    heads = s["num_attention_heads"]
    return read_sizes(s) | dict(
        norm="rmsnorm", norm_eps=s["rms_norm_eps"],
        n_kv_heads=s.get("num_key_value_heads", default=heads), d_head=s.get("head_dim", default=s["hidden_size"] // heads),
        positions="rope-half", **fields, activation="clamped-swiglu", gated_ffn=True, ff_bias=False,
        qkv_bias=s["attention_bias"], attention_out_bias=s["attention_bias"], attention_sinks=True,
        attention_pattern=read_layer_types(s, s.get("layer_types", default=alternating), n_layers),
        attention_window=s["sliding_window"],
        experts=dict(
            n_experts=s["num_local_experts"], n_experts_per_token=s["num_experts_per_tok"], bias=True, router_bias=True,
            normalize_gates=True,
        ),
    )  # fmt: skip


def write_config(c: ModelConfig) -> dict[str, Any]:
    """Return the keys of a GptOssConfig."""
    e = c.experts
    return write_sizes(c) | dict(
        intermediate_size=c.expert_ff_dim,
        head_dim=c.head_dim, hidden_act="silu", rms_norm_eps=c.norm_eps, attention_bias=c.qkv_bias,
        sliding_window=c.attention_window, layer_types=write_layer_types(c), swiglu_limit=SWIGLU_LIMIT,
        num_local_experts=e.n_experts if e else 1, num_experts_per_tok=e.n_experts_per_token if e else 1, **write_rope(c),
    )  # fmt: skip

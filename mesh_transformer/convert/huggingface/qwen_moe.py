# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Qwen2-MoE (arXiv 2407.10671, section 2.2.2) and Qwen3-MoE (2505.09388): tensor names and config.json."""

from typing import Any

from mesh_transformer.config import ModelConfig
from mesh_transformer.convert.huggingface.config_map import (
    ACTIVATIONS,
    HF_ACTIVATIONS,
    read_sizes,
    read_windows_of,
    require_full_rotation,
    write_layer_types,
    write_sizes,
)
from mesh_transformer.convert.huggingface.hf_config import HFConfig
from mesh_transformer.convert.huggingface.rope_map import read_rope, write_rope
from mesh_transformer.convert.huggingface.tensor_map import LLAMA, QWEN3, M, TensorMapping, experts, shared_expert

EXPERTS = experts(f"{M}.mlp.experts") | {"experts/w_router": TensorMapping(f"{M}.mlp.gate.weight", "router embed")}
GATE = {"feed_forward/output_gate": TensorMapping(f"{M}.mlp.shared_expert_gate.weight", "1 embed")}
QWEN2_MOE = LLAMA | EXPERTS | shared_expert("feed_forward", f"{M}.mlp.shared_expert") | GATE
QWEN3_MOE = QWEN3 | EXPERTS

# Keys without effect if no layer of the model has experts
EXPERT_KEYS = {
    "num_experts", "num_local_experts", "num_experts_per_tok", "norm_topk_prob", "moe_intermediate_size",
    "shared_expert_intermediate_size",
}  # fmt: skip


def read_config(s: HFConfig) -> dict[str, Any]:
    """Return the [model] section for a Qwen2MoeConfig or Qwen3MoeConfig."""
    rope, fields = read_rope(s)
    require_full_rotation(s, rope)
    is_qwen3 = s.kind == "qwen3_moe"
    heads = s["num_attention_heads"]
    bias = s["attention_bias"] if is_qwen3 else s["qkv_bias"]
    n_layers = s["num_hidden_layers"]
    model = read_sizes(s) | dict(
        norm="rmsnorm", norm_eps=s["rms_norm_eps"],
        n_kv_heads=s.get("num_key_value_heads", default=heads), d_head=s.get("head_dim", default=s["hidden_size"] // heads),
        positions="rope-half", **fields, activation=s.translate(ACTIVATIONS, "hidden_act"), gated_ffn=True, ff_bias=False,
        qkv_bias=bias, attention_out_bias=is_qwen3 and bias, qk_norm=is_qwen3,
        **_read_windows(s, n_layers),
    )  # fmt: skip
    dense = set(s["mlp_only_layers"] or ()) | {
        i for i in range(n_layers) if (i + 1) % s["decoder_sparse_step"] or not s["num_experts"]
    }
    if len(dense & set(range(n_layers))) < n_layers:
        model["experts"] = _read_experts(s, dense & set(range(n_layers)))
    else:
        s.was_read |= EXPERT_KEYS
    return model


def _read_experts(s: HFConfig, dense: set[int]) -> dict[str, Any]:
    table = dict(
        n_experts=s["num_experts"], n_experts_per_token=s["num_experts_per_tok"], normalize_gates=s["norm_topk_prob"],
        d_ff=s["moe_intermediate_size"], dense_layers=sorted(dense),
    )  # fmt: skip
    if s.kind == "qwen2_moe":
        table |= dict(shared_expert=True, shared_d_ff=s["shared_expert_intermediate_size"], shared_gate=True)
    return table


def _read_windows(s: HFConfig, n_layers: int) -> dict[str, Any]:
    """Return the fields for sliding-window attention: in all layers of Qwen3-MoE, by layer_types in Qwen2-MoE.

    The default of layer_types is computed as in Qwen2MoeConfig.__post_init__ of transformers.
    """
    window = s["sliding_window"] if s["use_sliding_window"] else None
    if s.kind == "qwen3_moe":
        s.was_read |= {"sliding_window"}  # this key has no effect without use_sliding_window
        return {} if window is None else dict(attention_pattern=["local"], attention_window=window)
    first = s["max_window_layers"] if window else 0
    alternating = [("sliding_attention", "full_attention")[i % 2 or i >= first] for i in range(n_layers)]
    s.was_read |= {"sliding_window", "max_window_layers"}
    return read_windows_of(s, s.get("layer_types", default=alternating), window, n_layers)


def write_config(c: ModelConfig) -> dict[str, Any]:
    """Return the keys for the fields that Qwen2-MoE and Qwen3-MoE share, and shared_expert_intermediate_size of Qwen2-MoE."""
    e = c.experts
    has_windows = "local" in c.attention_pattern
    return write_sizes(c) | dict(
        head_dim=c.head_dim, hidden_act=HF_ACTIVATIONS.get(c.activation), rms_norm_eps=c.norm_eps,
        use_sliding_window=has_windows, sliding_window=c.attention_window if has_windows else None,
        moe_intermediate_size=c.expert_ff_dim, shared_expert_intermediate_size=c.shared_ff_dim,
        num_experts=e.n_experts if e else 0, num_experts_per_tok=e.n_experts_per_token if e else 1,
        norm_topk_prob=e is not None and e.normalizes_gates, decoder_sparse_step=1,
        mlp_only_layers=[i for i, kind in enumerate(c.layer_kinds) if not kind.has_experts], **write_rope(c),
    )  # fmt: skip


def write_qwen2_moe(c: ModelConfig) -> dict[str, Any]:
    """Return the keys of a Qwen2MoeConfig."""
    return write_config(c) | dict(qkv_bias=c.qkv_bias, layer_types=write_layer_types(c), max_window_layers=c.n_layers)


def write_qwen3_moe(c: ModelConfig) -> dict[str, Any]:
    """Return the keys of a Qwen3MoeConfig."""
    table = write_config(c) | dict(attention_bias=c.qkv_bias)
    return {key: value for key, value in table.items() if key != "shared_expert_intermediate_size"}

# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""DeepSeek V2 (arXiv 2405.04434) and V3 (2412.19437): tensor names and config.json.

The multi-token prediction layers of V3, which follow the last layer in its files, are not part of the model.
"""

import math
from collections.abc import Mapping
from typing import Any

from mesh_transformer.checkpoint.manifest import CheckpointError
from mesh_transformer.config import ModelConfig
from mesh_transformer.convert.huggingface.config_map import ACTIVATIONS, HF_ACTIVATIONS, read_sizes, write_sizes
from mesh_transformer.convert.huggingface.hf_config import HFConfig
from mesh_transformer.convert.huggingface.rope_map import read_rope, write_rope
from mesh_transformer.convert.huggingface.tensor_map import LLAMA, M, TensorMapping, experts, linear, shared_expert

A = f"{M}.self_attn"
LATENT_ATTENTION = {
    **linear("attention/w_q", f"{A}.q_proj", "heads head_dim", "embed"),
    **linear("attention/w_q_down", f"{A}.q_a_proj", "latent", "embed", "attention/b_q_down"),
    **linear("attention/w_q_up", f"{A}.q_b_proj", "heads head_dim", "latent"),
    **linear("attention/w_kv_down", f"{A}.kv_a_proj_with_mqa", "latent", "embed", "attention/b_kv_down"),
    **linear("attention/w_kv_up", f"{A}.kv_b_proj", "heads head_dim", "latent"),
    **linear("attention/w_o", f"{A}.o_proj", "embed", "heads head_dim", "attention/b_o"),
    "attention/norm_q_latent/scale": TensorMapping(f"{A}.q_a_layernorm.weight", "latent"),
    "attention/norm_kv_latent/scale": TensorMapping(f"{A}.kv_a_layernorm.weight", "latent"),
}
TENSORS = {
    **{name: mapping for name, mapping in LLAMA.items() if not name.startswith("attention/")},
    **LATENT_ATTENTION,
    **experts(f"{M}.mlp.experts"),
    **shared_expert("feed_forward", f"{M}.mlp.shared_experts"),
    "experts/w_router": TensorMapping(f"{M}.mlp.gate.weight", "router embed"),
    "experts/selection_bias": TensorMapping(f"{M}.mlp.gate.e_score_correction_bias", "router"),
}

# Keys without effect if no layer of the model has experts
EXPERT_KEYS = {
    "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size", "routed_scaling_factor",
    "norm_topk_prob", "n_group", "topk_group", "topk_method",
}  # fmt: skip


def read_config(s: HFConfig) -> dict[str, Any]:
    """Return the [model] section for a DeepseekV2Config or DeepseekV3Config."""
    is_v3 = s.kind == "deepseek_v3"
    rope, fields = read_rope(s)
    s.require("num_key_value_heads", s["num_attention_heads"])
    latent = dict(
        kv_rank=s["kv_lora_rank"], q_rank=s["q_lora_rank"], d_unrotated=s["qk_nope_head_dim"],
        d_rotated=s["qk_rope_head_dim"], d_value=s["v_head_dim"],
    )  # fmt: skip
    d_head = latent["d_unrotated"] + latent["d_rotated"]
    s.require("head_dim", latent["d_rotated"])  # transformers computes both
    s.require("qk_head_dim", d_head)
    model = read_sizes(s) | dict(
        norm="rmsnorm", norm_eps=s["rms_norm_eps"],
        positions="rope-interleaved" if not is_v3 or s["rope_interleave"] else "rope-half", **fields,
        latent_attention=latent, attention_scale=_attention_scale(rope, d_head), qkv_bias=s["attention_bias"],
        attention_out_bias=s["attention_bias"], ff_bias=not is_v3 and s["mlp_bias"], gated_ffn=True,
        activation=s.translate(ACTIVATIONS, "hidden_act"),
    )  # fmt: skip
    n_layers = s["num_hidden_layers"]
    n_dense = min(s["first_k_dense_replace"] or 0, n_layers)
    if n_dense < n_layers:
        model["experts"] = _read_experts(s, is_v3) | dict(dense_layers=list(range(n_dense)))
    else:
        s.was_read |= EXPERT_KEYS
    s.was_read |= {"num_nextn_predict_layers"}  # see the module's docstring
    return model


def _attention_scale(rope: Mapping[str, Any], d_head: int) -> float | str:
    """Return the factor of the attention scores, which increases with the context length if mscale_all_dim is set."""
    mscale = rope.get("mscale_all_dim") or 0.0
    if rope["rope_type"] == "default" or not mscale or rope["factor"] <= 1:
        return "rsqrt_d_head"
    return d_head**-0.5 * (0.1 * mscale * math.log(rope["factor"]) + 1.0) ** 2


def _read_experts(s: HFConfig, is_v3: bool) -> dict[str, Any]:
    # Keys of DeepSeek's code that are not fields of the classes in transformers.
    s.require("moe_layer_freq", 1)
    s.require("scoring_func", "sigmoid" if is_v3 else "softmax")
    s.require("topk_method", *(["noaux_tc"] if is_v3 else ["greedy", "group_limited_greedy"]))
    n_shared = s["n_shared_experts"] or 0
    table = dict(
        n_experts=s["n_routed_experts"], n_experts_per_token=s["num_experts_per_tok"], d_ff=s["moe_intermediate_size"],
        shared_expert=n_shared > 0, shared_d_ff=n_shared * s["moe_intermediate_size"] or None,
        gate_scale=float(s["routed_scaling_factor"]), normalize_gates=is_v3 and bool(s["norm_topk_prob"]),
    )  # fmt: skip
    # transformers ignores norm_topk_prob of V2, and the groups of the greedy method.
    s.was_read |= {"norm_topk_prob", "n_group", "topk_group"}
    if is_v3:
        table |= dict(scores="sigmoid", selection_bias=True, group_score="sum-of-top-2")
    if is_v3 or s["topk_method"] == "group_limited_greedy":
        table |= dict(n_expert_groups=s.get("n_group"), n_groups_per_token=s.get("topk_group"))
    return table


def _write(c: ModelConfig) -> dict[str, Any]:
    e = c.experts
    latent = c.latent_attention
    if latent is None:
        raise CheckpointError("latent_attention is unset, but DeepSeek models require it")
    shared = c.shared_ff_dim // c.expert_ff_dim if e and e.shared_expert else 0
    return write_sizes(c) | dict(
        num_key_value_heads=c.n_heads,
        hidden_act=HF_ACTIVATIONS.get(c.activation), rms_norm_eps=c.norm_eps, attention_bias=c.qkv_bias,
        kv_lora_rank=latent.kv_rank, q_lora_rank=latent.q_rank, qk_nope_head_dim=latent.d_unrotated,
        qk_rope_head_dim=latent.d_rotated, v_head_dim=latent.d_value, n_shared_experts=shared,
        n_routed_experts=e.n_experts if e else 1, num_experts_per_tok=e.n_experts_per_token if e else 1,
        moe_intermediate_size=c.expert_ff_dim, routed_scaling_factor=e.gate_scale if e else 1.0,
        first_k_dense_replace=next((i for i, kind in enumerate(c.layer_kinds) if kind.has_experts), c.n_layers),
        n_group=e.n_expert_groups if e else 1, topk_group=e.groups_per_token if e else 1, **write_rope(c),
    )  # fmt: skip


def write_v2(c: ModelConfig) -> dict[str, Any]:
    """Return the keys of a DeepseekV2Config."""
    grouped = c.experts is not None and c.experts.limits_groups
    return _write(c) | dict(mlp_bias=c.ff_bias, topk_method="group_limited_greedy" if grouped else "greedy")


def write_v3(c: ModelConfig) -> dict[str, Any]:
    """Return the keys of a DeepseekV3Config without multi-token prediction."""
    normalized = c.experts is not None and c.experts.normalizes_gates
    interleaved = c.positions == "rope-interleaved"
    return _write(c) | dict(norm_topk_prob=normalized, rope_interleave=interleaved, num_nextn_predict_layers=0)

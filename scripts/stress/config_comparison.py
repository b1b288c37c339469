# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Comparison of an exported config.json with that of its source, in the keys that have an effect."""

import re
from collections.abc import Mapping
from typing import Any

from mesh_transformer.config import ModelConfig
from mesh_transformer.convert.huggingface import config_map

# Fields that have another value after an export, although the function is the same.
EQUIVALENT = {
    "gpt2": {"n_inner"},  # null means 4 n_embd, which is written
    "gpt_neo": {"intermediate_size", "attention_types"},  # the same layers, in the shortest form
    "gptj": {"n_inner"},
    "smollm3": {"no_rope_layer_interval", "sliding_window"},  # no_rope_layers is given; use_sliding_window is false
    "gemma3_text": {"use_bidirectional_attention", "rope_parameters"},  # null means false; of layers that do not exist
    "deepseek_v2": {
        "n_group",
        "topk_group",
        "topk_method",
        "norm_topk_prob",
    },  # without effect for the greedy method, or any
    "t5": {"feed_forward_proj"},  # dense_act_fn and is_gated_act have effect, and are compared
    "mt5": {"feed_forward_proj"},
    "mixtral": {"head_dim"},  # null means hidden_size / num_attention_heads, which is written
    "mpt": {"learned_pos_emb", "embedding_fraction", "norm_type"},  # transformers ignores them
    "switch_transformers": {"num_sparse_encoder_layers", "num_sparse_decoder_layers"},  # the steps have precedence
    "falcon": {"multi_query", "num_kv_heads", "num_ln_in_parallel_attn"},  # without effect in some of its three forms
    **{kind: {"max_window_layers"} for kind in ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe")},  # layer_types is given
}


def _plain(value: Any, n_layers: int) -> Any:
    """Return a value of config.json as exports have it: activations by one name, rope parameters in full, n_layers items."""
    if value is None:
        return False  # null is false
    if isinstance(value, list):
        return value[:n_layers]
    if isinstance(value, dict) and "attn_type" in value:  # MPT; transformers ignores the other keys
        return {
            key: value.get(key)
            for key in ("alibi", "alibi_bias_max", "clip_qkv", "softmax_scale", "qk_ln", "prefix_lm")
        }
    if isinstance(value, str):
        return config_map.ACTIVATIONS.get(value, value)
    if not isinstance(value, dict) or "rope_theta" not in value:
        return value
    return value["rope_theta"], value.get("rope_type", value.get("type", "default"))


def compare_configs(
    kind: str, model: ModelConfig, keys: set[str], before: Mapping[str, Any], after: Mapping[str, Any]
) -> str:
    """Return the keys with other values after the way back, "" without one, of two configurations of family `kind`."""
    pattern = "decoder_sparse_step|mlp_only_layers"  # the layers with experts, in either form
    pattern += "" if model.experts else "|expert|moe|topk|n_group|routed"  # no effect without them
    pattern += "" if model.rope_scaling else "|original_max_position_embeddings"
    pattern += "" if model.positions.startswith("rope") else "|^rope"
    pattern += "|^multi_query$" if model.n_heads == 1 else ""
    pattern += "" if "local" in model.attention_pattern else "|sliding_window"
    compared = {key for key in keys - EQUIVALENT.get(kind, set()) if not re.search(pattern, key)}
    pairs = {
        key: tuple(_plain(table.get(key), model.n_layers) for table in (before, after)) for key in sorted(compared)
    }
    changed = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
    return f"keys differ: {changed}" if changed else ""

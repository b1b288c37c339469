# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Translate config.json to the native [model] section and back, with a pair of functions for each family."""

import json
from collections.abc import Mapping
from typing import Any

from mesh_transformer.checkpoint.manifest import CheckpointError
from mesh_transformer.config import ModelConfig
from mesh_transformer.config.layers import dividing_period
from mesh_transformer.convert.huggingface.hf_config import HFConfig
from mesh_transformer.convert.huggingface.rope_map import read_rope, write_rope, write_scaling

ACTIVATIONS = {
    "gelu_new": "gelu-tanh",
    "gelu_fast": "gelu-tanh",
    "gelu_pytorch_tanh": "gelu-tanh",
    "gelu": "gelu-erf",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
LAYER_TYPES = {"full_attention": "global", "sliding_attention": "local"}
HF_ACTIVATIONS = {"gelu-tanh": "gelu_new", "gelu-erf": "gelu", "relu": "relu", "silu": "silu"}


def read_sizes(s: HFConfig) -> dict[str, Any]:
    """Return the sizes of a model, and whether its head is tied, from the keys that Llama and most later families have."""
    return dict(
        n_layers=s["num_hidden_layers"],
        d_model=s["hidden_size"],
        n_heads=s["num_attention_heads"],
        d_ff=s["intermediate_size"],
        n_vocab=s["vocab_size"],
        seq_len=s["max_position_embeddings"],
        tied_embeddings=s["tie_word_embeddings"],
    )


def write_sizes(c: ModelConfig) -> dict[str, Any]:
    """Return the keys for the sizes of a model that Llama and most later families have."""
    return dict(
        num_hidden_layers=c.n_layers,
        hidden_size=c.d_model,
        num_attention_heads=c.n_heads,
        num_key_value_heads=c.kv_heads,
        intermediate_size=c.ff_dim,
        vocab_size=c.n_vocab,
        max_position_embeddings=c.seq_len,
    )


def read_gpt2(s: HFConfig) -> dict[str, Any]:
    """Return the [model] section for a GPT2Config."""
    s.require("scale_attn_weights", True)
    s.require("scale_attn_by_inverse_layer_idx", False)
    s.require("add_cross_attention", False)
    model = dict(
        n_layers=s["n_layer"], d_model=s["n_embd"], n_heads=s["n_head"], n_vocab=s["vocab_size"], seq_len=s["n_positions"],
        activation=s.translate(ACTIVATIONS, "activation_function"), norm_eps=s["layer_norm_epsilon"],
        tied_embeddings=s["tie_word_embeddings"],
    )  # fmt: skip
    return model | {"d_ff": s.get("n_inner", default=4 * s["n_embd"])}


def write_gpt2(c: ModelConfig) -> dict[str, Any]:
    """Return the keys of a GPT2Config."""
    return dict(
        n_layer=c.n_layers, n_embd=c.d_model, n_head=c.n_heads, vocab_size=c.n_vocab, n_positions=c.seq_len,
        n_ctx=c.seq_len, activation_function=HF_ACTIVATIONS[c.activation], layer_norm_epsilon=c.norm_eps,
        n_inner=c.ff_dim,
    )  # fmt: skip


def read_gpt_neo(s: HFConfig) -> dict[str, Any]:
    """Return the [model] section for a GPTNeoConfig."""
    patterns = s.get("attention_types", default=[[["global", "local"], 12]])
    kinds = [kind for pattern, count in patterns for _ in range(count) for kind in pattern]
    key = "attention_types"
    if "attention_layers" in s:
        key = "attention_layers"
        kinds = s[key]
    model = dict(
        n_layers=s["num_layers"], d_model=s["hidden_size"], n_heads=s["num_heads"], n_vocab=s["vocab_size"],
        seq_len=s["max_position_embeddings"], attention_pattern=list(kinds)[: dividing_period(kinds)],
        attention_window=s["window_size"], attention_scale="none", qkv_bias=False,
        activation=s.translate(ACTIVATIONS, "activation_function"), norm_eps=s["layer_norm_epsilon"],
        tied_embeddings=s["tie_word_embeddings"],
    )  # fmt: skip
    if len(kinds) != model["n_layers"]:
        raise CheckpointError(
            f"{s.where}: {key} has {len(kinds)} layers, but num_layers = {model['n_layers']}; they must be equal, correct one "
            "of them"
        )
    return model | {"d_ff": s.get("intermediate_size", default=4 * s["hidden_size"])}


def write_gpt_neo(c: ModelConfig) -> dict[str, Any]:
    """Return the keys of a GPTNeoConfig."""
    return dict(
        num_layers=c.n_layers, hidden_size=c.d_model, num_heads=c.n_heads, vocab_size=c.n_vocab,
        max_position_embeddings=c.seq_len, window_size=c.attention_window, intermediate_size=c.ff_dim,
        attention_types=[[list(c.attention_pattern), c.n_layers // len(c.attention_pattern)]],
        activation_function=HF_ACTIVATIONS[c.activation], layer_norm_epsilon=c.norm_eps,
    )  # fmt: skip


def read_gpt_j(s: HFConfig) -> dict[str, Any]:
    """Return the [model] section for a GPTJConfig."""
    model = dict(
        n_layers=s["n_layer"], d_model=s["n_embd"], n_heads=s["n_head"], n_vocab=s["vocab_size"], seq_len=s["n_positions"],
        positions="rope-interleaved", residual="parallel", qkv_bias=False, attention_out_bias=False, head_bias=True,
        activation=s.translate(ACTIVATIONS, "activation_function"), norm_eps=s["layer_norm_epsilon"],
        tied_embeddings=s["tie_word_embeddings"], rope_dims=require_even(s, s["rotary_dim"], "rotary_dim"), init="gptj",
    )  # fmt: skip
    return model | {"d_ff": s.get("n_inner", default=4 * s["n_embd"])}


def write_gpt_j(c: ModelConfig) -> dict[str, Any]:
    """Return the keys of a GPTJConfig."""
    return dict(
        n_layer=c.n_layers, n_embd=c.d_model, n_head=c.n_heads, vocab_size=c.n_vocab, n_positions=c.seq_len,
        rotary_dim=c.rope_dim, n_inner=c.ff_dim, activation_function=HF_ACTIVATIONS[c.activation],
        layer_norm_epsilon=c.norm_eps,
    )  # fmt: skip


def require_full_rotation(s: HFConfig, rope: Mapping[str, Any]) -> None:
    """Raise CheckpointError if rotary embeddings rotate only some dimensions of each head."""
    if rope.get("partial_rotary_factor", 1) != 1:
        raise CheckpointError(
            f"{s.where}: partial_rotary_factor = {json.dumps(rope['partial_rotary_factor'])} (of rope_parameters or "
            "rope_scaling) is not supported; supported: 1"
        )


def require_even(s: HFConfig, dims: int, *keys: str) -> int:
    """Return a number of rotated dimensions. Raise CheckpointError, with the keys that determine it, if it is odd."""
    if dims % 2:
        raise CheckpointError(
            f"{s.where}: {', '.join(keys)} give {dims} rotated dimensions of a head; the number must be even"
        )
    return dims


ROTATION_KEYS = (  # keys that determine the number of rotated dimensions of a head
    "hidden_size",
    "num_attention_heads",
    "partial_rotary_factor",
    "rotary_pct",
    "rope_parameters",
    "rope_scaling",
)


def read_gpt_neox(s: HFConfig) -> dict[str, Any]:
    """Return the [model] section for a GPTNeoXConfig."""
    rope, fields = read_rope(s)
    return dict(
        n_layers=s["num_hidden_layers"], d_model=s["hidden_size"], n_heads=s["num_attention_heads"],
        n_vocab=s["vocab_size"], seq_len=s["max_position_embeddings"], d_ff=s["intermediate_size"],
        positions="rope-half", qkv_bias=s["attention_bias"], attention_out_bias=s["attention_bias"], **fields,
        residual="parallel-two-norms" if s["use_parallel_residual"] else "serial",
        activation=s.translate(ACTIVATIONS, "hidden_act"), norm_eps=s["layer_norm_eps"],
        tied_embeddings=s["tie_word_embeddings"], init="neox",
        rope_dims=require_even(
            s, int(s["hidden_size"] // s["num_attention_heads"] * rope["partial_rotary_factor"]), *ROTATION_KEYS
        ),
    )  # fmt: skip


def write_gpt_neox(c: ModelConfig) -> dict[str, Any]:
    """Return the keys of a GPTNeoXConfig, with the names before and since transformers 5."""
    fraction = c.rope_dim / c.head_dim
    return dict(
        num_hidden_layers=c.n_layers, hidden_size=c.d_model, num_attention_heads=c.n_heads, vocab_size=c.n_vocab,
        max_position_embeddings=c.seq_len, intermediate_size=c.ff_dim, rotary_pct=fraction, rotary_emb_base=c.rope_theta,
        rope_parameters=write_scaling(c) | {"rope_theta": c.rope_theta, "partial_rotary_factor": fraction},
        use_parallel_residual=c.residual == "parallel-two-norms", hidden_act=HF_ACTIVATIONS[c.activation],
        layer_norm_eps=c.norm_eps, attention_bias=c.qkv_bias,
    )  # fmt: skip


def read_llama(s: HFConfig) -> dict[str, Any]:
    """Return the [model] section for the configuration of Llama, Mistral, Mixtral, Qwen2, Qwen3 or Arcee."""
    rope, fields = read_rope(s)
    require_full_rotation(s, rope)
    heads = s["num_attention_heads"]
    # The classes of Mistral and Qwen2 lack attention_bias, and ignore it in a file.
    out_bias = s["attention_bias"] if "attention_bias" in s.fields else False
    model: dict[str, Any] = read_sizes(s) | dict(
        norm="rmsnorm", norm_eps=s["rms_norm_eps"],
        n_kv_heads=s.get("num_key_value_heads", default=heads),
        d_head=(s["head_dim"] if "head_dim" in s or "head_dim" in s.fields else None) or s["hidden_size"] // heads,
        positions="rope-half", **fields, activation=s.translate(ACTIVATIONS, "hidden_act"), gated_ffn=s.kind != "arcee",
        qkv_bias=s.kind == "qwen2" or out_bias, attention_out_bias=out_bias,
        ff_bias=s["mlp_bias"] if "mlp_bias" in s.fields else False,
        qk_norm=s.kind == "qwen3",
    )  # fmt: skip
    require_even(s, model["d_head"], "head_dim", "hidden_size", "num_attention_heads")
    return model | _read_windows(s, model["n_layers"])


def _read_windows(s: HFConfig, n_layers: int) -> dict[str, Any]:
    """Return the fields for sliding-window attention.

    In Mistral and Mixtral all layers have a window. In Qwen the layers with the layer_type sliding_attention have a window,
    by default the layers from max_window_layers on.
    """
    if s.kind in ("mistral", "mixtral"):
        window = s["sliding_window"]
        kinds = ["full_attention" if window is None else "sliding_attention"] * n_layers
    elif s.kind in ("qwen2", "qwen3"):
        window = s["sliding_window"] if s["use_sliding_window"] else None
        full = n_layers if window is None else min(s["max_window_layers"], n_layers)
        kinds = s.get("layer_types", default=["full_attention"] * full + ["sliding_attention"] * (n_layers - full))
        s.was_read |= {"sliding_window", "max_window_layers"}  # these keys have no effect without a window
    else:
        return {}
    return read_windows_of(s, kinds, window, n_layers)


def read_windows_of(s: HFConfig, types: list[str], window: int | None, n_layers: int) -> dict[str, Any]:
    """Return the fields for layers of these layer_types. Raise CheckpointError if they need a window and there is none."""
    pattern = read_layer_types(s, types, n_layers)
    if "local" not in pattern:
        return {}
    if window is None:
        raise CheckpointError(
            f"{s.where}: layer_types has sliding_attention, but sliding_window is not in use; set sliding_window and "
            "use_sliding_window"
        )
    return dict(attention_pattern=pattern, attention_window=window)


def read_layer_types(s: HFConfig, types: list[str], n_layers: int) -> list[str]:
    """Return the attention pattern for layer_types of a config.json. Raise CheckpointError for unknown or missing types."""
    if len(types) != n_layers or set(types) - LAYER_TYPES.keys():
        raise CheckpointError(
            f"{s.where}: layer_types = {str(types)[:100]} is not supported; layer_types must be {' or '.join(LAYER_TYPES)} for "
            f"each of {n_layers} layers"
        )
    kinds = [LAYER_TYPES[layer_type] for layer_type in types]
    return kinds[: dividing_period(kinds)]


def write_layer_types(c: ModelConfig) -> list[str]:
    """Return the layer_types of all layers."""
    external = {native: kind for kind, native in LAYER_TYPES.items()}
    return [external[c.attention_pattern[i % len(c.attention_pattern)]] for i in range(c.n_layers)]


def write_llama(c: ModelConfig) -> dict[str, Any]:
    """Return the keys for the configuration of Llama, Mistral, Mixtral, Qwen2, Qwen3 or Arcee."""
    table = write_sizes(c) | dict(
        head_dim=c.head_dim, hidden_act=HF_ACTIVATIONS[c.activation], rms_norm_eps=c.norm_eps, mlp_bias=c.ff_bias,
        attention_bias=c.attention_out_bias, **write_rope(c),
    )  # fmt: skip
    if "local" in c.attention_pattern:
        layers = c.attention_pattern * (c.n_layers // len(c.attention_pattern))
        table |= dict(
            sliding_window=c.attention_window, use_sliding_window=True, max_window_layers=layers.index("local")
        )
    if len(set(c.attention_pattern)) > 1:
        table |= dict(layer_types=write_layer_types(c))
    elif "global" in c.attention_pattern:
        table |= dict(sliding_window=None)
    return table


def read_mixtral(s: HFConfig) -> dict[str, Any]:
    """Return the [model] section for a MixtralConfig: experts without capacity limits, with gates that sum to 1."""
    experts = dict(n_experts=s["num_local_experts"], n_experts_per_token=s["num_experts_per_tok"], normalize_gates=True)
    return read_llama(s) | dict(experts=experts)


def write_mixtral(c: ModelConfig) -> dict[str, Any]:
    """Return the keys of a MixtralConfig."""
    experts = {} if c.experts is None else vars(c.experts)
    return write_llama(c) | {
        "num_local_experts": experts.get("n_experts"),
        "num_experts_per_tok": experts.get("n_experts_per_token"),
    }

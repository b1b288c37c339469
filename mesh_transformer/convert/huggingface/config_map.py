# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Translate config.json of Hugging Face models to the native [model] section and back, one pair of functions per family."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mesh_transformer.checkpoint.manifest import CheckpointError
from mesh_transformer.config import ModelConfig


class HFConfig:
    """A config.json whose keys are read one by one. Keys that are not read do not affect the function of the model."""

    def __init__(self, table: Mapping[str, Any], where: object):
        self.table = table
        self.where = where

    def get(self, *keys: str, default: Any = None) -> Any:
        """Return the value of the first of `keys` that is set, or the default. Raise CheckpointError without either."""
        for key in keys:
            if self.table.get(key) is not None:
                return self.table[key]
        if default is None:
            raise CheckpointError(f"{self.where}: {' or '.join(keys)} is missing")
        return default

    def require(self, key: str, *allowed: Any) -> None:
        """Raise CheckpointError unless the key is absent, null or one of `allowed`; other values are other functions."""
        value = self.table.get(key)
        if value is not None and value not in allowed:
            raise CheckpointError(f"{self.where}: {key} = {value!r} is not supported; supported: {allowed}")

    def translate(self, names: Mapping[Any, str], *keys: str, default: Any) -> str:
        """Return the native name of an external value. Raise CheckpointError if it is not in `names`."""
        value = self.get(*keys, default=default)
        if value not in names:
            raise CheckpointError(f"{self.where}: {keys[0]} = {value!r} is not supported; supported: {list(names)}")
        return names[value]


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


def read_gpt2(s: HFConfig) -> dict[str, Any]:
    """Return the [model] section for a GPT2Config."""
    s.require("scale_attn_weights", True)
    s.require("scale_attn_by_inverse_layer_idx", False)
    s.require("add_cross_attention", False)
    model = dict(
        n_layers=s.get("n_layer"), d_model=s.get("n_embd"), n_heads=s.get("n_head"), n_vocab=s.get("vocab_size"),
        seq_len=s.get("n_positions", "n_ctx"), activation=s.translate(ACTIVATIONS, "activation_function", default="gelu_new"),
        norm_eps=s.get("layer_norm_epsilon", default=1e-5), tied_embeddings=s.table.get("tie_word_embeddings", True),
    )  # fmt: skip
    return model | {"d_ff": s.get("n_inner", default=4 * model["d_model"])}


def write_gpt2(c: ModelConfig) -> dict[str, Any]:
    """Return the keys of a GPT2Config."""
    return dict(
        n_layer=c.n_layers, n_embd=c.d_model, n_head=c.n_heads, vocab_size=c.n_vocab, n_positions=c.seq_len,
        n_ctx=c.seq_len, activation_function=HF_ACTIVATIONS[c.activation], layer_norm_epsilon=c.norm_eps,
        n_inner=c.ff_dim,
    )  # fmt: skip


def read_gpt_neo(s: HFConfig) -> dict[str, Any]:
    """Return the [model] section for a GPTNeoConfig."""
    kinds = s.table.get("attention_layers")
    if kinds is None:
        kinds = [kind for pattern, count in s.get("attention_types") for _ in range(count) for kind in pattern]
    model = dict(
        n_layers=s.get("num_layers"), d_model=s.get("hidden_size"), n_heads=s.get("num_heads"),
        n_vocab=s.get("vocab_size"), seq_len=s.get("max_position_embeddings"), attention_pattern=_shorten(list(kinds)),
        attention_window=s.get("window_size", default=256), attention_scale="none", qkv_bias=False,
        activation=s.translate(ACTIVATIONS, "activation_function", default="gelu_new"),
        norm_eps=s.get("layer_norm_epsilon", default=1e-5), tied_embeddings=s.table.get("tie_word_embeddings", True),
    )  # fmt: skip
    if len(kinds) != model["n_layers"]:
        raise CheckpointError(f"{s.where}: attention_types has {len(kinds)} layers, num_layers is {model['n_layers']}")
    return model | {"d_ff": s.get("intermediate_size", default=4 * model["d_model"])}


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
        n_layers=s.get("n_layer"), d_model=s.get("n_embd"), n_heads=s.get("n_head"), n_vocab=s.get("vocab_size"),
        seq_len=s.get("n_positions"), positions="rope-interleaved", residual="parallel", qkv_bias=False,
        attention_out_bias=False, head_bias=True, tied_embeddings=s.table.get("tie_word_embeddings", False),
        activation=s.translate(ACTIVATIONS, "activation_function", default="gelu_new"), init="gptj",
        norm_eps=s.get("layer_norm_epsilon", default=1e-5),
    )  # fmt: skip
    head = model["d_model"] // model["n_heads"]
    inner = s.get("n_inner", default=4 * model["d_model"])
    return model | {"rope_dims": s.table.get("rotary_dim") or head, "d_ff": inner}


def write_gpt_j(c: ModelConfig) -> dict[str, Any]:
    """Return the keys of a GPTJConfig."""
    return dict(
        n_layer=c.n_layers, n_embd=c.d_model, n_head=c.n_heads, vocab_size=c.n_vocab, n_positions=c.seq_len,
        rotary_dim=c.rope_dim, n_inner=c.ff_dim, activation_function=HF_ACTIVATIONS[c.activation],
        layer_norm_epsilon=c.norm_eps,
    )  # fmt: skip


LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def _read_rope(s: HFConfig, *base_keys: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the rope parameters, under the key of either version of transformers, and the native fields for them."""
    rope = s.table.get("rope_parameters") or s.table.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    fields: dict[str, Any] = dict(rope_theta=float(rope.get("rope_theta") or s.get(*base_keys, default=10_000.0)))
    if kind == "llama3":
        if missing := [key for key in LLAMA3 if key not in rope]:
            raise CheckpointError(f"{s.where}: rotary embeddings of type 'llama3' need {', '.join(missing)}")
        factor, low, high, length = (rope[key] for key in LLAMA3)
        fields["rope_scaling"] = dict(
            factor=float(factor), low_freq_factor=float(low), high_freq_factor=float(high), original_seq_len=int(length)
        )
    elif kind != "default":
        raise CheckpointError(
            f"{s.where}: rotary embeddings of type {kind!r} are not supported; supported: 'default', 'llama3'"
        )
    return rope, fields


def _write_rope(c: ModelConfig) -> dict[str, Any]:
    """Return the rope parameters, with the keys before and since transformers 5."""
    if c.rope_scaling is None:
        return {"rope_theta": c.rope_theta, "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta}}
    scaling: dict[str, Any] = dict(zip(LLAMA3, dataclasses.astuple(c.rope_scaling), strict=True), rope_type="llama3")
    return {
        "rope_theta": c.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": scaling | {"rope_theta": c.rope_theta},
    }


def read_gpt_neox(s: HFConfig) -> dict[str, Any]:
    """Return the [model] section for a GPTNeoXConfig."""
    rope, fields = _read_rope(s, "rotary_emb_base", "rope_theta")
    bias = s.table.get("attention_bias", True)
    model = dict(
        n_layers=s.get("num_hidden_layers"), d_model=s.get("hidden_size"), n_heads=s.get("num_attention_heads"),
        n_vocab=s.get("vocab_size"), seq_len=s.get("max_position_embeddings"), d_ff=s.get("intermediate_size"),
        positions="rope-half", qkv_bias=bias, attention_out_bias=bias, **fields,
        residual="parallel-two-norms" if s.table.get("use_parallel_residual", True) else "serial",
        activation=s.translate(ACTIVATIONS, "hidden_act", default="gelu"), norm_eps=s.get("layer_norm_eps", default=1e-5),
        tied_embeddings=s.table.get("tie_word_embeddings", False), init="neox",
    )  # fmt: skip
    fraction = rope.get("partial_rotary_factor") or s.get("rotary_pct", "partial_rotary_factor", default=0.25)
    return model | {"rope_dims": int(model["d_model"] // model["n_heads"] * fraction)}


def write_gpt_neox(c: ModelConfig) -> dict[str, Any]:
    """Return the keys of a GPTNeoXConfig, with the names before and since transformers 5."""
    fraction = c.rope_dim / c.head_dim
    return dict(
        num_hidden_layers=c.n_layers, hidden_size=c.d_model, num_attention_heads=c.n_heads, vocab_size=c.n_vocab,
        max_position_embeddings=c.seq_len, intermediate_size=c.ff_dim, rotary_pct=fraction, rotary_emb_base=c.rope_theta,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta, "partial_rotary_factor": fraction},
        use_parallel_residual=c.residual == "parallel-two-norms", hidden_act=HF_ACTIVATIONS[c.activation],
        layer_norm_eps=c.norm_eps, attention_bias=c.qkv_bias,
    )  # fmt: skip


def read_llama(s: HFConfig) -> dict[str, Any]:
    """Return the [model] section for a LlamaConfig, MistralConfig, MixtralConfig, Qwen2Config or Qwen3Config."""
    s.require("partial_rotary_factor", 1)
    _, fields = _read_rope(s, "rope_theta")
    kind = s.table.get("model_type")
    heads = s.get("num_attention_heads")
    out_bias = s.table.get("attention_bias", False)
    model = dict(
        n_layers=s.get("num_hidden_layers"), d_model=s.get("hidden_size"), n_heads=heads, n_vocab=s.get("vocab_size"),
        seq_len=s.get("max_position_embeddings"), d_ff=s.get("intermediate_size"), norm="rmsnorm",
        n_kv_heads=s.get("num_key_value_heads", default=heads), d_head=s.get("head_dim", default=s.get("hidden_size") // heads),
        positions="rope-half", **fields, activation=s.translate(ACTIVATIONS, "hidden_act", default="silu"),
        gated_ffn=True, qkv_bias=True if kind == "qwen2" else out_bias, attention_out_bias=out_bias,
        ff_bias=s.table.get("mlp_bias", False),
        norm_eps=s.get("rms_norm_eps", default=1e-6), tied_embeddings=s.table.get("tie_word_embeddings", False),
        qk_norm=kind == "qwen3",
    )  # fmt: skip
    return model | _read_windows(s, model["n_layers"])


def _read_windows(s: HFConfig, n_layers: int) -> dict[str, Any]:
    """Return the fields for sliding-window attention.

    All layers of Mistral and Mixtral have it. Of Qwen, those that layer_types names, or else the last ones.
    """
    kind = s.table.get("model_type")
    in_all_layers = kind in ("mistral", "mixtral")
    window = s.table.get("sliding_window", 4096 if kind == "mistral" else None)  # null: no window; absent: the default
    if not window or not (in_all_layers or (kind in ("qwen2", "qwen3") and s.table.get("use_sliding_window"))):
        return {}
    if in_all_layers:
        kinds = ["sliding_attention"] * n_layers
    else:
        first = s.get("max_window_layers", default=28)  # transformers' own default
        last = ["full_attention"] * min(first, n_layers) + ["sliding_attention"] * max(n_layers - first, 0)
        kinds = s.get("layer_types", default=last)
    return dict(attention_pattern=read_layer_types(s, kinds, n_layers), attention_window=window)


def read_layer_types(s: HFConfig, types: list[str], n_layers: int) -> list[str]:
    """Return the attention pattern for the layer_types of a config.json; CheckpointError for unknown or missing ones."""
    if len(types) != n_layers or set(types) - LAYER_TYPES.keys():
        raise CheckpointError(
            f"{s.where}: layer_types must be {' or '.join(LAYER_TYPES)} for each of {n_layers} layers"
        )
    return _shorten([LAYER_TYPES[each] for each in types])


def write_layer_types(c: ModelConfig) -> list[str]:
    """Return the layer_types of all layers."""
    external = {native: kind for kind, native in LAYER_TYPES.items()}
    return [external[kind] for kind in c.attention_pattern] * (c.n_layers // len(c.attention_pattern))


def _shorten(kinds: list[str]) -> list[str]:
    """Return the shortest pattern whose repetition gives `kinds`."""
    lengths = (n for n in range(1, len(kinds) + 1) if len(kinds) % n == 0)
    return next(kinds[:n] for n in lengths if kinds[:n] * (len(kinds) // n) == kinds)


def write_llama(c: ModelConfig) -> dict[str, Any]:
    """Return the keys of a LlamaConfig, MistralConfig, MixtralConfig, Qwen2Config or Qwen3Config."""
    table = dict(
        num_hidden_layers=c.n_layers, hidden_size=c.d_model, num_attention_heads=c.n_heads, vocab_size=c.n_vocab,
        max_position_embeddings=c.seq_len, intermediate_size=c.ff_dim, num_key_value_heads=c.kv_heads,
        head_dim=c.head_dim, hidden_act=HF_ACTIVATIONS[c.activation], rms_norm_eps=c.norm_eps, mlp_bias=c.ff_bias,
        attention_bias=c.attention_out_bias, **_write_rope(c),
    )  # fmt: skip
    if "local" in c.attention_pattern:
        table |= dict(sliding_window=c.attention_window, use_sliding_window=True, max_window_layers=0)
    if len(set(c.attention_pattern)) > 1:
        table |= dict(layer_types=write_layer_types(c))
    elif "global" in c.attention_pattern:
        table |= dict(sliding_window=None)
    return table


def read_mixtral(s: HFConfig) -> dict[str, Any]:
    """Return the [model] section for a MixtralConfig: dropless experts whose gates are normalized to sum to 1."""
    n_experts_per_token = s.get("num_experts_per_tok", default=2)
    if n_experts_per_token < 2:
        raise CheckpointError(
            f"{s.where}: num_experts_per_tok = {n_experts_per_token} is not supported: Mixtral's gate would be 1, "
            "the native one is the expert's probability; supported: 2 or more"
        )
    experts = dict(n_experts=s.get("num_local_experts", default=8), n_experts_per_token=n_experts_per_token)
    defaults = {"rope_theta": 1e6, "rms_norm_eps": 1e-5}
    return read_llama(HFConfig(defaults | dict(s.table), s.where)) | dict(experts=experts)


def write_mixtral(c: ModelConfig) -> dict[str, Any]:
    """Return the keys of a MixtralConfig."""
    experts = {} if c.experts is None else vars(c.experts)
    table = write_llama(c) | {
        "num_local_experts": experts.get("n_experts"),
        "num_experts_per_tok": experts.get("n_experts_per_token"),
    }
    return {
        key: value for key, value in table.items() if key not in ("mlp_bias", "attention_bias", "use_sliding_window")
    }

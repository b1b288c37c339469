# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Gemma 1 (arXiv 2403.08295) and the text models of Gemma 3 (arXiv 2503.19786): tensor names and config.json."""

import json
from typing import Any

from mesh_transformer.config import ModelConfig
from mesh_transformer.config.layers import shortest_pattern
from mesh_transformer.convert.huggingface import gemma2
from mesh_transformer.convert.huggingface.config_map import (
    ACTIVATIONS,
    read_layer_types,
    read_sizes,
    require_even,
    write_layer_types,
    write_sizes,
)
from mesh_transformer.convert.huggingface.hf_config import HFConfig
from mesh_transformer.convert.huggingface.rope_map import read_rope, read_scaling, write_rope, write_scaling
from mesh_transformer.convert.huggingface.tensor_map import LLAMA, M, TensorMapping
from mesh_transformer.storage.errors import CheckpointError

GEMMA = LLAMA
GEMMA3 = gemma2.TENSORS | {
    f"attention/norm_{x}/scale": TensorMapping(f"{M}.self_attn.{x}_norm.weight", "head_dim") for x in "qk"
}
# Tensors of the text model in files of Gemma3ForConditionalGeneration, with the names before and since transformers 5
GEMMA3_TEXT_PART = {
    weight: mapping._replace(
        name=f"language_model.{mapping.name}", aliases=(f"model.language_model.{mapping.name.removeprefix('model.')}",)
    )
    for weight, mapping in GEMMA3.items()
}
IMAGE_PART = tuple(
    f"{prefix}{part}." for prefix in ("", "model.") for part in ("vision_tower", "multi_modal_projector")
)
# "gelu" in the first files means the tanh approximation
GEMMA_ACTIVATIONS = ACTIVATIONS | {"gelu": "gelu-tanh"}


def _read_shared(s: HFConfig) -> dict[str, Any]:
    """Return the fields that Gemma 1 and 3 have in common."""
    s.require("use_bidirectional_attention", False, None)
    bias = s["attention_bias"]
    return read_sizes(s) | dict(
        n_kv_heads=s["num_key_value_heads"],
        d_head=require_even(s, s["head_dim"], "head_dim"),
        norm="gemma-rmsnorm",
        norm_eps=s["rms_norm_eps"],
        positions="rope-half",
        gated_ffn=True,
        embedding_scale="sqrt_d_model",
        qkv_bias=bias,
        attention_out_bias=bias,
        ff_bias=False,
    )


def _write_shared(c: ModelConfig) -> dict[str, Any]:
    return write_sizes(c) | dict(
        head_dim=c.head_dim,
        rms_norm_eps=c.norm_eps,
        attention_bias=c.qkv_bias,
    )


def read_gemma(s: HFConfig) -> dict[str, Any]:
    """Return the [model] section for a GemmaConfig."""
    s.was_read.add("hidden_activation")  # transformers reads hidden_act
    return _read_shared(s) | read_rope(s)[1] | dict(activation=s.translate(GEMMA_ACTIVATIONS, "hidden_act"))


def write_gemma(c: ModelConfig) -> dict[str, Any]:
    """Return the keys of a GemmaConfig."""
    return _write_shared(c) | write_rope(c) | dict(hidden_act=gemma2.HF_ACTIVATIONS[c.activation])


def read_gemma3_text(s: HFConfig) -> dict[str, Any]:
    """Return the [model] section for a Gemma3TextConfig."""
    s.require("attn_logit_softcapping", None)  # transformers does not apply it
    n_layers = s["num_hidden_layers"]
    period = s.find("sliding_window_pattern") or 6
    types = ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(n_layers)]
    pattern = shortest_pattern(read_layer_types(s, s.get("layer_types", default=types), n_layers))
    return _read_shared(s) | dict(
        residual="sandwich",
        qk_norm="gemma-rmsnorm",
        activation=s.translate(ACTIVATIONS, "hidden_activation"),
        attention_pattern=list(pattern),
        attention_window=s["sliding_window"],
        attention_scale=float(s["query_pre_attn_scalar"]) ** -0.5,
        logit_softcap=_number(s["final_logit_softcapping"]),
        **_read_two_rotations(s, has_local="local" in pattern),
    )


def _number(value: float | None) -> float | None:
    return None if value is None else float(value)


def _read_two_rotations(s: HFConfig, *, has_local: bool) -> dict[str, Any]:
    """Return the rope fields of global and local layers, as Gemma3TextConfig.convert_rope_params_to_dict combines them."""
    stored = s.find("rope_parameters") or {}
    scaling = s.find("rope_scaling") or {}
    tables: list[dict[str, Any]] = []
    for layer_type, key, theta in (
        ("full_attention", "rope_theta", 1_000_000.0),
        ("sliding_attention", "rope_local_base_freq", 10_000.0),
    ):
        rope: dict[str, Any] = dict(stored.get(layer_type) or {"rope_type": "default"})
        rope |= scaling if layer_type == "full_attention" else {}
        rope.setdefault("rope_theta", s.find(key) or theta)
        rope["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
        tables.append(rope)
    full, local = tables
    if local["rope_type"] != "default":
        raise CheckpointError(
            f"{s.where}: rotary embeddings of type {json.dumps(local['rope_type'])} in sliding_attention layers are not "
            'supported; supported: "default"'
        )
    fields: dict[str, Any] = {"rope_theta": float(full["rope_theta"])} | read_scaling(s, full)
    return fields | ({"rope_local_theta": float(local["rope_theta"])} if has_local else {})


def write_gemma3_text(c: ModelConfig) -> dict[str, Any]:
    """Return the keys of a Gemma3TextConfig."""
    local_theta = c.rope_local_theta or c.rope_theta
    return _write_shared(c) | dict(
        hidden_activation=gemma2.HF_ACTIVATIONS[c.activation],
        layer_types=write_layer_types(c),
        sliding_window=c.attention_window,
        query_pre_attn_scalar=gemma2.query_scalar(c),
        attn_logit_softcapping=c.attention_softcap,
        final_logit_softcapping=c.logit_softcap,
        rope_parameters={
            "full_attention": write_scaling(c) | {"rope_theta": c.rope_theta},
            "sliding_attention": {"rope_type": "default", "rope_theta": local_theta},
        },
    )


def read_gemma3(s: HFConfig) -> dict[str, Any]:
    """Return the [model] section for the text model of a Gemma3Config."""
    text = HFConfig(s["text_config"] | {"model_type": "gemma3_text"}, f"{s.where}: text_config")
    text.require("final_logit_softcapping", None)  # transformers applies it in a Gemma3ForCausalLM only
    model = read_gemma3_text(text)
    text.check_all_read()
    return model | {"tied_embeddings": s["tie_word_embeddings"] or text["tie_word_embeddings"]}


def write_gemma3(c: ModelConfig) -> dict[str, Any]:
    """Return no keys: a text model is exported as gemma3_text."""
    del c
    return {}

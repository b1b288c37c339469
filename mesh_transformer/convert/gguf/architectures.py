# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Architectures of llama.cpp: translate their metadata and tensor names to and from a Hugging Face family.

The source for the changes to tensors is llama.cpp's conversion/*.py. Each entry of ARCHITECTURES names the families whose
readers and writers of config.json complete the translation.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

from mesh_transformer.convert.gguf.joined_projections import BLOOM, FALCON, MPT
from mesh_transformer.convert.gguf.metadata import (
    LONGROPE_FACTORS,
    Architecture,
    Metadata,
    Table,
    Tensors,
    read_heads,
    read_longrope,
    read_rope,
    write_longrope,
    write_rope,
)
from mesh_transformer.convert.huggingface.families import FAMILIES, Family
from mesh_transformer.convert.huggingface.tensor_map import TensorMapping
from mesh_transformer.convert.layout_views import parse_pattern
from mesh_transformer.storage.errors import CheckpointError

TOKEN_TYPES = "token_types.weight"
TOKEN_EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
# llama.cpp recognizes the 27B models, whose attention scale is different, by their number of layers.
GEMMA2_27B_LAYERS = 46
GEMMA3_27B_LAYERS = 62
OLMO_EPSILON = 1e-5  # of OLMo's norms, which have no parameters
Q_BIAS = "blk.0.attn_q.bias"
Q_NORM = "blk.0.attn_q_norm.weight"
GEMMA3_PERIOD = 6  # layers; the last layer of each period has full attention


def read_config(values: Mapping[str, Any], tensors: Tensors, where: object) -> Table:
    """Return the config.json of a file from its metadata and tensors. Raise CheckpointError if they are not supported."""
    metadata = Metadata(values, where)
    if metadata.name not in ARCHITECTURES:
        raise CheckpointError(
            f"{where}: general.architecture = {metadata.name!r} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    architecture = ARCHITECTURES[metadata.name]
    if TOKEN_EMBEDDING not in tensors:
        raise CheckpointError(
            f"{where}: the tensor {TOKEN_EMBEDDING} is missing; give the file of a complete language model, not of an adapter or "
            "a projector"
        )
    table: Table = {"model_type": architecture.families[0], **architecture.implied}
    for key, name in architecture.keys.items():
        if (value := metadata.get(key)) is not None:
            table[name] = value
    n_vocab = tensors[TOKEN_EMBEDDING].shape[0]
    metadata.require("vocab_size", n_vocab)
    table |= {"vocab_size": n_vocab, "tie_word_embeddings": OUTPUT not in tensors}
    architecture.read_more(metadata, table, tensors)
    metadata.check_all_read()
    return table


def write_config(table: Mapping[str, Any]) -> Table:
    """Return the metadata for a config.json. Raise CheckpointError if its family has no entry in ARCHITECTURES."""
    kind = table["model_type"]
    names = [name for name, architecture in ARCHITECTURES.items() if kind in architecture.families]
    if not names:
        raise CheckpointError(
            f"models of model_type {kind!r} cannot be written as GGUF; supported: "
            + ", ".join(family for architecture in ARCHITECTURES.values() for family in architecture.families)
            + "; export the model with --format huggingface"
        )
    (name,) = names
    architecture = ARCHITECTURES[name]
    config = dict(table)
    values = {key: config[external] for key, external in architecture.keys.items() if config.get(external) is not None}
    values["vocab_size"] = config["vocab_size"]
    architecture.write_more(config, values)
    return {"general.architecture": name} | {f"{name}.{key}": value for key, value in values.items()}


def make_family(kind: str, name: str) -> Family:
    """Return a family of transformers with the tensor names and layouts of an architecture of llama.cpp."""
    mappings = {weight: _rename(mapping, name) for weight, mapping in FAMILIES[kind].mappings.items()}
    known = {weight: mapping for weight, mapping in mappings.items() if mapping is not None}
    known |= ARCHITECTURES[name].mappings
    return FAMILIES[kind]._replace(
        mappings=known,
        prefix="",
        buffers=(),
        copies=(),
        bias_copies=(),
        needs_copies=False,
        variant=ARCHITECTURES[name].variant,
    )


@functools.cache
def _name_map(name: str) -> Callable[[str], str | None]:
    (architecture,) = [key for key, value in MODEL_ARCH_NAMES.items() if value == name]
    return get_tensor_name_map(architecture, 1).get_name


def _rename(mapping: TensorMapping, name: str) -> TensorMapping | None:
    """Return the mapping to the tensor of llama.cpp; None if the architecture does not have this tensor.

    llama.cpp does not interleave the components of a fused projection, and stores the experts of a layer as one tensor.
    """
    module, _, kind = mapping.name.rpartition(".")
    module = module.removeprefix("bert.")
    renamed = _name_map(name)(module.replace(".{e}", "").replace("{i}", "0"))
    if renamed is None and mapping.shared_name:
        return _rename(mapping._replace(name=mapping.shared_name, shared_name=""), name)
    if renamed is None:
        return None
    groups = [group for group in parse_pattern(mapping.pattern) if group != ["1"]]  # the converter squeezes tensors
    if kind == "weight" and module.endswith(ARCHITECTURES[name].transposed or ("\0",)):
        groups.reverse()
    if "{e}" in mapping.name:
        groups.insert(0, ["expert"])
    ordered = [sorted(group, key=lambda word: not word.isdigit()) for group in groups]
    pattern = " ".join(f"({' '.join(group)})" if len(group) > 1 else group[0] for group in ordered)
    full = f"{renamed.replace('blk.0.', 'blk.{i}.')}.{kind}"
    return TensorMapping(full, pattern, mapping.component, split=mapping.split)


def _read_llama(metadata: Metadata, table: Table, tensors: Tensors) -> None:
    d_head = read_heads(metadata, table)
    metadata.require("rope.dimension_count", d_head)
    read_rope(metadata, table, tensors, d_head)
    if metadata.name == "llama":
        table["attention_bias"] = Q_BIAS in tensors
        table["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
        if not (n_experts := metadata.get("expert_count", 0)):
            return
        table |= {"model_type": "mixtral", "num_local_experts": n_experts}
        table |= {"num_experts_per_tok": metadata.get("expert_used_count"), "sliding_window": None}
        del table["attention_bias"], table["mlp_bias"]


def _write_llama(config: Table, values: Table) -> None:
    write_rope(config, values)
    d_head = _head_dim(config)
    values |= {"rope.dimension_count": d_head, "attention.value_length": d_head}
    if config.get("num_local_experts"):
        values |= {"expert_count": config["num_local_experts"], "expert_used_count": config["num_experts_per_tok"]}


def _set_query_scale(table: Table, layers_27b: int) -> None:
    is_27b = table["num_hidden_layers"] == layers_27b
    table["query_pre_attn_scalar"] = (
        table["hidden_size"] // table["num_attention_heads"] if is_27b else table["head_dim"]
    )


def _read_gemma2(metadata: Metadata, table: Table, tensors: Tensors) -> None:
    _read_llama(metadata, table, tensors)
    table.setdefault("sliding_window", 4096)
    _set_query_scale(table, GEMMA2_27B_LAYERS)
    kinds = ("sliding_attention", "full_attention")
    table["layer_types"] = [kinds[i % 2] for i in range(table["num_hidden_layers"])]
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        table.setdefault(key, {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}[key])


def _read_gemma3(metadata: Metadata, table: Table, tensors: Tensors) -> None:
    _read_llama(metadata, table, tensors)
    _set_query_scale(table, GEMMA3_27B_LAYERS)
    local = {"rope_type": "default", "rope_theta": metadata.get("rope.freq_base_swa", 10_000.0)}
    table["rope_parameters"] = {"full_attention": table["rope_parameters"], "sliding_attention": local}
    windows = metadata.get("attention.sliding_window_pattern", GEMMA3_PERIOD)
    if not isinstance(windows, list):
        windows = _repeat_windows(windows, table["num_hidden_layers"])
    if not table.get("sliding_window"):
        windows = [False] * len(windows)
    table["layer_types"] = ["sliding_attention" if each else "full_attention" for each in windows]


def _repeat_windows(period: int, n_layers: int) -> list[bool]:
    """Return for each layer whether it has a window: True except for the last layer of each period.

    With a period of 0, all layers have a window, as in llama.cpp.
    """
    return [period == 0 or bool((i + 1) % period) for i in range(n_layers)]


def _write_gemma3(config: Table, values: Table) -> None:
    ropes = config["rope_parameters"]
    _write_llama(config | {"rope_parameters": ropes["full_attention"]}, values)
    values["rope.freq_base_swa"] = float(ropes["sliding_attention"]["rope_theta"])
    windows = [kind == "sliding_attention" for kind in config["layer_types"]]
    if not any(windows):
        values.pop("attention.sliding_window", None)
    elif windows != _repeat_windows(GEMMA3_PERIOD, len(windows)):
        values["attention.sliding_window_pattern"] = windows


def _read_rotated_fraction(metadata: Metadata, table: Table, d_head: int) -> None:
    table["rope_parameters"]["partial_rotary_factor"] = metadata.get("rope.dimension_count", d_head) / d_head


def _write_rotated_fraction(config: Table, values: Table) -> None:
    values["rope.dimension_count"] = round(config["partial_rotary_factor"] * _head_dim(config))


def _read_phi3(metadata: Metadata, table: Table, tensors: Tensors) -> None:
    d_head = read_heads(metadata, table)
    table["sliding_window"] = metadata.get("attention.sliding_window") or None
    read_longrope(metadata, table, tensors)
    _read_rotated_fraction(metadata, table, d_head)


def _write_phi3(config: Table, values: Table) -> None:
    write_longrope(config, values)
    _write_rotated_fraction(config, values)
    values["attention.sliding_window"] = config["sliding_window"] or 0


def _read_starcoder2(metadata: Metadata, table: Table, tensors: Tensors) -> None:
    _read_llama(metadata, table, tensors)
    table["use_bias"] = Q_BIAS in tensors


def _read_qwen_moe(metadata: Metadata, table: Table, tensors: Tensors) -> None:
    _read_llama(metadata, table, tensors)
    if (experts := tensors.get("blk.0.ffn_up_exps.weight")) is not None:
        table.setdefault("moe_intermediate_size", experts.shape[1])
    if metadata.name == "qwen2moe":
        table["qkv_bias"] = Q_BIAS in tensors
        if (shared := tensors.get("blk.0.ffn_up_shexp.weight")) is not None:
            table.setdefault("shared_expert_intermediate_size", shared.shape[0])


def _read_gpt_oss(metadata: Metadata, table: Table, tensors: Tensors) -> None:
    _read_llama(metadata, table, tensors)
    metadata.require("expert_feed_forward_length", table["intermediate_size"])
    kinds = ("sliding_attention", "full_attention")
    table["layer_types"] = [kinds[i % 2] for i in range(table["num_hidden_layers"])]
    table["attention_bias"] = Q_BIAS in tensors
    if table["rope_parameters"]["rope_type"] == "yarn":
        table["rope_parameters"]["truncate"] = False  # as in all published models; the metadata has no key for it


def _write_gpt_oss(config: Table, values: Table) -> None:
    _write_llama(config, values)
    values["expert_feed_forward_length"] = config["intermediate_size"]


def _read_stablelm(metadata: Metadata, table: Table, tensors: Tensors) -> None:
    d_head = read_heads(metadata, table)
    read_rope(metadata, table, tensors, d_head)
    _read_rotated_fraction(metadata, table, d_head)
    # llama.cpp ignores the key: the residual is parallel if the feed-forward norm is missing
    table["use_parallel_residual"] = "blk.0.ffn_norm.weight" not in tensors
    table |= {"use_qkv_bias": Q_BIAS in tensors, "qk_layernorm": Q_NORM in tensors}
    del table["head_dim"]


def _write_stablelm(config: Table, values: Table) -> None:
    write_rope(config, values)
    _write_rotated_fraction(config, values)


def _read_olmo(metadata: Metadata, table: Table, tensors: Tensors) -> None:
    _read_llama(metadata, table, tensors)
    metadata.require("attention.layer_norm_epsilon", OLMO_EPSILON)


def _write_olmo(config: Table, values: Table) -> None:
    _write_llama(config, values)
    values["attention.layer_norm_epsilon"] = OLMO_EPSILON


def _read_cohere(metadata: Metadata, table: Table, tensors: Tensors) -> None:
    _read_llama(metadata, table, tensors)
    table["use_qk_norm"] = Q_NORM in tensors


def _read_bert(metadata: Metadata, table: Table, tensors: Tensors) -> None:
    metadata.require("attention.causal", False)
    metadata.get("pooling_type")  # read and ignored: the native model has no pooling of sentence embeddings
    if (types := tensors.get(TOKEN_TYPES)) is not None:
        table["type_vocab_size"] = types.shape[0]


def _write_bert(config: Table, values: Table) -> None:
    values["attention.causal"] = False


def _head_dim(config: Table) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _read_gpt2(metadata: Metadata, table: Table, tensors: Tensors) -> None:
    metadata.require("attention.head_count_kv", table["n_head"])
    table["n_ctx"] = table["n_positions"]


def _write_gpt2(config: Table, values: Table) -> None:
    pass  # Architecture.keys has all keys


def _read_neox(metadata: Metadata, table: Table, tensors: Tensors) -> None:
    d_head = table["hidden_size"] // table["num_attention_heads"]
    fraction = metadata.get("rope.dimension_count", d_head) / d_head
    metadata.require("attention.head_count_kv", table["num_attention_heads"])
    read_rope(metadata, table, tensors, d_head)
    table |= {"rotary_pct": fraction, "rotary_emb_base": table["rope_theta"]}
    table["rope_parameters"]["partial_rotary_factor"] = fraction


def _write_neox(config: Table, values: Table) -> None:
    write_rope(config, values)
    d_head = config["hidden_size"] // config["num_attention_heads"]
    values["rope.dimension_count"] = round(config["rotary_pct"] * d_head)


SIZES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
HEADS = SIZES | {"attention.head_count_kv": "num_key_value_heads", "attention.key_length": "head_dim"}
LLAMA = HEADS | {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
GEMMA2 = LLAMA | {
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
GEMMA3 = {key: name for key, name in GEMMA2.items() if key != "attn_logit_softcapping"}
STARCODER2 = HEADS | {"attention.layer_norm_epsilon": "norm_epsilon"}
STABLELM = HEADS | {
    "attention.layer_norm_epsilon": "layer_norm_eps",
    "use_parallel_residual": "use_parallel_residual",
}
OLMO = HEADS | {"attention.clamp_kqv": "clip_qkv"}
COHERE = HEADS | {"attention.layer_norm_epsilon": "layer_norm_eps", "logit_scale": "logit_scale"}
QWEN_MOE = LLAMA | {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
GPT_OSS = LLAMA | {
    "attention.sliding_window": "sliding_window",
    "expert_count": "num_local_experts",
    "expert_used_count": "num_experts_per_tok",
}
NEOX = SIZES | {
    "attention.layer_norm_epsilon": "layer_norm_eps",
    "use_parallel_residual": "use_parallel_residual",
}
GPT2 = {
    "block_count": "n_layer",
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}
SILU = {"hidden_act": "silu"}
GEMMA_IMPLIED = {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False}
WITHOUT_BIAS = SILU | {"attention_bias": False}
# Every layer has experts.
ALL_EXPERTS = SILU | {"use_sliding_window": False, "decoder_sparse_step": 1, "mlp_only_layers": []}
# Each head is normalized separately; one tensor has the scales of all heads.
HEAD_NORMS = {
    f"attention/norm_{x}/scale": TensorMapping(f"blk.{{i}}.attn_{x}_norm.weight", f"{heads} head_dim")
    for x, heads in (("q", "heads"), ("k", "kv_heads"))
}
GPT_OSS_TENSORS = {
    "attention/sinks": TensorMapping("blk.{i}.attn_sinks.weight", "heads"),
    "experts/w_gate": TensorMapping("blk.{i}.ffn_gate_exps.weight", "expert ff embed"),
    "experts/w_in": TensorMapping("blk.{i}.ffn_up_exps.weight", "expert ff embed"),
    "experts/w_out": TensorMapping("blk.{i}.ffn_down_exps.weight", "expert embed ff"),
    "experts/b_gate": TensorMapping("blk.{i}.ffn_gate_exps.bias", "expert ff"),
    "experts/b_in": TensorMapping("blk.{i}.ffn_up_exps.bias", "expert ff"),
    "experts/b_out": TensorMapping("blk.{i}.ffn_down_exps.bias", "expert embed"),
}
CONV1D = ("c_attn", "c_proj", "c_fc")
ARCHITECTURES = {
    "llama": Architecture(("llama", "mistral", "mixtral"), LLAMA, SILU, _read_llama, _write_llama, pairs=True),
    "qwen2": Architecture(("qwen2",), LLAMA, SILU | {"use_sliding_window": False}, _read_llama, _write_llama),
    "qwen3": Architecture(("qwen3",), LLAMA, SILU | {"use_sliding_window": False}, _read_llama, _write_llama),
    "qwen2moe": Architecture(
        ("qwen2_moe",), QWEN_MOE, ALL_EXPERTS | {"norm_topk_prob": False}, _read_qwen_moe, _write_llama
    ),
    "qwen3moe": Architecture(
        ("qwen3_moe",),
        QWEN_MOE,
        ALL_EXPERTS | {"norm_topk_prob": True, "attention_bias": False},
        _read_qwen_moe,
        _write_llama,
    ),
    "gemma": Architecture(
        ("gemma",),
        LLAMA,
        {"hidden_act": "gelu_pytorch_tanh", "attention_bias": False},
        _read_llama,
        _write_llama,
        norm_offset=True,
    ),
    "gemma3": Architecture(("gemma3_text",), GEMMA3, GEMMA_IMPLIED, _read_gemma3, _write_gemma3, norm_offset=True),
    "phi3": Architecture(("phi3",), LLAMA, SILU, _read_phi3, _write_phi3, constants=tuple(LONGROPE_FACTORS.values())),
    "starcoder2": Architecture(
        ("starcoder2",),
        STARCODER2,
        {"hidden_act": "gelu_pytorch_tanh", "sliding_window": None},
        _read_starcoder2,
        _write_llama,
    ),
    "stablelm": Architecture(("stablelm",), STABLELM, SILU, _read_stablelm, _write_stablelm, mappings=HEAD_NORMS),
    "olmo": Architecture(("olmo",), OLMO, WITHOUT_BIAS, _read_olmo, _write_olmo, pairs=True),
    "olmo2": Architecture(("olmo2",), LLAMA, WITHOUT_BIAS, _read_llama, _write_llama),
    "gpt-oss": Architecture(("gpt_oss",), GPT_OSS, SILU, _read_gpt_oss, _write_gpt_oss, mappings=GPT_OSS_TENSORS),
    "bert": Architecture(
        ("bert",),
        SIZES | {"attention.layer_norm_epsilon": "layer_norm_eps"},
        {"hidden_act": "gelu", "architectures": ["BertModel"]},
        _read_bert,
        _write_bert,
    ),
    "command-r": Architecture(("cohere",), COHERE, WITHOUT_BIAS, _read_cohere, _write_llama),
    "gemma2": Architecture(("gemma2",), GEMMA2, GEMMA_IMPLIED, _read_gemma2, _write_llama, norm_offset=True),
    "gpt2": Architecture(
        ("gpt2",), GPT2, {"activation_function": "gelu_new"}, _read_gpt2, _write_gpt2, transposed=CONV1D
    ),
    "bloom": BLOOM,
    "falcon": FALCON,
    "mpt": MPT,
    "gptneox": Architecture(("gpt_neox",), NEOX, {"hidden_act": "gelu"}, _read_neox, _write_neox),
}

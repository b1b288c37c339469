# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Architectures of llama.cpp: translate their metadata and tensor names to and from a Hugging Face family.

Sources in llama.cpp: the keys are those of `gguf.constants.Keys`; src/models/*.cpp has the values of absent keys;
conversion/*.py has the changes of tensors. Each entry of ARCHITECTURES names the families whose readers and writers of
config.json complete the translation.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

from mesh_transformer.convert.huggingface.families import FAMILIES, Family
from mesh_transformer.convert.huggingface.tensor_map import TensorMapping
from mesh_transformer.convert.layout_views import parse_pattern
from mesh_transformer.convert.lazy_arrays import LazyArray
from mesh_transformer.storage.errors import CheckpointError

TOKEN_EMBEDDING, OUTPUT, ROPE_FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"
LLAMA3_LOW, LLAMA3_HIGH, LLAMA3_LENGTH = 1.0, 4.0, 8192  # of all published Llama 3.1, 3.2 and 3.3 models
GEMMA2_27B_LAYERS = 46  # llama.cpp recognizes the model with another attention scale by its number of layers

Table = dict[str, Any]
Tensors = Mapping[str, LazyArray]


class Architecture(NamedTuple):
    """An architecture of llama.cpp and the families of transformers whose models it can hold."""

    families: tuple[str, ...]  # model types
    keys: Mapping[str, str]  # metadata key without the architecture's prefix -> key of config.json with the same value
    implied: Mapping[str, Any]  # keys of config.json whose values the architecture determines
    read_more: Callable[["Metadata", Table, Tensors], None]  # adds all other keys of config.json
    write_more: Callable[[Table, Table], None]  # (config.json, metadata): adds all other keys of the metadata
    pairs: bool = False  # whether the rows of query and key heads are interleaved, see tensors.undo_rope_order
    norm_offset: bool = False  # whether llama.cpp's converter adds 1 to the scales of norms
    transposed: tuple[str, ...] = ()  # modules of transformers whose weight is stored transposed


class Metadata:
    """The metadata of a file, with a record of the keys that were read."""

    def __init__(self, values: Mapping[str, Any], where: object):
        """Raise CheckpointError if the architecture is missing or not supported."""
        self.values = values
        self.where = where
        self.name = str(values.get("general.architecture"))
        if self.name not in ARCHITECTURES:
            raise CheckpointError(
                f"{where}: general.architecture = {self.name!r} is not supported; supported: {', '.join(ARCHITECTURES)}"
            )
        self.architecture = ARCHITECTURES[self.name]
        self._read: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a key without the architecture's prefix; if absent, `default`, the value that llama.cpp uses."""
        full = f"{self.name}.{key}"
        self._read.add(full)
        return self.values.get(full, default)

    def require(self, key: str, expected: Any) -> None:
        """Raise CheckpointError unless a key is absent or has the expected value."""
        if (value := self.get(key, expected)) != expected:
            raise CheckpointError(
                f"{self.where}: {self.name}.{key} = {value!r} is not supported; supported: {expected}"
            )

    def check_all_read(self) -> None:
        """Raise CheckpointError with the keys of the architecture that were not read, as they may change the function."""
        unread = [key for key in self.values if key.startswith(f"{self.name}.") and key not in self._read]
        if unread:
            found = ", ".join(f"{key} = {str(self.values[key])[:60]}" for key in unread)
            raise CheckpointError(
                f"{self.where}: metadata keys that are not supported and may change the model's function: {found}; convert the "
                "model's Hugging Face folder instead"
            )


def read_config(values: Mapping[str, Any], tensors: Tensors, where: object) -> Table:
    """Return the config.json of a file from its metadata and tensors. Raise CheckpointError if they are not supported."""
    metadata = Metadata(values, where)
    architecture = metadata.architecture
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
    found = [name for name, architecture in ARCHITECTURES.items() if kind in architecture.families]
    if not found:
        raise CheckpointError(
            f"models of model_type {kind!r} cannot be written as GGUF; supported: "
            + ", ".join(family for architecture in ARCHITECTURES.values() for family in architecture.families)
            + "; export the model with --format huggingface"
        )
    (name,) = found
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
    return FAMILIES[kind]._replace(mappings=known, prefix="", buffers=(), copies=(), needs_copies=False)


@functools.cache
def _name_map(name: str) -> Callable[[str], str | None]:
    (architecture,) = [key for key, value in MODEL_ARCH_NAMES.items() if value == name]
    return get_tensor_name_map(architecture, 1).get_name


def _rename(mapping: TensorMapping, name: str) -> TensorMapping | None:
    """Return the mapping to the tensor of llama.cpp; None if the architecture does not have this tensor.

    llama.cpp does not interleave the components of a fused projection, and stores the experts of a layer as one tensor.
    """
    module, _, kind = mapping.name.rpartition(".")
    found = _name_map(name)(module.replace(".{e}", "").replace("{i}", "0"))
    if found is None:
        return None
    groups = parse_pattern(mapping.pattern)
    if kind == "weight" and module.endswith(ARCHITECTURES[name].transposed or ("\0",)):
        groups.reverse()
    if "{e}" in mapping.name:
        groups.insert(0, ["expert"])
    ordered = [sorted(group, key=lambda word: not word.isdigit()) for group in groups]
    pattern = " ".join(f"({' '.join(group)})" if len(group) > 1 else group[0] for group in ordered)
    full = f"{found.replace('blk.0.', 'blk.{i}.')}.{kind}"
    return TensorMapping(full, pattern, mapping.component, split=mapping.split)


def llama3_factors(rope: Mapping[str, Any], d_head: int) -> np.ndarray:
    """Return the factors [d_head / 2] by which Llama 3.1 divides the frequencies of its rotary embeddings, float32."""
    frequencies = rope["rope_theta"] ** (-np.arange(0, d_head, 2, dtype=np.float32) / np.float32(d_head))
    low, high, length = (
        rope[key] for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    rotations = length * frequencies / (2 * np.pi)
    smooth = np.clip((rotations - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)


def _read_rope(metadata: Metadata, table: Table, tensors: Tensors, d_head: int) -> None:
    """Set rope_parameters from rope.* and from the tensor with the factors of Llama 3.1."""
    theta = metadata.get("rope.freq_base", 10_000.0)
    rope: Table = {"rope_type": metadata.get("rope.scaling.type", "none")}
    scaling = {
        "factor": metadata.get("rope.scaling.factor", metadata.get("rope.scale_linear")),
        "original_max_position_embeddings": metadata.get("rope.scaling.original_context_length"),
        "attention_factor": metadata.get("rope.scaling.yarn_attn_factor"),
        "beta_fast": metadata.get("rope.scaling.yarn_beta_fast"),
        "beta_slow": metadata.get("rope.scaling.yarn_beta_slow"),
    }
    metadata.get("rope.scaling.finetuned")
    if rope["rope_type"] not in ("none", "linear", "yarn"):
        raise CheckpointError(
            f"{metadata.where}: {metadata.name}.rope.scaling.type = {rope['rope_type']!r} is not supported; supported: "
            "'none', 'linear', 'yarn'"
        )
    if rope["rope_type"] == "none":
        rope["rope_type"] = "linear" if scaling["factor"] not in (None, 1.0) else "default"
    if rope["rope_type"] != "default":
        wanted = ("factor",) if rope["rope_type"] == "linear" else tuple(scaling)
        rope |= {key: scaling[key] for key in wanted if scaling[key] is not None}
    if ROPE_FACTORS in tensors:
        factors = np.asarray(tensors[ROPE_FACTORS].read((slice(0, d_head // 2),)), np.float32)
        rope = {
            "rope_type": "llama3",
            "factor": float(factors.max()),
            "low_freq_factor": LLAMA3_LOW,
            "high_freq_factor": LLAMA3_HIGH,
            "original_max_position_embeddings": LLAMA3_LENGTH,
        }
        if not np.allclose(llama3_factors(rope | {"rope_theta": theta}, d_head), factors, rtol=1e-4):
            raise CheckpointError(
                f"{metadata.where}: the values of {ROPE_FACTORS} are not the factors of Llama 3.1, 3.2 or 3.3, the only ones "
                "that are supported; convert the model's Hugging Face folder instead"
            )
    table["rope_theta"] = theta
    table["rope_parameters"] = rope | {"rope_theta": theta}


def _write_rope(config: Table, values: Table) -> None:
    rope = config.get("rope_parameters") or {}
    values["rope.freq_base"] = float(rope.get("rope_theta") or config["rope_theta"])
    if rope.get("rope_type") in ("linear", "yarn"):
        names = {"rope.scaling.type": "rope_type", "rope.scaling.factor": "factor"}
        if rope["rope_type"] == "yarn":
            names |= {
                "rope.scaling.original_context_length": "original_max_position_embeddings",
                "rope.scaling.yarn_attn_factor": "attention_factor",
                "rope.scaling.yarn_beta_fast": "beta_fast",
                "rope.scaling.yarn_beta_slow": "beta_slow",
            }
        values |= {key: rope[name] for key, name in names.items() if rope.get(name) is not None}


def _read_heads(metadata: Metadata, table: Table) -> int:
    """Set the numbers of heads and their size, and return the size."""
    table.setdefault("num_key_value_heads", table["num_attention_heads"])
    if isinstance(table["num_key_value_heads"], list | tuple):
        raise CheckpointError(
            f"{metadata.where}: {metadata.name}.attention.head_count_kv = {str(table['num_key_value_heads'])[:60]} is not "
            "supported; supported: one number for all layers"
        )
    d_head = table.setdefault("head_dim", table["hidden_size"] // table["num_attention_heads"])
    metadata.require("attention.value_length", d_head)
    return d_head


def _read_llama(metadata: Metadata, table: Table, tensors: Tensors) -> None:
    d_head = _read_heads(metadata, table)
    metadata.require("rope.dimension_count", d_head)
    _read_rope(metadata, table, tensors, d_head)
    if metadata.name == "llama":
        table["attention_bias"] = "blk.0.attn_q.bias" in tensors
        table["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    if n_experts := metadata.get("expert_count", 0):
        table |= {"model_type": "mixtral", "num_local_experts": n_experts}
        table |= {"num_experts_per_tok": metadata.get("expert_used_count"), "sliding_window": None}
        del table["attention_bias"], table["mlp_bias"]


def _write_llama(config: Table, values: Table) -> None:
    _write_rope(config, values)
    values |= {"rope.dimension_count": config["head_dim"], "attention.value_length": config["head_dim"]}
    if config.get("num_local_experts"):
        values |= {"expert_count": config["num_local_experts"], "expert_used_count": config["num_experts_per_tok"]}


def _read_gemma2(metadata: Metadata, table: Table, tensors: Tensors) -> None:
    _read_llama(metadata, table, tensors)
    table.setdefault("sliding_window", 4096)
    is_27b = table["num_hidden_layers"] == GEMMA2_27B_LAYERS
    table["query_pre_attn_scalar"] = (
        table["hidden_size"] // table["num_attention_heads"] if is_27b else table["head_dim"]
    )
    kinds = ("sliding_attention", "full_attention")
    table["layer_types"] = [kinds[i % 2] for i in range(table["num_hidden_layers"])]
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        table.setdefault(key, {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}[key])


def _read_gpt2(metadata: Metadata, table: Table, tensors: Tensors) -> None:
    metadata.require("attention.head_count_kv", table["n_head"])
    table["n_ctx"] = table["n_positions"]


def _write_gpt2(config: Table, values: Table) -> None:
    pass  # Architecture.keys has all keys


def _read_neox(metadata: Metadata, table: Table, tensors: Tensors) -> None:
    d_head = table["hidden_size"] // table["num_attention_heads"]
    fraction = metadata.get("rope.dimension_count", d_head) / d_head
    metadata.require("attention.head_count_kv", table["num_attention_heads"])
    _read_rope(metadata, table, tensors, d_head)
    table |= {"rotary_pct": fraction, "rotary_emb_base": table["rope_theta"]}
    table["rope_parameters"]["partial_rotary_factor"] = fraction


def _write_neox(config: Table, values: Table) -> None:
    _write_rope(config, values)
    d_head = config["hidden_size"] // config["num_attention_heads"]
    values["rope.dimension_count"] = round(config["rotary_pct"] * d_head)


SIZES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
LLAMA = SIZES | {
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
GEMMA2 = LLAMA | {
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
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
CONV1D = ("c_attn", "c_proj", "c_fc")
ARCHITECTURES = {
    "llama": Architecture(("llama", "mistral", "mixtral"), LLAMA, SILU, _read_llama, _write_llama, pairs=True),
    "qwen2": Architecture(("qwen2",), LLAMA, SILU | {"use_sliding_window": False}, _read_llama, _write_llama),
    "qwen3": Architecture(("qwen3",), LLAMA, SILU | {"use_sliding_window": False}, _read_llama, _write_llama),
    "gemma2": Architecture(("gemma2",), GEMMA2, GEMMA_IMPLIED, _read_gemma2, _write_llama, norm_offset=True),
    "gpt2": Architecture(
        ("gpt2",), GPT2, {"activation_function": "gelu_new"}, _read_gpt2, _write_gpt2, transposed=CONV1D
    ),
    "gptneox": Architecture(("gpt_neox",), NEOX, {"hidden_act": "gelu"}, _read_neox, _write_neox),
}

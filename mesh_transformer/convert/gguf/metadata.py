# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Metadata of GGUF files as keys of config.json and back: the parts that several architectures of llama.cpp share.

Sources: the keys are those of `gguf.constants.Keys`; llama.cpp's src/models/*.cpp has the defaults of absent keys.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from mesh_transformer.config import ModelConfig
from mesh_transformer.convert.huggingface.rope_map import longrope_scale
from mesh_transformer.convert.huggingface.tensor_map import TensorMapping
from mesh_transformer.convert.lazy_arrays import LazyArray, full_index
from mesh_transformer.storage.errors import CheckpointError

ROPE_FACTORS = "rope_freqs.weight"
LONGROPE_FACTORS = {"long_factor": "rope_factors_long.weight", "short_factor": "rope_factors_short.weight"}
LLAMA3_LOW, LLAMA3_HIGH, LLAMA3_LENGTH = 1.0, 4.0, 8192  # of all published Llama 3.1, 3.2 and 3.3 models
ROUNDING = 1e-6  # largest relative rounding error of a float32 in the metadata

Table = dict[str, Any]
Tensors = Mapping[str, LazyArray]


class Architecture(NamedTuple):
    """An architecture of llama.cpp and the families of transformers that it can represent."""

    families: tuple[str, ...]  # model types
    keys: Mapping[str, str]  # metadata key without the architecture's prefix -> key of config.json with the same value
    implied: Mapping[str, Any]  # keys of config.json whose values the architecture determines
    read_more: Callable[["Metadata", Table, Tensors], None]  # adds all other keys of config.json
    write_more: Callable[[Table, Table], None]  # (config.json, metadata): adds all other keys of the metadata
    pairs: bool = False  # whether the rows of query and key heads are interleaved, see tensors.undo_rope_order
    norm_offset: bool = False  # whether llama.cpp's converter adds 1 to the scales of norms
    transposed: tuple[str, ...] = ()  # modules of transformers whose weight is stored transposed
    # By native weight: tensors that differ from the tensors of transformers not only in the name
    mappings: Mapping[str, TensorMapping] = {}
    variant: Callable[[ModelConfig], Mapping[str, TensorMapping]] | None = None  # mappings that depend on the model
    constants: tuple[str, ...] = (ROPE_FACTORS,)  # tensors that are part of the configuration


class Metadata:
    """The metadata of a file, with a record of the keys that were read."""

    def __init__(self, values: Mapping[str, Any], where: object):
        self.values = values
        self.where = where
        self.name = str(values.get("general.architecture"))
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
                f"{self.where}: {self.name}.{key} = {json.dumps(value)} is not supported; supported: "
                + json.dumps(expected)
            )

    def check_all_read(self) -> None:
        """Raise CheckpointError with the keys of the architecture that were not read, as they may change the function."""
        unread = [key for key in self.values if key.startswith(f"{self.name}.") and key not in self._read]
        if unread:
            listed = ", ".join(f"{key} = {str(self.values[key])[:60]}" for key in unread)
            raise CheckpointError(
                f"{self.where}: metadata keys that are not supported and may change the model's function: {listed}; convert the "
                "model's Hugging Face folder instead"
            )


def llama3_factors(rope: Mapping[str, Any], d_head: int) -> np.ndarray:
    """Return the factors [d_head / 2] by which Llama 3.1 divides the frequencies of its rotary embeddings, float32."""
    frequencies = rope["rope_theta"] ** (-np.arange(0, d_head, 2, dtype=np.float32) / np.float32(d_head))
    low, high, length = (
        rope[key] for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    rotations = length * frequencies / (2 * np.pi)
    smooth = np.clip((rotations - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)


def read_rope(metadata: Metadata, table: Table, tensors: Tensors, d_head: int) -> None:
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
    metadata.get("rope.scaling.finetuned")  # read and ignored: it does not change the function
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


def read_longrope(metadata: Metadata, table: Table, tensors: Tensors) -> None:
    """Set rope_parameters of Phi 3 from rope.* and from the tensors with the factors of LongRoPE."""
    trained_len = metadata.get("rope.scaling.original_context_length", table["max_position_embeddings"])
    scale = metadata.get("rope.scaling.attn_factor")
    rope: Table = {"rope_type": "default"}
    if factors := {key: tensors[name] for key, name in LONGROPE_FACTORS.items() if name in tensors}:
        rope = {"rope_type": "longrope", "original_max_position_embeddings": trained_len}
        rope |= {key: _exact(array.read(full_index(array))) for key, array in factors.items()}
        default = longrope_scale(table["max_position_embeddings"] / trained_len, trained_len)
        if scale is not None and abs(scale - default) > ROUNDING * default:
            rope["attention_factor"] = scale
    table["original_max_position_embeddings"] = trained_len
    table["rope_theta"] = metadata.get("rope.freq_base", 10_000.0)
    table["rope_parameters"] = rope | {"rope_theta": table["rope_theta"]}


def _exact(values: np.ndarray) -> list[float]:
    """Return the shortest decimals that round to these float32 values."""
    return [float(str(value)) for value in values.astype(np.float32)]


def write_longrope(config: Table, values: Table) -> None:
    """Add the entries for the rope_parameters of Phi 3, without the factors of LongRoPE (see `constant_tensors`)."""
    rope = config["rope_parameters"]
    values["rope.freq_base"] = float(rope["rope_theta"])
    values["rope.scaling.original_context_length"] = config["original_max_position_embeddings"]
    if rope["rope_type"] == "longrope":
        trained_len = rope["original_max_position_embeddings"]
        default = longrope_scale(config["max_position_embeddings"] / trained_len, trained_len)
        values["rope.scaling.attn_factor"] = float(rope.get("attention_factor") or default)


def constant_tensors(config: Mapping[str, Any], d_head: int) -> dict[str, np.ndarray]:
    """Return the tensors, float32, that llama.cpp has for the rope_parameters of a config.json."""
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type") == "llama3":
        return {ROPE_FACTORS: llama3_factors(rope, d_head)}
    if rope.get("rope_type") == "longrope":
        return {name: np.asarray(rope[key], np.float32) for key, name in LONGROPE_FACTORS.items()}
    return {}


def write_rope(config: Table, values: Table) -> None:
    """Add the entries for rope_parameters, without the factors of Llama 3.1 (see `constant_tensors`)."""
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


def read_heads(metadata: Metadata, table: Table) -> int:
    """Set the numbers of heads and the size of a head in `table`, and return this size."""
    table.setdefault("num_key_value_heads", table["num_attention_heads"])
    if isinstance(table["num_key_value_heads"], list | tuple):
        raise CheckpointError(
            f"{metadata.where}: {metadata.name}.attention.head_count_kv = {str(table['num_key_value_heads'])[:60]} is not "
            "supported; supported: one number for all layers"
        )
    d_head = table.setdefault("head_dim", table["hidden_size"] // table["num_attention_heads"])
    metadata.require("attention.value_length", d_head)
    return d_head

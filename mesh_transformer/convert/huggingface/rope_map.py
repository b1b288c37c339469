# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Translate the rope parameters of config.json to `[model.rope_scaling]` and back, by their type in transformers."""

import json
import math
from collections.abc import Mapping
from typing import Any

from mesh_transformer.config import ModelConfig
from mesh_transformer.config.rope import FIELDS
from mesh_transformer.convert.huggingface.hf_config import HFConfig
from mesh_transformer.storage.errors import CheckpointError

TRAINED_LEN_KEY = "original_max_position_embeddings"
# native name -> name in config.json, where they differ
EXTERNAL = {"original_seq_len": TRAINED_LEN_KEY}


def read_rope(s: HFConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the rope parameters as transformers completes them, and the native fields that represent them."""
    rope = s.rope_parameters()
    return rope, {"rope_theta": float(rope["rope_theta"])} | read_scaling(s, rope)


def read_scaling(s: HFConfig, rope: Mapping[str, Any]) -> dict[str, Any]:
    """Return the field rope_scaling for completed rope parameters; an empty dictionary without scaling."""
    kind = rope["rope_type"]
    if kind == "default":
        return {}
    if kind not in FIELDS:
        raise CheckpointError(
            f'{s.where}: rotary embeddings of type {json.dumps(kind)} are not supported; supported: "default", '
            + ", ".join(map(json.dumps, FIELDS))
        )
    values: dict[str, Any] = {"factor": rope.get("factor"), "attention_factor": rope.get("attention_factor")} | dict(
        rope
    )
    if kind == "dynamic":
        values[TRAINED_LEN_KEY] = s["max_position_embeddings"]
    # For yarn, transformers requires the key factor, but accepts null.
    if kind == "longrope" or (kind == "yarn" and "factor" in rope):
        values["factor"] = values["factor"] or s["max_position_embeddings"] / values[TRAINED_LEN_KEY]
    if kind == "longrope" and values["attention_factor"] is None:
        values["attention_factor"] = longrope_scale(values["factor"], values[TRAINED_LEN_KEY])
    required, optional = FIELDS[kind]
    found = {name: values.get(EXTERNAL.get(name, name)) for name in (*required, *optional)}
    if missing := [EXTERNAL.get(name, name) for name in required if found[name] is None]:
        raise CheckpointError(
            f"{s.where}: rotary embeddings of type {json.dumps(kind)} need {', '.join(missing)} in rope_parameters"
        )
    return {"rope_scaling": {"type": kind} | {name: _plain(name, x) for name, x in found.items() if x is not None}}


def longrope_scale(factor: float, trained_len: int) -> float:
    """Return the default attention factor of LongRoPE (arXiv 2402.13753) for a context extended by `factor`."""
    return 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(trained_len))


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, list):
        return [float(x) for x in value]
    return value if isinstance(value, bool) else int(value) if name == "original_seq_len" else float(value)


def write_rope(c: ModelConfig) -> dict[str, Any]:
    """Return the rope parameters under the keys of transformers 4 (rope_scaling) and of transformers 5 (rope_parameters)."""
    scaling = write_scaling(c)
    table: dict[str, Any] = {"rope_theta": c.rope_theta, "rope_parameters": scaling | {"rope_theta": c.rope_theta}}
    return table if c.rope_scaling is None else table | {"rope_scaling": scaling}


def write_partial_rope(c: ModelConfig) -> dict[str, Any]:
    """Return the rope parameters with partial_rotary_factor, the rotated fraction of each head."""
    fraction = {"partial_rotary_factor": c.rope_dim / c.head_dim}
    table = write_rope(c)
    nested = {key: table[key] | fraction for key in ("rope_parameters", "rope_scaling") if key in table}
    return table | nested | fraction


def write_scaling(c: ModelConfig) -> dict[str, Any]:
    """Return the rope parameters without rope_theta."""
    scaling = c.rope_scaling
    if scaling is None:
        return {"rope_type": "default"}
    required, optional = FIELDS[scaling.type]
    found = {name: getattr(scaling, name) for name in (*required, *optional)}
    found = {name: list(x) if isinstance(x, tuple) else x for name, x in found.items() if x is not None}
    if scaling.type == "dynamic":
        del found["original_seq_len"]  # transformers reads max_position_embeddings instead
    return {"rope_type": scaling.type} | {EXTERNAL.get(name, name): value for name, value in found.items()}

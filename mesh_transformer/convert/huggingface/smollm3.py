# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""SmolLM 3: config.json. Its tensors are those of Llama."""

from typing import Any

from mesh_transformer.config import ModelConfig
from mesh_transformer.config.layers import shortest_pattern
from mesh_transformer.convert.huggingface.config_map import read_layer_types, read_llama, write_layer_types, write_llama
from mesh_transformer.convert.huggingface.hf_config import HFConfig
from mesh_transformer.storage.errors import CheckpointError


def read_config(s: HFConfig) -> dict[str, Any]:
    """Return the [model] section for a SmolLM3Config: some layers do not rotate queries and keys."""
    model = read_llama(s)
    n_layers, interval = model["n_layers"], s["no_rope_layer_interval"]
    rotates = s.get("no_rope_layers", default=[int((i + 1) % interval != 0) for i in range(n_layers)])
    if len(rotates) < n_layers:
        raise CheckpointError(
            f"{s.where}: no_rope_layers has {len(rotates)} elements, but needs one for each of {n_layers} layers"
        )
    rope_pattern = shortest_pattern([bool(x) for x in rotates[:n_layers]])
    window = s["sliding_window"] if s["use_sliding_window"] else None
    s.was_read.add("sliding_window")  # this key has no effect without use_sliding_window
    types = ["full_attention" if x or window is None else "sliding_attention" for x in rotates[:n_layers]]
    pattern = read_layer_types(s, s.get("layer_types", default=types), n_layers)
    model |= dict(rope_pattern=list(rope_pattern))
    if "local" not in pattern:
        return model
    if window is None:
        raise CheckpointError(
            f"{s.where}: layer_types has sliding_attention, but sliding_window is not in use; set sliding_window and "
            "use_sliding_window"
        )
    return model | dict(attention_pattern=pattern, attention_window=window)


def write_config(c: ModelConfig) -> dict[str, Any]:
    """Return the keys of a SmolLM3Config."""
    table = {key: value for key, value in write_llama(c).items() if key != "max_window_layers"}
    is_local = "local" in c.attention_pattern
    return table | dict(
        no_rope_layers=[int(rotates) for rotates in (c.rope_pattern * c.n_layers)[: c.n_layers]],
        layer_types=write_layer_types(c),
        use_sliding_window=is_local,
        sliding_window=c.attention_window if is_local else None,
    )

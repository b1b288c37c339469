# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Load of each expert during a run, as numbers and as one heat map per logged layer."""

from collections.abc import Mapping, Sequence
from typing import Any

from mesh_transformer.reports.svg import drawable, heat_map

LAYER_NAMES = {  # number of layers that metrics_table.representative_layers returns -> suffixes of the plots' titles
    1: ("",),
    2: (", first layer", ", last layer"),
    3: (", first layer", ", second layer", ", last layer"),
    4: (", first layer", ", at a third", ", at two thirds", ", last layer"),
}


def read_loads(train: Sequence[Mapping[str, Any]]) -> list[list[list[float | None]]]:
    """Return the load [layer][expert][step] as a multiple of an even load; an empty list for a model without experts."""
    logged = [[_items(layer) for layer in _items(line.get("expert_load"))] for line in train]
    n_layers = max(map(len, logged), default=0)
    n_experts = [max(len(layers[i]) for layers in logged if i < len(layers)) for i in range(n_layers)]

    def load(layers: list[list], layer: int, expert: int) -> float | None:
        return drawable(layers[layer][expert]) if layer < len(layers) and expert < len(layers[layer]) else None

    return [
        [[load(layers, i, e) for layers in logged] for e in range(count)] for i, count in enumerate(n_experts) if count
    ]


def draw_loads(train: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a heat map per layer. Layers are separate because expert i of one layer is unrelated to expert i of another."""
    loads = read_loads(train)
    steps = [line["step"] for line in train]
    names = LAYER_NAMES.get(len(loads), ())
    return [
        heat_map(f"Expert load{name}", "multiples of an even load, by expert and step", steps, layer, row_name="expert")
        for name, layer in zip(names, loads, strict=False)
    ]


def _items(value: Any) -> list:
    return value if isinstance(value, list) else []

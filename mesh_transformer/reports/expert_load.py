# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""How full each expert was over a run, from its metrics: the numbers, and a picture of each layer told of."""

from collections.abc import Mapping, Sequence
from typing import Any

from mesh_transformer.reports.svg import drawable, heat_map

LAYER_NAMES = {  # as many as metrics.pick_layers gives
    1: ("",),
    2: (", first layer", ", last layer"),
    3: (", first layer", ", second layer", ", last layer"),
    4: (", first layer", ", at a third", ", at two thirds", ", last layer"),
}


def read_loads(train: Sequence[Mapping[str, Any]]) -> list[list[list[float | None]]]:
    """Of each layer told of, and each expert, at each step, as a multiple of an even load; none without experts."""
    told = [[_items(layer) for layer in _items(line.get("expert_load"))] for line in train]
    n_layers = max(map(len, told), default=0)
    sizes = [max(len(layers[i]) for layers in told if i < len(layers)) for i in range(n_layers)]

    def load(layers: list[list], layer: int, expert: int) -> float | None:
        return drawable(layers[layer][expert]) if layer < len(layers) and expert < len(layers[layer]) else None

    return [[[load(layers, i, e) for layers in told] for e in range(size)] for i, size in enumerate(sizes) if size]


def draw_loads(train: Sequence[Mapping[str, Any]]) -> list[str]:
    """A picture for each layer told of: experts of different layers have nothing in common but their number."""
    loads, steps = read_loads(train), [line["step"] for line in train]
    unit = "multiples of an even one, by expert and step"
    names = LAYER_NAMES.get(len(loads), ())
    return [
        heat_map(f"Load of experts{name}", unit, steps, layer, row_name="expert")
        for name, layer in zip(names, loads, strict=False)
    ]


def _items(value: Any) -> list:
    return value if isinstance(value, list) else []

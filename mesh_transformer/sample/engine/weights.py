# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Weights as decoding reads them: every layer an array of its own, in the type and the place in which it is used.

Slicing stacked weights would copy them, which doubles the traffic or worse. Weights wider than the activations are cast
once, here; narrower ones stay as they are and are widened where they are used (model/quantization.py).
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from mesh_transformer.config import ModelConfig
from mesh_transformer.mesh import MeshLayout, target_platform
from mesh_transformer.model.params import STACK
from mesh_transformer.model.quantization import Quantized, quantize
from mesh_transformer.model.transformer import describe_params

WIDEN_LATE = {
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    "xla_disable_hlo_passes": "while-loop-invariant-code-motion,while-loop-expensive-invariant-code-motion",
}


def prepare_weights(params: Mapping[str, Mapping[str, Any]], config: ModelConfig, layout: MeshLayout | None, weights: str) -> Any:
    """`params` with every layer by itself, its arrays in tuples, on `layout`'s devices; `weights` as in ServeConfig.

    Of shapes (jax.ShapeDtypeStruct) instead of arrays it makes shapes, with their places.
    """
    described = describe_params(config)

    def place(array: Any, axes: tuple[str, ...], name: str) -> Any:
        sharding = layout and layout.sharding(axes, array.shape, name)
        if isinstance(array, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
        return array if sharding is None else jax.device_put(array, sharding)

    def apply(function: Callable[[Any], Any], array: Any) -> Any:
        return jax.eval_shape(function, array) if isinstance(array, jax.ShapeDtypeStruct) else function(array)

    def shape_one(array: Any, axes: tuple[str, ...], name: str) -> Any:
        contracted = contracted_dims(name, axes)
        if not contracted:
            return place(array, axes, name)
        if weights == "int8":
            small = apply(jax.jit(partial(quantize, contracted=contracted)), array)
            scale_axes = tuple("replicated" if dim in contracted else axis for dim, axis in enumerate(axes))
            return Quantized(place(small.values, axes, name), place(small.scale, scale_axes, name))
        widest = jnp.dtype(config.dtype if weights == "saved" else weights)
        narrowed = apply(lambda x: x.astype(widest), array) if widest.itemsize < array.dtype.itemsize else array
        return place(narrowed, axes, name)

    def shape_layers(array: Any, axes: tuple[str, ...], name: str) -> Any:
        if axes[:1] != (STACK,):
            return shape_one(array, axes, name)
        layers = [shape_one(layer, axes[1:], name) for layer in apply(tuple, array)]
        return jax.tree.map(lambda *parts: parts, *layers)

    return {
        module: {name: shape_layers(a, described[module][name].axes, f"{module}/{name}") for name, a in arrays.items()}
        for module, arrays in params.items()
    }


def contracted_dims(name: str, axes: tuple[str, ...]) -> tuple[int, ...]:
    """The dimensions of a weight over which products add up; none for what is no factor of a product, such as a norm's scale."""
    short = name.rpartition("/")[2]
    if not short.startswith("w_") or short in ("w_positions", "w_router"):  # which expert is chosen stays as trained
        return ()
    if short == "w_tokens" or axes[0] == "expert":
        return (1,)
    return (0,) if axes[0] == "embed" else tuple(range(len(axes) - 1))


def choose_compiler_options(weights: Any, config: ModelConfig) -> dict[str, str] | None:
    """On a CPU weights narrower than the activations are widened one by one, where they are used.

    Otherwise XLA widens all of them first, before a burst's loop as well: in three times the memory.
    """
    widest = max(jnp.dtype(config.dtype).itemsize, 4)
    has_narrow = any(leaf.dtype.itemsize < widest for leaf in jax.tree.leaves(weights) if leaf.ndim > 1)
    return WIDEN_LATE if has_narrow and target_platform() == "cpu" else None


def unstack_layers(stacked: Any) -> Any:
    """Every array [L, ...] as a tuple of its layers."""
    return jax.tree.map(lambda x: tuple(x[i] for i in range(x.shape[0])), stacked)


def stack_layers(split: Any) -> Any:
    """Tuples of arrays stacked again, which costs nothing: XLA takes a slice of a concatenation from its operand."""
    is_split = lambda x: type(x) is tuple and bool(x) and isinstance(x[0], jax.Array)  # noqa: E731
    return jax.tree.map(lambda x: jnp.stack(x) if is_split(x) else x, split, is_leaf=is_split)

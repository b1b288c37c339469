# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Weights for decoding: a separate array for every layer, with the data type and sharding in which it is used.

Slicing stacked weights would copy them, which at least doubles the memory traffic. Weights with more bytes per element than
the activations are cast once, here. Weights with fewer bytes are dequantized where they are used (model/quantization.py).
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
from mesh_transformer.model.shapes import describe_params

# XLA options that keep the conversion of weights inside the decode loop.
CPU_CONVERT_LATE = {
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    "xla_disable_hlo_passes": "while-loop-invariant-code-motion,while-loop-expensive-invariant-code-motion",
}


def prepare_weights(
    params: Mapping[str, Mapping[str, Any]], config: ModelConfig, layout: MeshLayout | None, weight_dtype: str
) -> Any:
    """Return `params` with each stacked array as a tuple of its layers, on the devices of `layout`.

    For `weight_dtype` see ServeConfig. For shapes (jax.ShapeDtypeStruct) instead of arrays, return shapes with shardings.
    """
    described = describe_params(config)

    def put(array: Any, axes: tuple[str, ...], name: str) -> Any:
        sharding = layout and layout.sharding(axes, array.shape, name)
        if isinstance(array, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
        return array if sharding is None else jax.device_put(array, sharding)

    def apply(function: Callable[[Any], Any], array: Any) -> Any:
        return jax.eval_shape(function, array) if isinstance(array, jax.ShapeDtypeStruct) else function(array)

    def prepare(array: Any, axes: tuple[str, ...], name: str) -> Any:
        contracted = contracted_dims(name, axes)
        if not contracted:
            return put(array, axes, name)
        if weight_dtype == "int8":
            quantized = apply(jax.jit(partial(quantize, contracted_dims=contracted)), array)
            scale_axes = tuple("replicated" if dim in contracted else axis for dim, axis in enumerate(axes))
            return Quantized(put(quantized.values, axes, name), put(quantized.scale, scale_axes, name))
        dtype = jnp.dtype(config.dtype if weight_dtype == "saved" else weight_dtype)
        cast = apply(lambda x: x.astype(dtype), array) if dtype.itemsize < array.dtype.itemsize else array
        return put(cast, axes, name)

    def prepare_stack(array: Any, axes: tuple[str, ...], name: str) -> Any:
        if axes[:1] != (STACK,):
            return prepare(array, axes, name)
        layers = [prepare(layer, axes[1:], name) for layer in apply(tuple, array)]
        return jax.tree.map(lambda *arrays: arrays, *layers)

    return {
        module: {name: prepare_stack(a, described[module][name].axes, f"{module}/{name}") for name, a in arrays.items()}
        for module, arrays in params.items()
    }


def contracted_dims(name: str, axes: tuple[str, ...]) -> tuple[int, ...]:
    """Return the dimensions of a weight that its matmul contracts; () for other parameters, such as a norm's scale.

    The router weight is excluded, because routing requires the trained precision.
    """
    leaf = name.rpartition("/")[2]
    if not leaf.startswith("w_") or leaf in ("w_positions", "w_token_types", "w_router"):
        return ()
    if leaf == "w_tokens" or axes[0] == "expert":
        return (1,)
    return (0,) if axes[0] in ("embed", "latent") else tuple(range(len(axes) - 1))


def choose_compiler_options(weights: Any, config: ModelConfig) -> dict[str, str] | None:
    """Return XLA options for a CPU if a matrix has fewer bytes per element than 4 or than activations; otherwise None.

    By default XLA converts all weights at once, outside the decode loop, which needs three times the memory.
    """
    itemsize = max(jnp.dtype(config.dtype).itemsize, 4)
    must_convert = any(leaf.dtype.itemsize < itemsize for leaf in jax.tree.leaves(weights) if leaf.ndim > 1)
    return CPU_CONVERT_LATE if must_convert and target_platform() == "cpu" else None


def unstack_layers(stacked: Any) -> Any:
    """Return a tree with each array [L, ...] as a tuple of its layers."""
    return jax.tree.map(lambda x: tuple(x[i] for i in range(x.shape[0])), stacked)


def stack_layers(unstacked: Any) -> Any:
    """Return a tree with each tuple of layers as one array [L, ...], the inverse of unstack_layers.

    Under jit nothing is copied: XLA reads a slice of a concatenation from the operand.
    """

    def is_stack(x: Any) -> bool:
        return type(x) is tuple and bool(x) and isinstance(x[0], jax.Array)

    return jax.tree.map(lambda x: jnp.stack(x) if is_stack(x) else x, unstacked, is_leaf=is_stack)

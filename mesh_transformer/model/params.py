# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Every learned array is made by `param`, whose keywords name its dimensions; everything about layout derives from them."""

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
from jaxtyping import Array

from mesh_transformer.config import ModelConfig
from mesh_transformer.mesh import use_layout

Params = dict[str, dict[str, Array]]
STACK = "layers"  # name of the layer scan, and of the leading axis of what is in it


class ParamInfo(NamedTuple):
    """What is known of a learned array before it exists."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]  # logical axis of each dimension


class Inits(NamedTuple):
    """How weights start; all deviations are absolute, so they do not depend on how an array is stacked or cut."""

    embedding: hk.initializers.Initializer
    position: hk.initializers.Initializer
    input: hk.initializers.Initializer  # weights that read the residual stream
    output: hk.initializers.Initializer  # weights that write to it
    query: hk.initializers.Initializer  # as inner, of queries
    attn_output: hk.initializers.Initializer  # as residual, of attention


def make_inits(config: ModelConfig) -> Inits:
    """Initialisers by name: GPT-2 paper section 2.3; mesh-transformer-jax layers.py; GPT-NeoX small_init and wang_init;
    T5's in mesh_tensorflow, by fan-in, with queries that make up for scores that are not scaled.
    """
    d, layers, scale = config.d_model, config.n_layers, config.init_scale**0.5

    def normal(deviation: float) -> hk.initializers.Initializer:
        return hk.initializers.RandomNormal(deviation * scale)

    def truncated(deviation: float) -> hk.initializers.Initializer:
        return hk.initializers.TruncatedNormal(deviation * scale)

    match config.init:
        case "gpt2":
            embedding, position, inner, residual = 0.02, 0.01, 0.02, 0.02 / (2 * layers) ** 0.5
            found = (normal(embedding), normal(position), normal(inner), normal(residual))
        case "gptj":
            inner = truncated(d**-0.5)
            found = (truncated(config.n_vocab**-0.5), normal(0.02), inner, truncated(2 / layers / d**0.5))
        case "neox":
            small = normal((2 / (5 * d)) ** 0.5)
            found = (small, small, small, normal(2 / layers / d**0.5))
        case "t5":  # the embedding has variance 1 whatever the scale
            one, mixed = hk.initializers.RandomNormal(1.0), truncated((config.n_heads * config.head_dim) ** -0.5)
            inner, query = truncated(d**-0.5), truncated((d * config.head_dim) ** -0.5)
            return Inits(one, one, inner, truncated(config.ff_dim**-0.5), query, mixed)
    return Inits(*found, query=found[2], attn_output=found[3])


_record: ContextVar[dict[str, tuple[str, ...]] | None] = ContextVar("record", default=None)


def param(name: str, init: hk.initializers.Initializer, **axes: int) -> Any:
    """A float32 learned array of the current module; keywords are its logical axes, values their sizes.

    While sampling it may be narrower, or Quantized, where it is a factor of a product.
    """
    record = _record.get()
    if record is not None:
        record[f"{hk.experimental.current_name()}/{name}"] = tuple(axes)
    return hk.get_parameter(name, tuple(axes.values()), jnp.float32, init=init)


def describe(init: Callable[[Array], Params]) -> dict[str, dict[str, ParamInfo]]:
    """Shape and axes of every learned array that `init(key)` would make, by abstract evaluation: nothing is allocated.

    Inside the layer scan Haiku knows only the path below it, and one layer's shape; the scan's path and the leading
    "layers" axis are joined on here.
    """
    record: dict[str, tuple[str, ...]] = {}
    token = _record.set(record)
    try:
        with use_layout(None):  # a description, also while a program for some mesh is traced
            shapes = jax.eval_shape(init, jax.random.key(0))
    finally:
        _record.reset(token)
    described: dict[str, dict[str, ParamInfo]] = {}
    for module, arrays in shapes.items():
        stack, _, inner = module.partition(f"/{STACK}/")
        for name, array in arrays.items():
            axes = (STACK, *record[f"{inner}/{name}"]) if inner else record[f"{stack}/{name}"]
            assert len(axes) == len(array.shape), f"{module}/{name}: axes {axes} for shape {array.shape}"
            described.setdefault(module, {})[name] = ParamInfo(array.shape, axes)
    return described


def flatten_names(tree: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """{module: {name: x}} -> {"module/name": x}, in the tree's order."""
    return {f"{module}/{name}": leaf for module, leaves in tree.items() for name, leaf in leaves.items()}

# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Parameters: `param` creates a parameter and names the logical axes of its dimensions, which determine its sharding."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
from jaxtyping import Array

from mesh_transformer.config import ModelConfig
from mesh_transformer.mesh import use_layout

Params = dict[str, dict[str, Array]]
STACK = "layers"  # logical axis of the leading dimension of parameters in a layer scan
SCANS = ("first_layers", "layers")  # names of layer scans


class ParamInfo(NamedTuple):
    """Shape and logical axes of a parameter."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]  # one per dimension


class Inits(NamedTuple):
    """Weight initializers by role. Their standard deviations do not depend on stacking or sharding."""

    embedding: hk.initializers.Initializer
    position: hk.initializers.Initializer
    input: hk.initializers.Initializer  # weights that read from the residual stream
    output: hk.initializers.Initializer  # weights that write to the residual stream
    query: hk.initializers.Initializer  # like `input`, for queries
    attn_output: hk.initializers.Initializer  # like `output`, for attention


def make_inits(config: ModelConfig) -> Inits:
    """Return the initializers of `config.init`.

    "gpt2": GPT-2 paper, section 2.3. "gptj": mesh-transformer-jax, layers.py. "neox": GPT-NeoX, small_init and wang_init.
    "t5": mesh_tensorflow, by fan-in, with smaller query weights because attention scores are not scaled. "bert": standard
    deviation 0.02, truncated at two deviations (BERT's code, modeling.py; the paper does not state it).
    """
    d = config.d_model
    layers = config.n_layers
    factor = config.init_scale**0.5

    def normal(stddev: float) -> hk.initializers.Initializer:
        return hk.initializers.RandomNormal(stddev * factor)

    def truncated(stddev: float) -> hk.initializers.Initializer:
        return hk.initializers.TruncatedNormal(stddev * factor)

    match config.init:
        case "gpt2":
            embedding = normal(0.02)
            position = normal(0.01)
            inputs = normal(0.02)
            output = normal(0.02 / (2 * layers) ** 0.5)
        case "gptj":
            embedding = truncated(config.n_vocab**-0.5)
            position = normal(0.02)
            inputs = truncated(d**-0.5)
            output = truncated(2 / layers / d**0.5)
        case "neox":
            embedding = position = inputs = normal((2 / (5 * d)) ** 0.5)
            output = normal(2 / layers / d**0.5)
        case "bert":
            embedding = position = inputs = output = truncated(0.02)
        case "t5":
            embedding = position = hk.initializers.RandomNormal(1.0)  # not scaled by init_scale
            inputs = truncated(d**-0.5)
            output = truncated(config.ff_dim**-0.5)
            query = truncated((d * config.head_dim) ** -0.5)
            attn_output = truncated((config.n_heads * config.head_dim) ** -0.5)
            return Inits(embedding, position, inputs, output, query, attn_output)
    return Inits(embedding, position, inputs, output, query=inputs, attn_output=output)


class Recorder:
    """Shapes and axes of the parameters that a model creates, recorded by `param` during `describe`."""

    def __init__(self) -> None:
        self.infos: dict[str, dict[str, ParamInfo]] = {}
        self.n_repeats: int | None = None  # size of the leading axis inside a layer scan

    def add(self, module: str, name: str, axes: Mapping[str, int]) -> None:
        """Record a parameter of one layer, or a parameter outside the layers."""
        scan = {} if self.n_repeats is None else {STACK: self.n_repeats}
        sizes = (*scan.values(), *axes.values())
        self.infos.setdefault(module, {})[name] = ParamInfo(sizes, (*scan, *axes))


_recorder: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


def param(name: str, init: hk.initializers.Initializer, **axes: int) -> Any:
    """Return a float32 parameter of the current module; the keywords are its logical axes, the values their sizes.

    During sampling, a parameter that only matmuls use may have a smaller dtype or be `Quantized`.
    """
    if (recorder := _recorder.get()) is not None:
        recorder.add(hk.experimental.current_name(), name, axes)
    return hk.get_parameter(name, tuple(axes.values()), jnp.float32, init=init)


def describe(init: Callable[[Array], Params]) -> dict[str, dict[str, ParamInfo]]:
    """Return the shape and axes of every parameter that `init(key)` would create, without allocating arrays.

    Modules and names are sorted. `init` is only traced. A layer scan is traced once, outside of Haiku's scan, by
    `describe_repeat`: Haiku would trace it three times.
    """
    recorder = Recorder()
    token = _recorder.set(recorder)
    try:
        with use_layout(None):  # the caller may be tracing a program for a mesh
            jax.eval_shape(init, jax.random.key(0))
    finally:
        _recorder.reset(token)
    return {module: dict(sorted(infos.items())) for module, infos in sorted(recorder.infos.items())}


def describing() -> bool:
    """Return whether the model is traced by `describe`."""
    return _recorder.get() is not None


@contextlib.contextmanager
def describe_repeat(scan: str, n_repeats: int) -> Iterator[None]:
    """Record parameters as parameters of one repetition of the layer scan named `scan`, which has `n_repeats` repetitions."""
    recorder = _recorder.get()
    assert recorder is not None, "describe_repeat may be used only while `describe` traces the model"
    recorder.n_repeats = n_repeats
    with hk.name_scope(scan):
        yield
    recorder.n_repeats = None


def split_scan(module: str) -> tuple[str, str, str]:
    """Split a module's path into the path above its layer scan, the name of the scan, and the path below it.

    "transformer/layers/block_0/norm_1" -> ("transformer", "layers", "block_0/norm_1"). The last two are empty for a module
    outside a layer scan.
    """
    for scan in SCANS:
        before, separator, inner = module.partition(f"/{scan}/")
        if separator:
            return before, scan, inner
    return module, "", ""


def flatten_names(tree: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return {"module/name": x} for {module: {name: x}}, in the order of the tree."""
    return {f"{module}/{name}": leaf for module, leaves in tree.items() for name, leaf in leaves.items()}

# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The state of a run: everything a checkpoint holds, and where each array of it lies on a mesh."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import PRNGKeyArray

from mesh_transformer.config import Config
from mesh_transformer.mesh import MeshLayout, format_sharding_table
from mesh_transformer.model.transformer import make_model
from mesh_transformer.model.shapes import describe_params
from mesh_transformer.train.noise_scale import init_noise_scale
from mesh_transformer.train.optimizer import make_optimizer, optimizer_state_axes

GUARD_WINDOW = 64  # accepted steps whose medians a spike is measured against


# Fields are Any: the same records hold arrays, their shapes, their shardings or their logical axes.
@flax.struct.dataclass
class SkipGuard:
    """Counters of skipped steps, and losses and gradient norms of accepted ones only."""

    skipped: Any  # int32 []
    in_a_row: Any  # int32 []
    accepted: Any  # int32 []
    losses: Any  # float32 [W], a ring whose next place is accepted % W
    grad_norms: Any  # float32 [W]


@flax.struct.dataclass
class TrainState:
    """A run between two steps. The seed and `step` give the dropout key and the batch, so neither is stored."""

    step: Any  # int32 []
    params: Any  # Params, float32
    opt_state: Any  # optax.OptState
    guard: SkipGuard
    noise: Any  # NoiseScaleState, or None where it is not tracked


def param_axes(config: Config) -> dict[str, dict[str, tuple[str, ...]]]:
    """Logical axes of every parameter, in the parameters' own structure."""
    return {
        module: {name: info.axes for name, info in arrays.items()}
        for module, arrays in describe_params(config.model).items()
    }


def make_run_optimizer(config: Config) -> optax.GradientTransformation:
    """The optimizer of a run."""
    return make_optimizer(config.optimizer, config.train.steps, param_axes(config))


def make_init_state(config: Config) -> Callable[[PRNGKeyArray], TrainState]:
    """`init(key) -> State` at step 0; jit it with `shardings(...)` so that no device ever holds the whole."""
    model, optimizer = make_model(config.model), make_run_optimizer(config)

    def init(key: PRNGKeyArray) -> TrainState:
        params = model.init(key)
        zero = jnp.zeros((), jnp.int32)
        guard = SkipGuard(zero, zero, zero, jnp.zeros(GUARD_WINDOW), jnp.zeros(GUARD_WINDOW))
        noise = init_noise_scale() if config.train.log_grad_noise_scale else None
        return TrainState(zero, params, optimizer.init(params), guard, noise)

    return init


def describe_state(config: Config) -> tuple[TrainState, TrainState]:
    """The state as shapes, and in the same structure the logical axes of each array; nothing is allocated."""
    shapes = jax.eval_shape(make_init_state(config), jax.random.key(0))
    axes = param_axes(config)
    small = lambda tree: jax.tree.map(lambda leaf: ("replicated",) * leaf.ndim, tree)  # noqa: E731
    return shapes, TrainState(
        step=(),
        params=axes,
        opt_state=optimizer_state_axes(shapes.opt_state, shapes.params, axes),
        guard=small(shapes.guard),
        noise=small(shapes.noise),
    )


def flatten_state(tree: Any) -> dict[str, Any]:
    """A state, or a tree of its structure, as named leaves: "params/transformer/layers/block_0/attention/w_q"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_axes)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def unflatten_state(named: Mapping[str, Any], like: Any) -> Any:
    """The tree with `like`'s structure whose leaves are `named`."""
    names = flatten_state(like)
    return jax.tree.unflatten(jax.tree.structure(like), [named[name] for name in names])


def state_shardings(layout: MeshLayout, shapes: TrainState, axes: TrainState) -> TrainState:
    """Where each array of a state lies."""
    flat_shapes, flat_axes = flatten_state(shapes), flatten_state(axes)
    return unflatten_state(
        {name: layout.sharding(flat_axes[name], leaf.shape, name) for name, leaf in flat_shapes.items()}, shapes
    )


def format_parameters(shapes: TrainState, axes: TrainState, layout: MeshLayout) -> str:
    """The table of parameters: shape, logical axes, partition and bytes per device of each."""
    flat_axes = flatten_state(axes.params)
    rows = {
        name: (leaf.shape, flat_axes[name], leaf.dtype.itemsize) for name, leaf in flatten_state(shapes.params).items()
    }
    return format_sharding_table(rows, layout)


def _is_axes(leaf: Any) -> bool:
    return isinstance(leaf, tuple) and not hasattr(leaf, "_fields") and all(isinstance(axis, str) for axis in leaf)

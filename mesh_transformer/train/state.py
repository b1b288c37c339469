# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Training state: the arrays of a checkpoint, with their logical axes and shardings."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import PRNGKeyArray

from mesh_transformer.config import Config
from mesh_transformer.mesh import MeshLayout, format_sharding_table
from mesh_transformer.model.shapes import describe_params
from mesh_transformer.model.transformer import make_model
from mesh_transformer.train.noise_scale import init_noise_scale
from mesh_transformer.train.optimizer import make_optimizer, optimizer_state_axes

GUARD_WINDOW = 64  # accepted steps whose median loss and gradient norm define a spike


# Fields are Any because the same structure holds arrays, shapes, shardings or logical axes. Field names are part of the
# checkpoint format.
@flax.struct.dataclass
class SkipGuard:
    """Counters of skipped steps, and the losses and gradient norms of the last accepted steps."""

    skipped: Any  # int32 []
    in_a_row: Any  # int32 [], consecutive skipped steps
    accepted: Any  # int32 []
    losses: Any  # float32 [W], a ring buffer; the next index is accepted % W
    grad_norms: Any  # float32 [W]


@flax.struct.dataclass
class TrainState:
    """State of a run between two steps. Dropout key and batch are functions of seed and `step`, so they are not stored."""

    step: Any  # int32 []
    params: Any  # Params, float32
    opt_state: Any  # optax.OptState
    guard: SkipGuard
    noise: Any  # NoiseScaleState, or None without train.log_grad_noise_scale


def param_axes(config: Config) -> dict[str, dict[str, tuple[str, ...]]]:
    """Return the logical axes of every parameter, in the structure of the parameters."""
    return {
        module: {name: info.axes for name, info in arrays.items()}
        for module, arrays in describe_params(config.model).items()
    }


def make_run_optimizer(config: Config) -> optax.GradientTransformation:
    """Return the optimizer of a run."""
    return make_optimizer(config.optimizer, config.train.steps, param_axes(config))


def make_init_state(config: Config) -> Callable[[PRNGKeyArray], TrainState]:
    """Return `init(key)`, the state at step 0; jit it with `state_shardings` so that no device holds it unsharded."""
    model, optimizer = make_model(config.model), make_run_optimizer(config)

    def init(key: PRNGKeyArray) -> TrainState:
        params = model.init(key)
        zero = jnp.zeros((), jnp.int32)
        guard = SkipGuard(zero, zero, zero, jnp.zeros(GUARD_WINDOW), jnp.zeros(GUARD_WINDOW))
        noise = init_noise_scale() if config.train.log_grad_noise_scale else None
        return TrainState(zero, params, optimizer.init(params), guard, noise)

    return init


def describe_state(config: Config) -> tuple[TrainState, TrainState]:
    """Return the state as shapes, and the logical axes of each array in the same structure; allocates nothing."""
    shapes = jax.eval_shape(make_init_state(config), jax.random.key(0))
    axes = param_axes(config)

    def replicated_axes(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: ("replicated",) * leaf.ndim, tree)

    return shapes, TrainState(
        step=(),
        params=axes,
        opt_state=optimizer_state_axes(shapes.opt_state, shapes.params, axes),
        guard=replicated_axes(shapes.guard),
        noise=replicated_axes(shapes.noise),
    )


def flatten_state(tree: Any) -> dict[str, Any]:
    """Return the leaves of a state, or of a tree like it, by name: "params/transformer/layers/block_0/attention/w_q"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_axes)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def unflatten_state(named: Mapping[str, Any], like: Any) -> Any:
    """Return the tree with the structure of `like` and the leaves `named`; the inverse of `flatten_state`."""
    names = flatten_state(like)
    return jax.tree.unflatten(jax.tree.structure(like), [named[name] for name in names])


def state_shardings(layout: MeshLayout, shapes: TrainState, axes: TrainState) -> TrainState:
    """Return the sharding of each array of a state."""
    flat_shapes, flat_axes = flatten_state(shapes), flatten_state(axes)
    return unflatten_state(
        {name: layout.sharding(flat_axes[name], leaf.shape, name) for name, leaf in flat_shapes.items()}, shapes
    )


def format_parameters(shapes: TrainState, axes: TrainState, layout: MeshLayout) -> str:
    """Return a table of the parameters: shape, logical axes, partition spec and bytes per device of each."""
    flat_axes = flatten_state(axes.params)
    rows = {
        name: (leaf.shape, flat_axes[name], leaf.dtype.itemsize) for name, leaf in flatten_state(shapes.params).items()
    }
    return format_sharding_table(rows, layout)


def _is_axes(leaf: Any) -> bool:
    return isinstance(leaf, tuple) and not hasattr(leaf, "_fields") and all(isinstance(axis, str) for axis in leaf)

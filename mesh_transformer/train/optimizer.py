# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Optimizers as one optax chain, and the logical axes of their state.

The logical axes of an array, not its name, decide how the array is updated. A *matrix* has the axis "embed" (or else
"latent") and another axis besides "layers" and "expert": w_q [layers, embed, heads, head_dim] is a stack of matrices of
embed x (heads head_dim), and a bias [layers, heads, head_dim] is not a matrix. Matrices have weight decay, and factored
second moments in Adafactor. Muon orthogonalizes the matrices that are not embeddings, the output layer or routers.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import DictKey, GetAttrKey
from jaxtyping import Array, Float

from mesh_transformer.config import ConfigError, OptimizerConfig
from mesh_transformer.model.params import STACK
from mesh_transformer.train.schedule import make_schedule

Axes = Mapping[str, Mapping[str, tuple[str, ...]]]  # {module: {name: logical axes}}, the structure of the parameters

STACK_AXES = (STACK, "expert")  # axes along which independent matrices are stacked
EMBEDDING_AXES = ("vocab", "position", "buckets", "router")  # axes of embeddings, output layer and routers
MUON_RMS = 0.2  # RMS of an update's elements, similar to AdamW's: Liu et al. 2025 (arXiv 2502.16982), section 2.2
# Quintic iteration of Jordan et al. 2024 (kellerjordan.github.io/posts/muon): steep at 0, converges to about [0.7, 1.2]
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


def make_optimizer(config: OptimizerConfig, steps: int, axes: Axes) -> optax.GradientTransformation:
    """Return the optimizer of a run of `steps` steps: clipping, scaling, weight decay and learning rate schedule.

    Weight decay is decoupled (Loshchilov and Hutter 2019) and multiplied by the learning rate. The
    scaling depends on config.name, where b1 = beta1 and b2 = beta2:

        adamw      m / (sqrt(v) + eps), both bias-corrected
        adafactor  g / sqrt(v), v factored (`scale_by_factored_moment`), then an average of the updates with b1 (none if b1 = 0)
        lion       sign(b1 m + (1 - b1) g), m an average with b2 (Chen et al. 2023, arXiv 2302.06675)
        muon       `scale_by_muon` with momentum b1 for inner matrices; adamw for embeddings, norms and biases
        sgd        m = b1 m + g

    moment_dtype is the dtype of m. v is always float32: in bfloat16 it would not change once 1 - b2 is below half a unit
    in the last place, 2^-9. Raises ConfigError for an unknown axis in no_decay_axes.
    """
    present = {axis for leaves in axes.values() for array in leaves.values() for axis in array}
    if unknown := [axis for axis in config.no_decay_axes if axis not in present]:
        raise ConfigError(
            f"optimizer.no_decay_axes contains {unknown[0]!r}, but no parameter has this logical axis; use axes from: "
            f"{', '.join(sorted(present))}"
        )
    decays = map_axes(lambda a: is_matrix(a) and not set(a) & set(config.no_decay_axes), axes)
    return optax.chain(
        clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        _make_scaling(config, axes),
        optax.add_decayed_weights(config.weight_decay, mask=decays) if config.weight_decay else optax.identity(),
        optax.scale_by_schedule(make_schedule(config, steps)),
        optax.scale(-1.0),
    )


def _make_scaling(config: OptimizerConfig, axes: Axes) -> optax.GradientTransformation:
    beta1, beta2, dtype = config.beta1, config.beta2, jnp.dtype(config.moment_dtype)
    adam = optax.scale_by_adam(b1=beta1, b2=beta2, eps=config.eps, mu_dtype=dtype)
    match config.name:
        case "adamw":
            return adam
        case "adafactor":
            average = optax.ema(beta1, debias=False, accumulator_dtype=dtype) if beta1 else optax.identity()
            return optax.chain(scale_by_factored_moment(axes, decay=beta2, eps=config.eps), average)
        case "lion":
            return optax.scale_by_lion(b1=beta1, b2=beta2, mu_dtype=dtype)
        case "muon":
            inner = map_axes(lambda a: is_matrix(a) and not set(a) & set(EMBEDDING_AXES), axes)
            outer = jax.tree.map(lambda is_inner: not is_inner, inner)
            muon = scale_by_muon(axes, momentum=beta1, dtype=dtype)
            return optax.chain(optax.masked(muon, inner), optax.masked(adam, outer))
        case "sgd":
            return optax.trace(decay=beta1, accumulator_dtype=dtype)


def is_matrix(axes: tuple[str, ...]) -> bool:
    """Return whether an array with these logical axes is a matrix, as defined above, or a stack of matrices."""
    first = _first_axis(axes)
    return first in axes and any(axis != first and axis not in STACK_AXES for axis in axes)


def _first_axis(axes: tuple[str, ...]) -> str:
    """Return the axis of a matrix's first dimension; all other axes that are not stacked form its second dimension."""
    return "latent" if "latent" in axes and "embed" not in axes else "embed"


def map_axes(function: Callable[[tuple[str, ...]], Any], axes: Axes) -> dict[str, dict[str, Any]]:
    """Apply `function` to the logical axes of every array; the result has the structure of the parameters."""
    return {module: {name: function(array) for name, array in leaves.items()} for module, leaves in axes.items()}


def global_norm(tree: Any) -> Float[Array, ""]:
    """Return the Euclidean norm of all arrays together; squares and sums are float32 for every dtype."""
    squares = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, start=jnp.zeros((), jnp.float32)))


def clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """Scale the gradient to the norm `limit` if its float32 norm is larger (Pascanu et al. 2012)."""

    def update(updates: Any, state: optax.OptState, params: Any = None) -> tuple[Any, optax.OptState]:
        del params
        factor = limit / jnp.maximum(global_norm(updates), limit)
        return jax.tree.map(lambda g: (g * factor).astype(g.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


class FactoredMoment(NamedTuple):
    """Second moment of a matrix as an outer product; both factors have the "layers" axis."""

    over_embed: Array  # mean over "embed"; has the array's other axes
    over_others: Array  # mean over the other axes; has "embed"


class FactoredState(NamedTuple):
    """Number of steps, and for every parameter a FactoredMoment (matrices) or an array of its shape."""

    count: Array
    second: Any


def scale_by_factored_moment(axes: Axes, *, decay: float, eps: float) -> optax.GradientTransformation:
    """Scale gradients as Adafactor does (Shazeer and Stern 2018, arXiv 1804.04235, sections 3 and 5 to 7).

    v averages g^2 + eps^2 with the rate min(decay, 1 - t^-0.8), t = 1, 2, ...: algorithm 4 with the cap of Zhai et al.
    2022 (arXiv 2106.04560). Updates g / sqrt(v) are scaled down to a root mean square of 1 over one layer's array. The
    learning rate is absolute (not relative to the parameter's size), as in AdamW.

    Optax's transformation factors the two longest dimensions of an array, which may be "layers" in a stack, or only
    a part of a matrix whose heads are split. Here "embed" is factored against all other axes.
    """

    def init_one(path: Any, param: Array) -> FactoredMoment | Array:
        array_axes = _array_axes(path, axes)
        embed, others = _dims(array_axes)
        if not is_matrix(array_axes):
            return jnp.zeros(param.shape, jnp.float32)
        shapes = [[size for i, size in enumerate(param.shape) if i not in reduced] for reduced in ((embed,), others)]
        return FactoredMoment(*(jnp.zeros(shape, jnp.float32) for shape in shapes))

    def average_one(path: Any, g: Array, second: FactoredMoment | Array, *, rate: Array) -> FactoredMoment | Array:
        square = jnp.square(g.astype(jnp.float32)) + eps**2
        if not isinstance(second, FactoredMoment):
            return rate * second + (1.0 - rate) * square
        embed, others = _dims(_array_axes(path, axes))
        means = jnp.mean(square, axis=embed), jnp.mean(square, axis=others)
        return FactoredMoment(*(rate * old + (1.0 - rate) * new for old, new in zip(second, means, strict=True)))

    def scale_one(path: Any, g: Array, second: FactoredMoment | Array) -> Array:
        array_axes = _array_axes(path, axes)
        if isinstance(second, FactoredMoment):
            embed, others = _dims(array_axes)
            rows, columns = jnp.expand_dims(second.over_embed, embed), jnp.expand_dims(second.over_others, others)
            scaled = g * jax.lax.rsqrt(rows / jnp.mean(rows, axis=others, keepdims=True)) * jax.lax.rsqrt(columns)
        else:
            scaled = g * jax.lax.rsqrt(second)
        layer = tuple(i for i, axis in enumerate(array_axes) if axis not in STACK_AXES)
        rms = jnp.sqrt(jnp.mean(jnp.square(scaled), axis=layer, keepdims=True))
        return scaled / jnp.maximum(rms, 1.0)

    def init(params: Any) -> FactoredState:
        return FactoredState(jnp.zeros((), jnp.int32), jax.tree_util.tree_map_with_path(init_one, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, FactoredState]:
        del params
        count = jnp.asarray(optax.safe_increment(state.count))
        rate = jnp.minimum(decay, 1.0 - count.astype(jnp.float32) ** -0.8)
        second = jax.tree_util.tree_map_with_path(functools.partial(average_one, rate=rate), updates, state.second)
        return jax.tree_util.tree_map_with_path(scale_one, updates, second), FactoredState(count, second)

    return optax.GradientTransformation(init, update)


class MuonState(NamedTuple):
    """Moving average of the gradient of every parameter."""

    momentum: Any


def scale_by_muon(axes: Axes, *, momentum: float, dtype: Any) -> optax.GradientTransformation:
    """Scale gradients as Muon does (Jordan et al. 2024): Nesterov momentum, then approximate orthogonalization.

    Each layer's array is one matrix of "embed" x (all other axes, heads included). Updates are scaled by
    0.2 sqrt(max(rows, columns)), so that the root mean square of their elements is about 0.2 and the learning rate and
    weight decay of AdamW can be used (Liu et al. 2025). All arrays must be matrices (`is_matrix`).
    """

    def init(params: Any) -> MuonState:
        return MuonState(jax.tree.map(lambda p: jnp.zeros(p.shape, dtype), params))

    def average(g: Array, m: Array) -> Array:
        return momentum * m.astype(jnp.float32) + (1.0 - momentum) * g

    def orthogonalize_one(path: Any, x: Array) -> Array:
        return _orthogonalize_array(x, _array_axes(path, axes))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, MuonState]:
        del params
        averages = jax.tree.map(average, updates, state.momentum)
        ahead = jax.tree.map(average, updates, averages)
        scaled = jax.tree_util.tree_map_with_path(orthogonalize_one, ahead)
        return scaled, MuonState(jax.tree.map(lambda m: m.astype(dtype), averages))

    return optax.GradientTransformation(init, update)


def _orthogonalize_array(x: Array, axes: tuple[str, ...]) -> Array:
    """Orthogonalize every layer's matrix, and scale it so that the root mean square of its elements is about 0.2."""
    embed, others = _dims(axes)
    stack = tuple(i for i, axis in enumerate(axes) if axis in STACK_AXES)
    order = (*stack, embed, *others)
    moved = x.transpose(order)
    columns = math.prod(x.shape[i] for i in others)
    matrices = orthogonalize(moved.reshape(*moved.shape[: len(stack) + 1], columns))
    scale = MUON_RMS * math.sqrt(max(x.shape[embed], columns))
    back = sorted(range(x.ndim), key=order.__getitem__)
    return scale * matrices.reshape(moved.shape).transpose(back)


def orthogonalize(x: Float[Array, "*stack m n"]) -> Float[Array, "*stack m n"]:
    """Return U V^T for x = U S V^T (singular values S) approximately: with singular values of 0.7 to 1.2, in float32."""
    a, b, c = NEWTON_SCHULZ
    wide = x.shape[-2] <= x.shape[-1]
    y = x.astype(jnp.float32) if wide else jnp.swapaxes(x, -1, -2).astype(jnp.float32)
    y = y / jnp.maximum(jnp.sqrt(jnp.sum(jnp.square(y), axis=(-2, -1), keepdims=True)), 1e-12)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = y @ jnp.swapaxes(y, -1, -2)
        y = a * y + (b * gram + c * (gram @ gram)) @ y
    return y if wide else jnp.swapaxes(y, -1, -2)


def optimizer_state_axes(opt_state: Any, params: Mapping[str, Mapping[str, Any]], axes: Axes) -> Any:
    """Return the logical axes of every leaf of an optimizer state, in the structure of `opt_state`.

    `opt_state` is the state or its jax.eval_shape; `params` has an object with a shape for every array. The end of a
    leaf's path identifies it: [module][name] has the axes of that parameter, and the factors of a FactoredMoment below
    it have the axes that are not reduced. All other leaves must be scalars. Raises ValueError for a leaf of another kind.
    """

    def find(path: Any, leaf: Any) -> tuple[str, ...]:
        param_path = path[:-1] if isinstance(path[-1], GetAttrKey) else path
        if _is_array_path(param_path, axes):
            module, name = param_path[-2].key, param_path[-1].key
            field = path[-1].name if param_path is not path else ""
            dims = [i for i, axis in enumerate(axes[module][name]) if _has_axis(field, axis, axes[module][name])]
            if leaf.shape == tuple(params[module][name].shape[i] for i in dims):
                return tuple(axes[module][name][i] for i in dims)
        elif leaf.shape == ():
            return ()
        raise ValueError(
            f"optimizer state {jax.tree_util.keystr(path)} of shape {leaf.shape} belongs to no parameter; "
            "store the state of a parameter at [module][name] with the parameter's shape"
        )

    return jax.tree_util.tree_map_with_path(find, opt_state)


def _has_axis(field: str, axis: str, axes: tuple[str, ...]) -> bool:
    """Return whether a field of FactoredMoment has the parameter's `axis`; "" stands for an array of the parameter's shape."""
    match field:
        case "over_embed":
            return axis != _first_axis(axes)
        case "over_others":
            return axis == _first_axis(axes) or axis in STACK_AXES
        case _:
            return field == ""


def _is_array_path(path: Any, axes: Axes) -> bool:
    keys = [key.key for key in path[-2:] if isinstance(key, DictKey)]
    return len(keys) == 2 and keys[1] in axes.get(keys[0], ())


def _array_axes(path: Any, axes: Axes) -> tuple[str, ...]:
    assert _is_array_path(path, axes), f"no logical axes for {jax.tree_util.keystr(path)}"
    return axes[path[-2].key][path[-1].key]


def _dims(axes: tuple[str, ...]) -> tuple[int, tuple[int, ...]]:
    """Return the dimension of "embed" or "latent" (-1 without either), and the dimensions that it is factored against."""
    first = _first_axis(axes)
    embed = axes.index(first) if first in axes else -1
    return embed, tuple(i for i, axis in enumerate(axes) if axis != first and axis not in STACK_AXES)

# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Floating-point operations of a program, counted from its jaxpr, and the rate the hardware's products reach.

XLA's own cost analysis counts the body of a scan once, so it is no use here. What is counted: products (2 per
multiply-add), the only operations that matter for a transformer; elementwise work is not.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core


def count_flops(function: Callable[..., Any], *args: Any) -> float:
    """FLOPs of one call of `function` on arguments of these shapes, over all devices; loops are multiplied out."""
    return count_jaxpr_flops(jax.make_jaxpr(function)(*args).jaxpr)


def count_jaxpr_flops(jaxpr: Any) -> float:
    """The same of a program traced already.

    Inside a `shard_map` shapes are one device's, and a kernel's body is that of one block: both are multiplied by how
    many there are. Blocks that a kernel skips (causal attention) count as if it did not. A loop of unknown length
    counts once. Without a capacity, experts on several devices count the rows of all of them on each.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, out = equation.invars[0].aval, equation.outvars[0].aval
            total += 2.0 * math.prod(out.shape) * math.prod(left.shape[axis] for axis in contracted)
        if equation.primitive.name == "ragged_dot_general":
            total += _ragged_flops(equation)
        total += _times(equation) * sum(count_jaxpr_flops(inner) for inner in _inner_jaxprs(equation.params))
    return total


def _ragged_flops(equation: Any) -> float:
    """Of a product whose rows belong to groups (experts): every row meets the weight of one group alone."""
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (contracted, _), _ = numbers.dot_dimension_numbers
    left, out = equation.invars[0].aval, equation.outvars[0].aval
    # A weight's gradient has a leading dimension of groups, among which the contracted rows are divided.
    kept = out.shape[1:] if set(numbers.lhs_ragged_dimensions) & set(contracted) else out.shape
    return 2.0 * math.prod(kept) * math.prod(left.shape[axis] for axis in contracted)


def _times(equation: Any) -> int:
    """How often the jaxprs inside an equation run."""
    params = equation.params
    match equation.primitive.name:
        case "scan":
            return params["length"]
        case "shard_map":
            axes = params.get("newly_manual_axes", params.get("manual_axes"))  # by the version of JAX
            return math.prod(params["mesh"].shape[axis] for axis in axes)
        case "pallas_call":
            return math.prod(size for size in params["grid_mapping"].grid if isinstance(size, int))
    return 1


def _inner_jaxprs(params: dict[str, Any]) -> list[Any]:
    """Jaxprs an equation calls; of a conditional's branches, the dearest."""
    found = []
    for name, value in params.items():
        if name == "branches":
            found.append(max((branch.jaxpr for branch in value), key=count_jaxpr_flops))
        elif isinstance(value, core.ClosedJaxpr):
            found.append(value.jaxpr)
        elif isinstance(value, core.Jaxpr):
            found.append(value)
    return found


def measure_product_peak(dtype: str, *, dim: int = 1024, seconds: float = 0.3) -> float:
    """FLOP/s that a dim x dim product reaches, best of the runs that fit in `seconds`: what a step is compared with.

    On accelerators the figure is multiplied by the number of devices; CPU devices share the same cores.
    """
    x = jnp.ones((dim, dim), dtype)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    devices = 1 if jax.default_backend() == "cpu" else jax.device_count()
    return devices * 2.0 * dim**3 / best

# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""FLOPs of a program, counted from its jaxpr, and the measured peak matmul rate of the hardware.

XLA's own cost analysis cannot be used because it counts the body of a scan once. Only matmuls are counted (2 FLOPs per
multiply-add): elementwise operations are negligible in a transformer.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core


def count_flops(function: Callable[..., Any], *args: Any) -> float:
    """Return the FLOPs of one call of `function` on arguments of these shapes, over all devices and loop iterations."""
    return count_jaxpr_flops(jax.make_jaxpr(function)(*args).jaxpr)


def count_jaxpr_flops(jaxpr: Any) -> float:
    """Return the FLOPs of a traced program.

    Shapes inside a `shard_map` are the shapes on one device, and the body of a kernel processes one block: their FLOPs are
    multiplied by the number of devices or blocks. Blocks that a kernel skips (causal attention) are counted. A loop of
    unknown length counts as one iteration. Without an expert capacity, the tokens of all devices are counted for the
    experts of each device.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, out = equation.invars[0].aval, equation.outvars[0].aval
            total += 2.0 * math.prod(out.shape) * math.prod(left.shape[axis] for axis in contracted)
        if equation.primitive.name == "ragged_dot_general":
            total += _ragged_flops(equation)
        total += _run_count(equation) * sum(count_jaxpr_flops(inner) for inner in _inner_jaxprs(equation.params))
    return total


def _ragged_flops(equation: Any) -> float:
    """Return the FLOPs of a grouped matmul: each row is multiplied only by the weight of its group (expert)."""
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (contracted, _), _ = numbers.dot_dimension_numbers
    left, out = equation.invars[0].aval, equation.outvars[0].aval
    # The gradient of a weight has a leading group dimension, and each contracted row belongs to one group.
    out_shape = out.shape[1:] if set(numbers.lhs_ragged_dimensions) & set(contracted) else out.shape
    return 2.0 * math.prod(out_shape) * math.prod(left.shape[axis] for axis in contracted)


def _run_count(equation: Any) -> int:
    """Return the number of runs of the jaxprs inside an equation."""
    params = equation.params
    match equation.primitive.name:
        case "scan":
            return params["length"]
        case "shard_map":
            axes = params.get("newly_manual_axes", params.get("manual_axes"))  # the name depends on the version of JAX
            return math.prod(params["mesh"].shape[axis] for axis in axes)
        case "pallas_call":
            return math.prod(size for size in params["grid_mapping"].grid if isinstance(size, int))
    return 1


def _inner_jaxprs(params: dict[str, Any]) -> list[Any]:
    """Return the jaxprs that an equation calls; for a conditional, only the most expensive branch."""
    inner = []
    for name, value in params.items():
        if name == "branches":
            inner.append(max((branch.jaxpr for branch in value), key=count_jaxpr_flops))
        elif isinstance(value, core.ClosedJaxpr):
            inner.append(value.jaxpr)
        elif isinstance(value, core.Jaxpr):
            inner.append(value)
    return inner


def measure_matmul_peak(dtype: str, *, dim: int = 1024, seconds: float = 0.3) -> float:
    """Return the peak rate of a dim x dim matmul in FLOP/s: the rate of the fastest run within `seconds`.

    MFU is a fraction of this rate. On accelerators the rate is multiplied by the number of devices; CPU devices share the
    same cores.
    """
    x = jnp.ones((dim, dim), dtype)
    matmul = jax.jit(jnp.matmul)
    matmul(x, x).block_until_ready()
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        matmul(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    devices = 1 if jax.default_backend() == "cpu" else jax.device_count()
    return devices * 2.0 * dim**3 / best

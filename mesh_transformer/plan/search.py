# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The best mesh, remat and microbatch of a run on a topology: all by formula, the few best compiled.

Step times lie between two bounds (roofline.py); candidates are compared by the middle of the two. A candidate is on the
frontier if no other is both faster and smaller.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, get_args, get_type_hints

from mesh_transformer.config import Config, ConfigError, ModelConfig
from mesh_transformer.mesh import MESH_AXES
from mesh_transformer.plan.compile_jobs import CompileError
from mesh_transformer.plan.estimate import describe_model, estimate_training, mesh_sizes
from mesh_transformer.plan.fit import memory_use
from mesh_transformer.plan.hardware.chips import Chip
from mesh_transformer.plan.hardware.topologies import parse_topology
from mesh_transformer.plan.job import CompiledStats, CompileJob
from mesh_transformer.plan.report import describe_mesh, format_ms, format_table
from mesh_transformer.plan.roofline import make_roofline, model_flops_utilization
from mesh_transformer.plan.suggestions import change_config

GIB = 2**30
ESTIMATE_LIMIT = 1.15  # of the usable memory: an estimate above it is not worth a compile
MAX_TENSOR = 16
MAX_PER_MESH = 2  # compiled candidates of one mesh
SEARCHED_AXES = ("data", "fsdp", "tensor")  # other axes stay as they are


class Candidate(NamedTuple):
    """A point of the search."""

    overrides: tuple[str, ...]
    mesh: dict[str, int]
    remat: str
    grad_accum_steps: int
    estimate: CompiledStats
    seconds: float  # of a step, by the estimate
    stats: CompiledStats | None = None  # once compiled


class SearchResult(NamedTuple):
    """A search's result: what was compiled, the fastest that fits first, and all that was considered."""

    compiled: list[Candidate]
    considered: list[Candidate]


def search(
    job: CompileJob,
    compile_one: Callable[[CompileJob], CompiledStats],
    *,
    chip: Chip,
    count: int = 4,
    log: Callable[[str], None] = lambda line: None,
) -> SearchResult:
    """Estimate every candidate, compile the `count` most promising. ConfigError if none can be tried at all."""
    considered = sorted(list_candidates(job, chip), key=lambda one: one.seconds)
    if not considered:
        raise ConfigError(
            f"{job.topology}: no mesh of its devices divides the model and a batch of {job.config.train.batch_size}"
        )
    promising = [one for one in considered if one.estimate.peak_bytes <= ESTIMATE_LIMIT * chip.memory]
    promising = promising or sorted(considered, key=lambda one: one.estimate.peak_bytes)
    compiled: list[Candidate] = []
    for one in promising:
        if len(compiled) == count:
            break
        if sum(other.mesh == one.mesh for other in compiled) >= MAX_PER_MESH:
            continue
        log(f"compiling {describe_candidate(one)}")
        try:
            measured = compile_one(dataclasses.replace(job, config=change_config(job.config, one.overrides)))
        except (ConfigError, CompileError) as error:
            log(f"  left out: {error}")
            continue
        compiled.append(one._replace(measured=measured))
    compiled.sort(key=lambda one: (not _fits(one, chip), step_seconds(one, chip)))
    return SearchResult(compiled, considered)


def list_candidates(job: CompileJob, chip: Chip) -> Iterator[Candidate]:
    """Every mesh, remat and microbatch that divides, with its estimate."""
    config, devices = job.config, parse_topology(job.topology).devices
    params = describe_model(config.model)
    policies = get_args(get_type_hints(ModelConfig)["remat"])
    for mesh in list_meshes(config, devices):
        rows, left = divmod(config.train.batch_size, _batch_shards(config, mesh))
        if left or not rows:
            continue
        for accumulation in (n for n in (2**i for i in range(rows.bit_length())) if rows % n == 0):
            for remat in policies:
                overrides = (
                    *(f"mesh.{axis}={mesh[axis]}" for axis in SEARCHED_AXES),
                    f'model.remat="{remat}"',
                    f"train.grad_accum_steps={accumulation}",
                )
                guess = estimate_training(change_config(config, overrides), job.topology, params)
                roofline = make_roofline(guess, chip)
                seconds = (roofline.lower_bound + roofline.upper_bound) / 2
                yield Candidate(overrides, mesh, remat, accumulation, guess, seconds)


def list_meshes(config: Config, devices: int) -> Iterator[dict[str, int]]:
    """All ways to lay so many devices along the searched axes, that divide the model's own sizes."""
    fixed = {axis: getattr(config.mesh, axis) for axis in MESH_AXES if axis not in SEARCHED_AXES}
    inner, left = divmod(devices, math.prod(fixed.values()))
    if left:
        return
    model = config.model
    for tensor in _divisors(inner):
        if tensor > MAX_TENSOR or any(
            size % tensor for size in (model.n_heads, model.kv_heads, model.ff_dim, model.n_vocab)
        ):
            continue
        for fsdp in _divisors(inner // tensor):
            if model.d_model % fsdp == 0:
                yield {**fixed, "data": inner // tensor // fsdp, "fsdp": fsdp, "tensor": tensor}


def _batch_shards(config: Config, mesh: dict[str, int]) -> int:
    _, rules = mesh_sizes(config, math.prod(mesh.values()))
    return math.prod(mesh[axis] for axis in rules["batch"])


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def describe_candidate(one: Candidate) -> str:
    """Mesh, remat and microbatches in a few words."""
    return f"{describe_mesh(one.mesh)}, remat {one.remat}, {one.grad_accum_steps} microbatch(es)"


def step_seconds(one: Candidate, chip: Chip) -> float:
    """The middle of the two bounds on a compiled candidate's step, or its estimate."""
    if one.stats is None or one.stats.compiler_error:
        return one.seconds
    roofline = make_roofline(one.stats, chip)
    return (roofline.lower_bound + roofline.upper_bound) / 2


def _fits(one: Candidate, chip: Chip) -> bool:
    return one.stats is not None and bool(memory_use(one.stats, chip).fits)


def find_frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Places of the points (seconds, bytes) that no other beats in both."""
    return [
        i for i, (x, y) in enumerate(points) if not any((a <= x and b <= y) and (a < x or b < y) for a, b in points)
    ]


def format_search(found: SearchResult, chip: Chip) -> str:
    """The compiled candidates as a table, the fastest that fits first, frontier marked."""
    rows = [["mesh", "remat", "micro", "peak GiB", "estimate", "step ms", "MFU", "bound", "fits", "frontier"]]
    points = [(step_seconds(one, chip), float(memory_use(one.stats, chip).peak)) for one in found.compiled if one.stats]
    frontier = find_frontier(points)
    for i, one in enumerate(found.compiled):
        rows.append([*_describe_memory(one, chip), *_describe_time(one, chip)])
        fits = _fits(one, chip)
        rows[-1] += ["yes" if fits else "no", "*" if i in frontier and fits else ""]
    best = found.compiled[0] if found.compiled and _fits(found.compiled[0], chip) else None
    lines = [format_table(rows, left=2), ""]
    lines.append(f"{len(found.considered):,} candidates by formula, {len(found.compiled)} compiled")
    if best:
        lines.append("best    " + " ".join(f"--set {_quote(o)}" for o in best.overrides))
    else:
        lines.append("none of those compiled fits; a larger topology, a smaller batch, or bfloat16 moments")
    return "\n".join(lines)


def _describe_memory(one: Candidate, chip: Chip) -> list[str]:
    assert one.stats is not None
    peak, guess = memory_use(one.stats, chip).peak, one.estimate.peak_bytes
    return [describe_mesh(one.mesh), one.remat, str(one.grad_accum_steps), f"{peak / GIB:.2f}", f"{guess / GIB:.2f}"]


def _describe_time(one: Candidate, chip: Chip) -> list[str]:
    assert one.stats is not None
    if one.stats.compiler_error:
        return ["-", "-", "-"]
    roofline = make_roofline(one.stats, chip)
    slow, fast = (model_flops_utilization(one.stats, chip, s) for s in (roofline.upper_bound, roofline.lower_bound))
    return [
        f"{format_ms(roofline.lower_bound)}-{format_ms(roofline.upper_bound)}",
        f"{slow:.0%}-{fast:.0%}",
        roofline.bound,
    ]


def _quote(override: str) -> str:
    return f"'{override}'" if '"' in override else override

# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Search for the best mesh, remat policy and number of microbatches: estimates all candidates and compiles the best few.

Candidates are compared by the mean of the lower and the upper bound of the step time (roofline.py). A candidate is on the
Pareto frontier if no other candidate is better in step time or memory and at least as good in the other.
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
ESTIMATE_LIMIT = 1.15  # fraction of the usable memory; candidates with a higher estimate are not compiled
MAX_TENSOR = 16  # largest searched size of the mesh axis `tensor`
MAX_PER_MESH = 2  # compiled candidates per mesh
SEARCHED_AXES = ("data", "fsdp", "tensor")  # other axes keep their sizes


class Candidate(NamedTuple):
    """A configuration that the search considers."""

    overrides: tuple[str, ...]
    mesh: dict[str, int]
    remat: str
    grad_accum_steps: int
    estimate: CompiledStats
    seconds: float  # per step, estimated
    stats: CompiledStats | None = None  # after compilation


class SearchResult(NamedTuple):
    """Compiled candidates, sorted by fit and then by step time, and all considered candidates."""

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
    """Estimate every candidate and compile the `count` most promising. Raises ConfigError if there are no candidates."""
    considered = sorted(list_candidates(job, chip), key=lambda candidate: candidate.seconds)
    if not considered:
        raise ConfigError(
            f"--topology {job.topology}: no mesh over its devices divides the sizes of the model and "
            f"train.batch_size={job.config.train.batch_size} evenly; change the batch size or the topology"
        )
    promising = [candidate for candidate in considered if candidate.estimate.peak_bytes <= ESTIMATE_LIMIT * chip.memory]
    promising = promising or sorted(considered, key=lambda candidate: candidate.estimate.peak_bytes)
    compiled: list[Candidate] = []
    for candidate in promising:
        if len(compiled) == count:
            break
        if sum(other.mesh == candidate.mesh for other in compiled) >= MAX_PER_MESH:
            continue
        log(f"compiling {describe_candidate(candidate)}")
        try:
            stats = compile_one(dataclasses.replace(job, config=change_config(job.config, candidate.overrides)))
        except (ConfigError, CompileError) as error:
            log(f"  skipped: {error}")
            continue
        compiled.append(candidate._replace(stats=stats))
    compiled.sort(key=lambda candidate: (not _fits(candidate, chip), step_seconds(candidate, chip)))
    return SearchResult(compiled, considered)


def list_candidates(job: CompileJob, chip: Chip) -> Iterator[Candidate]:
    """Yield the candidates whose mesh and number of microbatches divide the batch and the model evenly."""
    config, devices = job.config, parse_topology(job.topology).devices
    params = describe_model(config.model)
    policies = get_args(get_type_hints(ModelConfig)["remat"])
    for mesh in list_meshes(config, devices):
        rows, remainder = divmod(config.train.batch_size, _batch_shards(config, mesh))
        if remainder or not rows:
            continue
        for grad_accum_steps in (n for n in (2**i for i in range(rows.bit_length())) if rows % n == 0):
            for remat in policies:
                overrides = (
                    *(f"mesh.{axis}={mesh[axis]}" for axis in SEARCHED_AXES),
                    f'model.remat="{remat}"',
                    f"train.grad_accum_steps={grad_accum_steps}",
                )
                estimate = estimate_training(change_config(config, overrides), job.topology, params)
                roofline = make_roofline(estimate, chip)
                seconds = (roofline.lower_bound + roofline.upper_bound) / 2
                yield Candidate(overrides, mesh, remat, grad_accum_steps, estimate, seconds)


def list_meshes(config: Config, devices: int) -> Iterator[dict[str, int]]:
    """Yield all assignments of `devices` devices to the searched axes that divide the model's sizes."""
    fixed = {axis: getattr(config.mesh, axis) for axis in MESH_AXES if axis not in SEARCHED_AXES}
    inner, remainder = divmod(devices, math.prod(fixed.values()))
    if remainder:
        return
    model = config.model
    hidden = {info.shape[info.axes.index("ff")] for info in describe_model(model).values() if "ff" in info.axes}
    sizes = {model.n_heads, model.kv_heads, model.n_vocab} | hidden
    for tensor in _divisors(inner):
        if tensor > MAX_TENSOR or any(size % tensor for size in sizes):
            continue
        for fsdp in _divisors(inner // tensor):
            if model.d_model % fsdp == 0:
                yield {**fixed, "data": inner // tensor // fsdp, "fsdp": fsdp, "tensor": tensor}


def _batch_shards(config: Config, mesh: dict[str, int]) -> int:
    _, rules = mesh_sizes(config, math.prod(mesh.values()))
    return math.prod(mesh[axis] for axis in rules["batch"])


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def describe_candidate(candidate: Candidate) -> str:
    """Return a short description of a candidate."""
    return f"{describe_mesh(candidate.mesh)}, remat {candidate.remat}, {candidate.grad_accum_steps} microbatch(es)"


def step_seconds(candidate: Candidate, chip: Chip) -> float:
    """Return the mean of the two bounds on the step time, from the compiled program or else from the estimate."""
    if candidate.stats is None or candidate.stats.compiler_error:
        return candidate.seconds
    roofline = make_roofline(candidate.stats, chip)
    return (roofline.lower_bound + roofline.upper_bound) / 2


def _fits(candidate: Candidate, chip: Chip) -> bool:
    return candidate.stats is not None and bool(memory_use(candidate.stats, chip).fits)


def find_frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the points (seconds, bytes) on the Pareto frontier."""
    return [
        i for i, (x, y) in enumerate(points) if not any((a <= x and b <= y) and (a < x or b < y) for a, b in points)
    ]


def format_search(result: SearchResult, chip: Chip) -> str:
    """Return the compiled candidates as a table, sorted by fit and step time, with the Pareto frontier marked."""
    rows = [["mesh", "remat", "micro", "peak GiB", "estimate", "step ms", "MFU", "bound", "fits", "frontier"]]
    points = [
        (step_seconds(candidate, chip), float(memory_use(candidate.stats, chip).peak))
        for candidate in result.compiled
        if candidate.stats
    ]
    frontier = find_frontier(points)
    for i, candidate in enumerate(result.compiled):
        rows.append([*_describe_memory(candidate, chip), *_describe_time(candidate, chip)])
        fits = _fits(candidate, chip)
        rows[-1] += ["yes" if fits else "no", "*" if i in frontier and fits else ""]
    best = result.compiled[0] if result.compiled and _fits(result.compiled[0], chip) else None
    lines = [format_table(rows, left=2), ""]
    lines.append(f"{len(result.considered):,} candidates estimated, {len(result.compiled)} compiled")
    if best:
        lines.append("best    " + " ".join(f"--set {_quote(o)}" for o in best.overrides))
    else:
        lines.append(
            "no compiled candidate fits; use a larger --topology, a smaller train.batch_size, or --set "
            "'optimizer.moment_dtype=\"bfloat16\"'"
        )
    return "\n".join(lines)


def _describe_memory(candidate: Candidate, chip: Chip) -> list[str]:
    assert candidate.stats is not None
    peak, estimate = memory_use(candidate.stats, chip).peak, candidate.estimate.peak_bytes
    return [
        describe_mesh(candidate.mesh),
        candidate.remat,
        str(candidate.grad_accum_steps),
        f"{peak / GIB:.2f}",
        f"{estimate / GIB:.2f}",
    ]


def _describe_time(candidate: Candidate, chip: Chip) -> list[str]:
    assert candidate.stats is not None
    if candidate.stats.compiler_error:
        return ["-", "-", "-"]
    roofline = make_roofline(candidate.stats, chip)
    slow, fast = (
        model_flops_utilization(candidate.stats, chip, s) for s in (roofline.upper_bound, roofline.lower_bound)
    )
    return [
        f"{format_ms(roofline.lower_bound)}-{format_ms(roofline.upper_bound)}",
        f"{slow:.0%}-{fast:.0%}",
        roofline.bound,
    ]


def _quote(override: str) -> str:
    return f"'{override}'" if '"' in override else override

# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Worker process that traces and compiles one job: `python -m mesh_transformer.plan.compile_worker RESULT < JOB`.

It is a separate process, because the environment must be set before JAX starts, a compiler that runs out of memory may
abort its process, and the compiler's memory is freed only when the process ends.
"""

import gzip
import json
import math
import re
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mesh_transformer.config import ConfigError
from mesh_transformer.mesh import MeshLayout, init_devices, make_layout
from mesh_transformer.plan.decoding import lower_decode, lower_seq2seq_decode, lower_seq2seq_encode
from mesh_transformer.plan.hardware.chips import FAMILIES
from mesh_transformer.plan.hardware.topologies import MissingCompilerError, Topology, make_devices, parse_topology
from mesh_transformer.plan.hlo.collectives import Collective, read_collectives
from mesh_transformer.plan.hlo.parser import HloModule
from mesh_transformer.plan.hlo.traffic import hbm_bytes, stacked_bytes
from mesh_transformer.plan.job import CompiledStats, CompileJob, Traffic
from mesh_transformer.train.compile import abstract_batch, abstract_state, config_for_flops, jit_train_step
from mesh_transformer.train.flops import count_flops, count_jaxpr_flops
from mesh_transformer.train.run import check_batches
from mesh_transformer.train.state import describe_state, flatten_state, format_parameters, state_shardings

# Compiler options of --low-effort.
LOW_EFFORT = {"exec_time_optimization_effort": -1.0}
OUT_OF_MEMORY = re.compile(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)")
USED_OF = re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm")
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def make_topology_layout(job: CompileJob) -> MeshLayout:
    """Return the mesh of a run over the devices of its topology."""
    topology, mesh = parse_topology(job.topology), job.config.mesh
    if topology.chip is not None:
        return make_layout(mesh, make_devices(topology))
    if not topology.devices:
        return init_devices(mesh)
    if len(jax.devices("cpu")) < topology.devices:
        raise ConfigError(
            f"--topology {topology.name}: this process has {len(jax.devices('cpu'))} CPU device(s), and {topology.devices} are "
            f"required; set the environment variable JAX_NUM_CPU_DEVICES={topology.devices}"
        )
    return make_layout(mesh, jax.devices("cpu")[: topology.devices])


def lower_training(job: CompileJob, layout: MeshLayout) -> tuple[Any, CompiledStats]:
    """Lower the training step from shapes, and return it with the statistics that are known before compilation."""
    config = job.config
    check_batches(config, layout)
    shapes, axes = describe_state(config)
    shardings = state_shardings(layout, shapes, axes)
    state, batch = abstract_state(shapes, shardings), abstract_batch(config, layout)
    traced = jit_train_step(config, layout, shardings).trace(state, batch)
    hardware = count_jaxpr_flops(traced.jaxpr.jaxpr)
    plain = config_for_flops(config)
    model_flops = hardware if plain == config else count_flops(jit_train_step(plain, layout, shardings), shapes, batch)
    bytes_by_kind = {"parameters": 0, "moments": 0, "other state": 0}
    kind_of_field = {"params": "parameters", "opt_state": "moments"}
    for name, leaf in flatten_state(state).items():
        bytes_by_kind[kind_of_field.get(name.split("/")[0], "other state")] += _device_bytes(leaf)
    bytes_by_kind["batch"] = sum(_device_bytes(leaf) for leaf in jax.tree.leaves(batch))
    return traced.lower(), CompiledStats(
        topology=job.topology,
        platform=layout.mesh.devices.flat[0].platform,
        devices=layout.mesh.size,
        mesh=dict(layout.mesh.shape),
        parameters=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes.params)),
        tokens=config.train.batch_size * config.model.seq_len,
        flops=model_flops,
        hardware_flops=hardware,
        bytes_by_kind=bytes_by_kind,
        gradient_bytes=sum(4 * _device_bytes(leaf) // leaf.dtype.itemsize for leaf in jax.tree.leaves(state.params)),
        state_bytes=sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes)),
        low_effort=job.low_effort,
        sharding_table=format_parameters(shapes, axes, layout),
    )


def _device_bytes(leaf: Any) -> int:
    """Return the bytes of an array on one device, from its shape and sharding."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def measure(job: CompileJob, text_path: Path | None = None) -> CompiledStats:
    """Trace and compile a job, and return its statistics.

    `compiler_error` is set if the program does not fit in memory. The text of the compiled program is written to
    `text_path`, compressed by gzip.
    """
    layout = make_topology_layout(job)
    if not job.batch:
        return _compile(job, layout, lower_training(job, layout), text_path)
    if job.config.model.encoder is None:
        return _compile(job, layout, lower_decode(job, layout), text_path)
    stats = _compile(job, layout, lower_seq2seq_decode(job, layout), text_path)
    stats.encode = _compile(job, layout, lower_seq2seq_encode(job, layout), None)
    return stats


def _compile(
    job: CompileJob, layout: MeshLayout, program: tuple[Any, CompiledStats], text_path: Path | None
) -> CompiledStats:
    lowered, stats = program
    if job.topology == "local" and stats.platform != "cpu":
        device = layout.mesh.devices.flat[0]
        stats.device_kind = device.device_kind
        stats.limit_bytes = (device.memory_stats() or {}).get("bytes_limit", 0)
    stats.compiler = f"jax {jax.__version__}, {_compiler_version(stats.platform)}"
    start = time.monotonic()
    options = LOW_EFFORT if job.low_effort and stats.platform == "tpu" else None
    try:
        compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if "hbm" not in str(error).lower():
            raise
        stats.compiler_error = str(error).splitlines()[0]
        stats.needed_bytes, limit = parse_out_of_memory(str(error))
        stats.limit_bytes = limit or stats.limit_bytes
        return stats
    finally:
        stats.compile_seconds = time.monotonic() - start
    memory = compiled.memory_analysis()
    stats.argument_bytes = memory.argument_size_in_bytes
    stats.temporary_bytes = memory.temp_size_in_bytes
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    stats.peak_bytes = total if stats.platform == "cpu" else memory.peak_memory_in_bytes
    stats.argument_bytes += stats.idle_bytes
    stats.peak_bytes += stats.idle_bytes
    text = compiled.as_text()
    if text_path is not None:
        text_path.write_bytes(gzip.compress(text.encode(), 3))
    module = HloModule(text)
    stacked = stacked_bytes(module)
    stats.activation_bytes = stacked.activations
    stats.logits_bytes = _largest_logits(module, job, layout)
    stats.hbm_bytes = hbm_bytes(module)
    collectives = read_collectives(module, layout.mesh.devices.shape, layout.mesh.axis_names)
    stats.traffic = [locate_traffic(collective, layout, parse_topology(job.topology)) for collective in collectives]
    return stats


def parse_out_of_memory(text: str) -> tuple[int, int]:
    """Return the required and the available bytes stated in XLA's message, or zeros if it states none."""
    match = OUT_OF_MEMORY.search(text) or USED_OF.search(text)
    if match is None:
        return 0, 0
    needed, needed_unit, limit, limit_unit = match.groups()
    return int(float(needed) * UNITS[needed_unit]), int(float(limit) * UNITS[limit_unit])


def _largest_logits(module: HloModule, job: CompileJob, layout: MeshLayout) -> int:
    """Return the bytes of the largest array with a vocabulary dimension that is not a weight."""
    model = job.config.model
    vocab = layout.sharding(("vocab",), (model.n_vocab,), "vocab").shard_shape((model.n_vocab,))[0]
    size = model.token_embedding_dim
    embed = layout.sharding(("embed",), (size,), "embed").shard_shape((size,))[0]
    weights = {(a, b) for a in (vocab, model.n_vocab) for b in (embed, size)}
    weights |= {(b, a) for a, b in weights}
    largest = 0
    for name, instructions in module.computations.items():
        for instruction in instructions if module.run_counts.get(name) else ():
            for array in instruction.arrays:
                if vocab in array.shape and len(array.shape) > 1 and array.shape not in weights:
                    largest = max(largest, array.nbytes)
    return largest


def locate_traffic(collective: Collective, layout: MeshLayout, topology: Topology) -> Traffic:
    """Return the traffic of a collective, with the number of slices or hosts and torus dimensions that a group spans."""
    traffic = Traffic(list(collective.axes), collective.kind, collective.group, collective.count, collective.sent)
    if topology.chip is None:
        return traffic
    names = layout.mesh.axis_names
    first = tuple(slice(None) if name in collective.axes else 0 for name in names)
    members = list(np.asarray(layout.mesh.devices[first]).flat)
    if topology.chip.platform == "gpu":
        return traffic._replace(groups_spanned=len({device.process_index for device in members}))
    slices = [getattr(device, "slice_index", None) for device in members]
    spanned = len(set(slices))
    coords = np.array([d.coords for d, number in zip(members, slices, strict=True) if number == slices[0]])
    spread = [i for i in range(coords.shape[1]) if len(set(coords[:, i])) > 1]
    shape = [*topology.shape, 1]
    wrapped = bool(spread) and all(_is_ring(topology, shape[i], len(set(coords[:, i]))) for i in spread)
    return traffic._replace(torus_dims=len(spread), wrapped=wrapped, groups_spanned=spanned)


def _is_ring(topology: Topology, size: int, used: int) -> bool:
    """Return whether a torus dimension of `size` chips is a ring that a group spans completely.

    Optical switches join cubes of 4 x 4 x 4 chips into rings; a dimension of a 2D pod is a ring only at its full length.
    """
    assert topology.chip is not None
    if used < size:
        return False
    longest = max(max(shape) for shape in FAMILIES[topology.chip.name].slices.values())
    return size % 4 == 0 if len(topology.shape) == 3 else size == longest


def _compiler_version(platform: str) -> str:
    package = {"tpu": "libtpu", "gpu": "jax-cuda13-plugin"}.get(platform, "jaxlib")
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return package


def main(arguments: Sequence[str]) -> int:
    """Read a job from standard input, and write its statistics or the error to the file named by the first argument.

    A second argument is the path for the text of the compiled program.
    """
    text_path = Path(arguments[1]) if len(arguments) > 1 else None
    try:
        stats = measure(CompileJob.from_json(sys.stdin.read()), text_path)
        answer: dict[str, Any] = {"stats": json.loads(stats.to_json())}
    except (ConfigError, MissingCompilerError) as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    except RuntimeError as error:
        if "cudnn" not in str(error).lower() or isinstance(error, jax.errors.JaxRuntimeError):
            raise
        answer = {
            "error": "MissingCompilerError",
            "message": f"compiling for GPUs needs cuDNN ({error}); run: pip install 'mesh-transformer[plan]'",
        }
    Path(arguments[0]).write_text(json.dumps(answer), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

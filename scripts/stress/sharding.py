# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Stress test of sharding: training on every mesh, with every feature, must equal training on one device.

Each case trains the same small model on the same batches for five optimizer steps, on a mesh of CPU devices and on one
device. It prints the largest relative differences of the losses, of the final gradients (norm of the difference divided by the
norm of the array), and of the parameters.

examples:
  python scripts/stress/sharding.py
      all cases on 4, 8 and 16 devices
  python scripts/stress/sharding.py --only "context=4" --only "tensor=2"
      cases whose name contains both texts
  python scripts/stress/sharding.py --processes 4 --only "tensor=2 context=2"
      the devices of each case belong to four processes on this machine (Gloo)
  python scripts/stress/sharding.py --processes 4 --only "4 devices"
      one device per process, so that every axis spans processes

exit status: 0 all differences are within the tolerance, 1 a case exceeds it, 2 wrong usage
"""

import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from mesh_transformer.scripts.launch.local import find_port

from mesh_transformer.cli import make_parser, run_command
from mesh_transformer.config import Config, parse_config
from mesh_transformer.config.presets import T5
from mesh_transformer.data.loader import Batch
from mesh_transformer.mesh import MESH_AXES, MeshLayout, make_layout, use_layout
from mesh_transformer.train.state import describe_state, flatten_state, make_init_state, state_shardings
from mesh_transformer.train.step import make_train_step

N_VOCAB = 64
SEQ_LEN = 32
BATCH_SIZE = 16
STEPS = 5
TOLERANCE = 1e-5
ROPE = dict(positions="rope-half", qkv_bias=False, tied_embeddings=False, head_bias=True)
GQA = dict(ROPE, n_kv_heads=4, gated_ffn=True, norm="rmsnorm")
LOCAL = dict(GQA, attention_pattern=["global", "local"], attention_window=5)
ENCODER_DECODER = {key: value for key, value in T5.items() if key not in ("n_vocab", "seq_len")} | dict(
    n_encoder_layers=4
)
EXPERTS = dict(n_experts=8, n_experts_per_token=2, layer_interval=2, router_jitter=0.1)


LONGROPE = dict(
    type="longrope", short_factor=[1.0, 1.5], long_factor=[2.0, 3.0], original_seq_len=16, attention_factor=1.2
)
LINEAR = dict(type="linear", factor=4.0)
WIDE_HEADS = dict(GQA, d_head=8)  # with two channels a head, a norm would leave only the signs


LATENT = dict(kv_rank=12, q_rank=8, d_unrotated=6, d_rotated=4, d_value=6)
GROUPED = dict(
    n_expert_groups=4, n_groups_per_token=2, group_score="sum-of-top-2", scores="sigmoid", selection_bias=True, d_ff=16,
    shared_expert=True, shared_d_ff=24, shared_gate=True, gate_scale=2.5,
)  # fmt: skip


class Feature(NamedTuple):
    """Configuration of a feature."""

    model: dict[str, Any]  # keys of [model]
    train: dict[str, Any]  # keys of [train]
    isolate_documents: bool


FEATURES = {
    "tied": Feature({}, {}, False),
    "grouped-query, chunked loss": Feature(GQA, dict(loss_chunks=2, z_loss=1e-3), False),
    "norm of all heads": Feature(
        dict(
            WIDE_HEADS, qk_norm="rmsnorm-all-heads", rope_pattern=[True, False], rope_scaling=LONGROPE, rope_dims=4,
            logit_scale=0.7,
        ),
        {},
        False,
    ),
    "norm of each head": Feature(
        dict(WIDE_HEADS, norm="nonparametric-layernorm", residual="parallel", qk_norm="layernorm-per-head"), {}, True
    ),
    "two rotations": Feature(
        dict(
            LOCAL, d_head=8, norm="gemma-rmsnorm", residual="sandwich", qk_norm="gemma-rmsnorm", rope_local_theta=100.0,
            rope_scaling=LINEAR, clip_qkv=0.1, remat="full",
        ),
        {},
        False,
    ),
    "local, packed": Feature(LOCAL, {}, True),
    "local, packed, remat": Feature(dict(LOCAL, remat="full"), dict(loss_chunks=2), True),
    "blockwise": Feature(dict(LOCAL, attention_kernel="blockwise"), {}, True),
    "alibi, remat dots": Feature(dict(positions="alibi", remat="dots"), {}, False),
    "remat attention": Feature(dict(GQA, remat="attention"), {}, False),
    "gradient accumulation": Feature(LOCAL, dict(grad_accum_steps=2), True),
    "experts, capacity": Feature(
        dict(GQA, ff_bias=False, experts=dict(EXPERTS, capacity_factor=0.9, expert_dropout=0.1)),
        {},
        True,
    ),
    "latent attention, groups of experts": Feature(
        dict(ROPE, gated_ffn=True, norm="rmsnorm", latent_attention=LATENT, experts=dict(EXPERTS, **GROUPED)), {}, True
    ),
    "sinks, experts with biases": Feature(
        dict(
            LOCAL, attention_sinks=True, activation="clamped-swiglu",
            experts=dict(EXPERTS, bias=True, router_bias=True, capacity_factor=2.0),
        ),
        {},
        True,
    ),
    "experts, dropless": Feature(
        dict(GQA, ff_bias=False, remat="full", experts=dict(EXPERTS, aux_loss_scope="sequence")),
        dict(grad_accum_steps=2),
        False,
    ),
    "encoder-decoder": Feature(dict(ENCODER_DECODER, gated_ffn=True, remat="full"), dict(grad_accum_steps=2), False),
    "encoder-decoder, experts, capacity": Feature(
        dict(ENCODER_DECODER, experts=dict(EXPERTS, n_experts_per_token=1, capacity_factor=0.9)),
        {},
        False,
    ),
    "experts, shared capacity": Feature(
        dict(GQA, ff_bias=False, experts=dict(EXPERTS, capacity_factor=0.9, expert_dropout=0.1, group_size=BATCH_SIZE)),
        {},
        False,
    ),
    # The auxiliary loss is computed per microbatch, so one device uses as many microbatches. Pipeline stages have separate
    # random keys, so router jitter is disabled.
    "experts, pipeline": Feature(
        dict(GQA, ff_bias=False, experts=dict(EXPERTS, router_jitter=0.0, capacity_factor=0.9, group_size=4)),
        dict(grad_accum_steps=4),
        True,
    ),
}  # fmt: skip
MESHES = {
    4: ("pipeline=2 tensor=2", "fsdp=2 context=2", "expert=2 tensor=2"),
    8: (
        "data=8",
        "fsdp=8",
        "tensor=8",
        "context=8",
        "tensor=4 data=2 sequence_parallel",
        "context=4 tensor=2",
        "data=2 fsdp=2 tensor=2 sequence_parallel",
        "fsdp=2 context=2 tensor=2 sequence_parallel",
        "pipeline=4 data=2",
        "pipeline=4 fsdp=2 gpipe",
        "pipeline=2 context=2 tensor=2 sequence_parallel",
        "pipeline=2 fsdp=2 tensor=2 gpipe",
        "slices=2 data=2 fsdp=2 tensor=2",
        "expert=8",
        "data=2 expert=4",
        "fsdp=2 expert=4",
        "expert=4 tensor=2",
        "expert=4 context=2",
        "data=2 fsdp=2 expert=2",
        "expert=2 context=2 tensor=2 sequence_parallel",
        "pipeline=2 expert=4",
        "pipeline=2 expert=2 tensor=2 gpipe",
    ),
    16: (
        "data=2 fsdp=2 context=2 tensor=2 sequence_parallel",
        "pipeline=2 fsdp=2 context=2 tensor=2 sequence_parallel",
        "pipeline=4 data=2 tensor=2",
        "slices=2 data=4 context=4",
        "data=2 fsdp=2 expert=2 tensor=2",
        "pipeline=2 fsdp=2 expert=2 context=2",
    ),
}


class Case(NamedTuple):
    """A mesh and a feature."""

    name: str
    mesh: str  # "AXIS=SIZE ...", and flags such as sequence_parallel
    feature: str  # a key of FEATURES


class TrainingResult(NamedTuple):
    """Losses of STEPS + 1 steps, and arrays after STEPS steps."""

    losses: np.ndarray
    arrays: dict[str, np.ndarray]  # "gradient/..." and "parameter/..."


class Difference(NamedTuple):
    """Largest relative differences of a case."""

    loss: float
    gradient: float
    parameter: float


def main(arguments: list[str]) -> int:
    """Run the cases and print a table."""
    parser = make_parser(__doc__ or "")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="TEXT",
        help="run only cases whose name contains TEXT; repeatable: all texts",
    )
    parser.add_argument("--processes", type=int, default=1, help="number of processes; default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print one JSON object per case")
    parser.add_argument("--worker", nargs=2, metavar=("ADDRESS", "INDEX"), help="used internally by --processes")
    options = parser.parse_args(arguments)
    if options.processes > 1 and not options.worker:
        return _start_workers(options.processes, arguments)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(MESHES) // options.processes)
    jax.config.update("jax_disable_most_optimizations", True)  # compilation takes most of the time
    if options.worker:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(options.worker[0], options.processes, int(options.worker[1]))
    failed = 0
    for case in list_cases(options.only):
        result = train(case.mesh, case.feature)  # by all processes together
        if jax.process_index() == 0:
            difference = compare(result, _train_on_one_device(case.feature))
            failed += max(difference) > TOLERANCE
            if options.json:
                print(json.dumps({"case": case.name, **difference._asdict()}), flush=True)
            else:
                print(f"{case.name:<88}" + " ".join(f"{number:9.1e}" for number in difference), flush=True)
    if jax.process_index() == 0 and not options.json:
        print(f"largest relative difference of loss, gradient, parameter; {failed} case(s) above {TOLERANCE:g}")
    return int(failed > 0)


def list_cases(only: Sequence[str]) -> list[Case]:
    """Return every case whose name contains all texts of `only`."""
    cases = [
        Case(f"{count} devices: {mesh:<56} {feature}", mesh, feature)
        for count, meshes in MESHES.items()
        for mesh in meshes
        for feature in FEATURES
        if is_supported(mesh, feature)
    ]
    return [case for case in cases if all(text in case.name for text in only)]


def is_supported(mesh: str, feature: str) -> bool:
    """Return whether a mesh supports a feature, and testing them together adds coverage."""
    has_experts = "experts" in feature
    if "pipeline" in mesh:
        # A pipeline always accumulates gradients over microbatches.
        if feature == "gradient accumulation" or (has_experts and feature != "experts, pipeline"):
            return False
    elif feature == "experts, pipeline":
        return False
    if "encoder" in feature and ("pipeline" in mesh or "context" in mesh):  # not implemented
        return False
    return has_experts or "expert" not in mesh  # without experts, the expert axis is another batch axis


def compare(result: TrainingResult, expected: TrainingResult) -> Difference:
    """Return the largest relative differences: of the losses, and of the norms of each gradient and parameter."""
    largest = {"gradient": 0.0, "parameter": 0.0}
    for name, array in expected.arrays.items():
        kind = name.split("/")[0]
        # The exact gradient of a key's bias is zero and the computed gradient is rounding: use the scale of the query's bias.
        scale = np.linalg.norm(expected.arrays[name.replace("/b_k", "/b_q")])
        largest[kind] = max(largest[kind], float(np.linalg.norm(result.arrays[name] - array) / scale))
    return Difference(float(np.max(np.abs(result.losses / expected.losses - 1))), **largest)


@functools.cache
def _train_on_one_device(feature: str) -> TrainingResult:
    return train("data=1", feature)


def train(mesh: str, feature: str) -> TrainingResult:
    """Train for STEPS steps; the initial state and the batches are the same for all meshes."""
    config = make_config(mesh, feature)
    size = math.prod(config.mesh.data if axis == "data" else getattr(config.mesh, axis) for axis in MESH_AXES)
    layout = make_layout(config.mesh, choose_devices(size))
    state, axes = _init_state(feature)
    shardings = state_shardings(layout, state, axes)
    state = jax.tree.map(_to_devices, state, shardings)
    step = make_train_step(config)

    def step_with_layout(state: Any, batch: Batch) -> Any:
        with use_layout(layout):
            return step(state, batch)

    compiled = jax.jit(step_with_layout, out_shardings=(shardings, None))
    losses = []
    arrays = {}
    for index in range(STEPS + 1):
        arrays = {f"parameter/{name}": leaf for name, leaf in flatten_state(state.params).items()}
        state, metrics = compiled(state, shard_batch(make_batch(index, feature), layout))
        losses.append(float(metrics["loss"]))
    # With beta1 = 0 the first moment of the optimizer is the last gradient, taken at the parameters after STEPS steps.
    moments = flatten_state(state.opt_state)
    arrays |= {f"gradient/{name.partition('/mu/')[2]}": leaf for name, leaf in moments.items() if "/mu/" in name}
    return TrainingResult(np.array(losses), {name: gather(leaf) for name, leaf in arrays.items()})


def choose_devices(size: int) -> list[Any]:
    """Return `size` devices, the same number from each process; for size 1, a device of this process."""
    if size == 1:
        return jax.local_devices()[:1]
    per_process = size // jax.process_count()
    chosen = []
    for index in range(jax.process_count()):
        chosen += [device for device in jax.devices() if device.process_index == index][:per_process]
    return chosen


@functools.cache
def _init_state(feature: str) -> tuple[Any, Any]:
    """Return the initial state as NumPy arrays, made on one device, and its logical axes."""
    config = make_config("data=1", feature)
    state = jax.jit(make_init_state(config))(jax.random.key(0))
    return jax.tree.map(np.asarray, state), describe_state(config)[1]


def _to_devices(x: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def make_config(mesh: str, feature: str) -> Config:
    """Return the configuration of a case."""
    model, train, isolate_documents = FEATURES[feature]
    sizes: dict[str, Any] = dict(data=1)
    for word in mesh.split():
        key, _, value = word.partition("=")
        sizes |= {"pipeline_schedule": word} if word == "gpipe" else {key: int(value) if value else True}
    kv_heads = model.get("n_kv_heads")
    if kv_heads and kv_heads % sizes.get("tensor", 1):
        sizes["rules"] = {"kv_heads": ""}
    if sizes.get("pipeline", 1) > 1:
        train = dict(train, grad_accum_steps=4)
    table = {
        "model": dict(dict(n_layers=8, d_model=16, n_heads=8, n_vocab=N_VOCAB, seq_len=SEQ_LEN), **model),
        "mesh": sizes,
        "data": {"train": {"numbers": {"path": "unused"}}, "isolate_documents": isolate_documents},
        "optimizer": dict(
            learning_rate=1e-3, end_learning_rate=1e-4, warmup_steps=1, beta1=0.0, clip_norm=0.0, eps=1e-6
        ),
        "train": dict(train, steps=40, batch_size=BATCH_SIZE),
    }
    return parse_config(table, where="case")


def make_batch(index: int, feature: str) -> Batch:
    """Return random tokens, some of them masked; with isolated documents, three of unequal length per sequence."""
    rng = np.random.default_rng(index)
    config = make_config("data=1", feature)
    if config.model.n_encoder_layers is not None:
        tokens = rng.integers(0, N_VOCAB, (BATCH_SIZE, config.target_len + 1), dtype=np.int32)
        ones = np.ones_like(tokens[:, 1:])
        mask = (rng.random(tokens[:, 1:].shape) < 0.9).astype(np.float32)
        encoder_tokens = rng.integers(0, N_VOCAB, (BATCH_SIZE, SEQ_LEN), dtype=np.int32)
        return Batch(tokens[:, :-1], tokens[:, 1:], ones, ones, mask, encoder_tokens)
    tokens = rng.integers(0, N_VOCAB, (BATCH_SIZE, SEQ_LEN + 1), dtype=np.int32)
    segment_ids = np.ones((BATCH_SIZE, SEQ_LEN), np.int32)
    positions = np.tile(np.arange(SEQ_LEN, dtype=np.int32), (BATCH_SIZE, 1))
    if FEATURES[feature].isolate_documents:
        for i in range(BATCH_SIZE):
            for start in sorted(rng.choice(np.arange(2, SEQ_LEN), 2, replace=False)):
                segment_ids[i, start:] += 1
                positions[i, start:] = np.arange(SEQ_LEN - start)
    mask = (rng.random((BATCH_SIZE, SEQ_LEN)) < 0.9).astype(np.float32)
    return Batch(tokens[:, :-1], tokens[:, 1:], segment_ids, positions, mask)


def shard_batch(batch: Batch, layout: MeshLayout) -> Batch:
    """Shard a batch over the mesh; every process has all of its sequences."""
    return jax.tree.map(lambda x: _to_devices(x, layout.sharding(("batch", "sequence"), x.shape, "batch")), batch)


def gather(array: jax.Array) -> np.ndarray:
    """Return a global array as a NumPy array in every process."""
    from jax.experimental import multihost_utils

    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def _start_workers(count: int, arguments: list[str]) -> int:
    address = f"127.0.0.1:{find_port()}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    workers = [
        subprocess.Popen([sys.executable, __file__, *arguments, "--worker", address, str(index)], env=environment)
        for index in range(count)
    ]
    try:
        return max(worker.wait() for worker in workers)
    finally:
        for worker in workers:
            worker.kill()


if __name__ == "__main__":
    sys.exit(run_command(main))

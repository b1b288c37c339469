# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""A sharded run is the run of one device: every mesh with every feature, loss, gradients and parameters after 5 steps.

Each row trains the same small model on the same batches for five optimizer steps on a mesh of CPU devices and on one
device, and prints the largest relative differences: of the five losses, of every array's gradient at the end (norm of
the difference over norm of the array), and of every parameter. Exit status 1 if one exceeds the tolerance.

examples:
  python scripts/stress/sharding.py
      the whole grid on 4, 8 and 16 devices
  python scripts/stress/sharding.py --only "context=4" --only "tensor=2"
      rows whose name contains all of these
  python scripts/stress/sharding.py --processes 4 --only "tensor=2 context=2"
      the devices of each row belong to four processes of this machine (Gloo)
  python scripts/stress/sharding.py --processes 4 --only "4 devices"
      one device in each process, so that every axis spans processes
"""

import functools
import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mesh_transformer.cli import make_parser, run_command
from mesh_transformer.config import Config, parse_config
from mesh_transformer.config.presets import T5
from mesh_transformer.data.loader import Batch
from mesh_transformer.mesh import MESH_AXES, MeshLayout, make_layout, use_layout
from mesh_transformer.train.state import describe_state, flatten_state, make_init_state, state_shardings
from mesh_transformer.train.step import make_train_step

N_VOCAB, SEQ_LEN, BATCH, STEPS = 64, 32, 16, 5
TOLERANCE = 1e-5
ROTARY = dict(positions="rope-half", qkv_bias=False, tied_embeddings=False, head_bias=True)
GROUPED = dict(ROTARY, n_kv_heads=4, gated_ffn=True, norm="rmsnorm")
LOCAL = dict(GROUPED, attention_pattern=["global", "local"], attention_window=5)

READING = {key: value for key, value in T5.items() if key not in ("n_vocab", "seq_len")} | dict(n_encoder_layers=4)
EXPERTS = dict(n_experts=8, n_experts_per_token=2, layer_interval=2, router_jitter=0.1)

# name -> [model] keys, [train] keys, whether documents are kept apart
FEATURES: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "tied": ({}, {}, False),
    "grouped, loss in pieces": (GROUPED, dict(loss_chunks=2, z_loss=1e-3), False),
    "local, packed": (LOCAL, {}, True),
    "local, packed, remat": (dict(LOCAL, remat="full"), dict(loss_chunks=2), True),
    "blocked": (dict(LOCAL, attention_kernel="blockwise"), {}, True),
    "alibi, dots": (dict(positions="alibi", remat="dots"), {}, False),
    "remat attention": (dict(GROUPED, remat="attention"), {}, False),
    "accumulated": (LOCAL, dict(grad_accum_steps=2), True),
    "experts with seats": (
        dict(GROUPED, ff_bias=False, experts=dict(EXPERTS, capacity_factor=0.9, expert_dropout=0.1)),
        {},
        True,
    ),
    "experts, all taken": (
        dict(GROUPED, ff_bias=False, remat="full", experts=dict(EXPERTS, aux_loss_scope="sequence")),
        dict(grad_accum_steps=2),
        False,
    ),
    "encoder and decoder": (dict(READING, gated_ffn=True, remat="full"), dict(grad_accum_steps=2), False),
    "encoder and decoder, experts with seats": (
        dict(READING, experts=dict(EXPERTS, n_experts_per_token=1, capacity_factor=0.9)),
        {},
        False,
    ),
    "experts, seats shared": (
        dict(GROUPED, ff_bias=False, experts=dict(EXPERTS, capacity_factor=0.9, expert_dropout=0.1, group=BATCH)),
        {},
        False,
    ),
    # Balance is that of a microbatch, so that one device takes as many; stages draw noise of their own, so there is none.
    "experts in stages": (
        dict(GROUPED, ff_bias=False, experts=dict(EXPERTS, router_jitter=0.0, capacity_factor=0.9, group_size=4)),
        dict(grad_accum_steps=4),
        True,
    ),
}
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


class Found(NamedTuple):
    """What a run of a few steps leaves."""

    losses: np.ndarray
    arrays: dict[str, np.ndarray]  # "gradient/..." and "parameter/..."


class Difference(NamedTuple):
    """Largest relative differences of a row."""

    loss: float
    gradient: float
    parameter: float


def main(arguments: list[str]) -> int:
    """Run the rows and print the table."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="rows whose name contains this")
    parser.add_argument(
        "--processes", type=int, default=1, help="processes that share the devices; default: %(default)s"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    parser.add_argument("--worker", nargs=2, metavar=("ADDRESS", "INDEX"), help="used by --processes")
    options = parser.parse_args(arguments)
    if options.processes > 1 and not options.worker:
        return _start_workers(options.processes, arguments)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(MESHES) // options.processes)
    jax.config.update("jax_disable_most_optimizations", True)  # a row is mostly compilation
    if options.worker:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(options.worker[0], options.processes, int(options.worker[1]))
    failed = 0
    for name, mesh, feature in list_rows(options.only):
        found = train(mesh, feature)  # by all processes together
        if jax.process_index() == 0:
            difference = compare(found, _alone(feature))
            failed += max(difference) > TOLERANCE
            words = " ".join(f"{number:9.1e}" for number in difference)
            print(
                json.dumps({"row": name, **difference._asdict()}) if options.json else f"{name:<88}{words}", flush=True
            )
    if jax.process_index() == 0 and not options.json:
        print(f"largest relative difference of loss, gradient, parameter; {failed} row(s) above {TOLERANCE:g}")
    return int(failed > 0)


def list_rows(only: Sequence[str]) -> list[tuple[str, str, str]]:
    """(name, mesh, feature) of every row whose name contains all of `only`."""
    rows = []
    for count, meshes in MESHES.items():
        for mesh in meshes:
            for feature in FEATURES:
                # "accumulated" tells nothing new where microbatches go through stages anyway, and without experts their
                # axis is one more of the batch
                fits = feature == "experts in stages" or (feature != "accumulated" and "experts" not in feature)
                fits = fits if "pipeline" in mesh else feature != "experts in stages"
                fits &= "encoder" not in feature or not ("pipeline" in mesh or "context" in mesh)  # which refuse one
                if fits and ("expert" not in mesh or "experts" in feature):
                    rows.append((f"{count} devices: {mesh:<56} {feature}", mesh, feature))
    return [row for row in rows if all(text in row[0] for text in only)]


def compare(found: Found, wanted: Found) -> Difference:
    """The largest relative differences: of the losses, and by norm of each array's gradient and value."""
    apart = {"gradient": 0.0, "parameter": 0.0}
    for name, array in wanted.arrays.items():
        kind = name.split("/")[0]
        # The gradient of a key's bias is zero but for rounding, and its Adam step noise: measured on the query's scale.
        scale = np.linalg.norm(wanted.arrays[name.replace("/b_k", "/b_q")])
        apart[kind] = max(apart[kind], float(np.linalg.norm(found.arrays[name] - array) / scale))
    return Difference(float(np.max(np.abs(found.losses / wanted.losses - 1))), **apart)


@functools.cache
def _alone(feature: str) -> Found:
    return train("data=1", feature)


def train(mesh: str, feature: str) -> Found:
    """Five steps of a feature's model from the same start on the same batches."""
    config = make_config(mesh, feature)
    size = math.prod(config.mesh.data if axis == "data" else getattr(config.mesh, axis) for axis in MESH_AXES)
    layout = make_layout(config.mesh, choose_devices(size))
    state, axes = _start(feature)
    shardings = state_shardings(layout, state, axes)
    state = jax.tree.map(_put, state, shardings)
    step = make_train_step(config)

    def traced(state: Any, batch: Batch) -> Any:
        with use_layout(layout):
            return step(state, batch)

    compiled = jax.jit(traced, out_shardings=(shardings, None))
    losses, arrays = [], {}
    for index in range(STEPS + 1):
        arrays = {f"parameter/{name}": leaf for name, leaf in flatten_state(state.params).items()}
        state, metrics = compiled(state, place(make_batch(index, feature), layout))
        losses.append(float(metrics["loss"]))
    # Without momentum the optimizer's first moment is the last gradient: that at the parameters after STEPS steps.
    moments = flatten_state(state.opt_state)
    arrays |= {f"gradient/{name.partition('/mu/')[2]}": leaf for name, leaf in moments.items() if "/mu/" in name}
    return Found(np.array(losses), {name: whole(leaf) for name, leaf in arrays.items()})


def choose_devices(size: int) -> list[Any]:
    """This many devices, as many of every process as of any other; one: this process's own."""
    if size == 1:
        return jax.local_devices()[:1]
    each = size // jax.process_count()
    owned = [[d for d in jax.devices() if d.process_index == index][:each] for index in range(jax.process_count())]
    return [device for devices in owned for device in devices]


@functools.cache
def _start(feature: str) -> tuple[Any, Any]:
    """The first state, made on one device, as numpy arrays, and its logical axes."""
    config = make_config("data=1", feature)
    state = jax.jit(make_init_state(config))(jax.random.key(0))
    return jax.tree.map(np.asarray, state), describe_state(config)[1]


def _put(x: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def make_config(mesh: str, feature: str) -> Config:
    """The run of a row."""
    model, train, isolated = FEATURES[feature]
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
        "data": {"train": {"numbers": {"path": "made-up"}}, "isolate_documents": isolated},
        "optimizer": dict(
            learning_rate=1e-3, end_learning_rate=1e-4, warmup_steps=1, beta1=0.0, clip_norm=0.0, eps=1e-6
        ),
        "train": dict(train, steps=40, batch_size=BATCH),
    }
    return parse_config(table, where="row")


def make_batch(index: int, feature: str) -> Batch:
    """Random tokens; three documents of unequal length in a row where documents are kept apart, and some masked tokens."""
    rng, config = np.random.default_rng(index), make_config("data=1", feature)
    if config.model.n_encoder_layers is not None:
        tokens = rng.integers(0, N_VOCAB, (BATCH, config.target_len + 1), dtype=np.int32)
        ones, mask = np.ones_like(tokens[:, 1:]), (rng.random(tokens[:, 1:].shape) < 0.9).astype(np.float32)
        sources = rng.integers(0, N_VOCAB, (BATCH, SEQ_LEN), dtype=np.int32)
        return Batch(tokens[:, :-1], tokens[:, 1:], ones, ones, mask, sources)
    tokens = rng.integers(0, N_VOCAB, (BATCH, SEQ_LEN + 1), dtype=np.int32)
    segments, positions = np.ones((BATCH, SEQ_LEN), np.int32), np.tile(np.arange(SEQ_LEN, dtype=np.int32), (BATCH, 1))
    if FEATURES[feature][2]:
        for row in range(BATCH):
            for cut in sorted(rng.choice(np.arange(2, SEQ_LEN), 2, replace=False)):
                segments[row, cut:] += 1
                positions[row, cut:] = np.arange(SEQ_LEN - cut)
    mask = (rng.random((BATCH, SEQ_LEN)) < 0.9).astype(np.float32)
    return Batch(tokens[:, :-1], tokens[:, 1:], segments, positions, mask)


def place(batch: Batch, layout: MeshLayout) -> Batch:
    """The batch on the mesh; every process has all of it and gives its devices their parts."""

    return jax.tree.map(lambda x: _put(x, layout.sharding(("batch", "sequence"), x.shape, "batch")), batch)


def whole(array: jax.Array) -> np.ndarray:
    """A global array in this process's memory."""
    from jax.experimental import multihost_utils

    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def _start_workers(count: int, arguments: list[str]) -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
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

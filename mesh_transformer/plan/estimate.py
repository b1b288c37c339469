# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""A training step's memory, FLOPs and traffic from formulas, for choosing what to compile and where nothing can compile.

Memory of one device:

    state         every array of it, cut as the rules say
    gradients     float32, of the parameters' shapes; twice where microbatches add up
    activations   for each layer what remat leaves (`_kept_per_token`)
    working set   the larger of the loss (14 bytes for each logit of a piece, and the whole gradient of its weights)
                  and one layer: attention scores (10 bytes an entry, where they are made at all), the feed-forward's
                  hidden units (6 bytes) and its gathered weights

Traffic: fsdp gathers bfloat16 weights for the forward and the backward pass of every microbatch and reduces gradients
once for each; tensor adds up the residual stream four times a layer (twice where attention and feed-forward are
parallel); data adds up gradients. Of experts only the rows count that they are given (model.routing.rows_per_token):
expert sends these there and back, forwards and backwards, and adds up gradients of all else. How far this is from what
compilers find: docs/plans.md.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

from mesh_transformer.config import Config, ModelConfig
from mesh_transformer.mesh import MESH_AXES, make_rules
from mesh_transformer.model.moe.router import count_expert_layers, expert_rows_per_token
from mesh_transformer.model.params import ParamInfo, flatten_names
from mesh_transformer.model.shapes import describe_params
from mesh_transformer.plan.hardware.topologies import Topology, parse_topology
from mesh_transformer.plan.job import CompiledStats, Traffic

SCORE_BYTES, LOGIT_BYTES, FFN_BYTES = 10, 14, 6
LABEL = "estimate from formulas, nothing compiled"


class MeshSizes(NamedTuple):
    """A mesh's sizes and into how many pieces each logical axis is cut."""

    sizes: dict[str, int]
    rules: dict[str, tuple[str, ...]]

    def num_shards(self, *axes: str) -> int:
        """Pieces of an array with these logical axes."""
        return math.prod(self.sizes[mesh_axis] for axis in axes for mesh_axis in self.rules[axis])


def mesh_sizes(config: Config, devices: int) -> MeshSizes:
    """The run's mesh over so many devices."""
    sizes = {axis: getattr(config.mesh, axis) for axis in MESH_AXES}
    if sizes["data"] == -1:
        sizes["data"] = max(devices // math.prod(size for axis, size in sizes.items() if axis != "data"), 1)
    rules = make_rules(config.mesh.rules)
    if config.mesh.sequence_parallel and "activation_seq" not in config.mesh.rules:
        rules["activation_seq"] = (*rules["sequence"], "tensor")
    return MeshSizes(sizes, rules)


def estimate_training(config: Config, topology_name: str, params: dict[str, ParamInfo] | None = None) -> CompiledStats:
    """What a compile would measure, estimated; `params` as `describe_model` gives them, if known already."""
    topology = parse_topology(topology_name)
    pieces = mesh_sizes(config, topology.devices)
    params = params or describe_model(config.model)
    model, train = config.model, config.train
    item = 2 if model.dtype == "bfloat16" else 4
    sizes = {name: math.prod(info.shape) / pieces.num_shards(*info.axes) for name, info in params.items()}
    held = sum(sizes.values())
    own_experts = sum(size for name, size in sizes.items() if "expert" in params[name].axes)
    total = sum(math.prod(info.shape) for info in params.values())
    tokens = train.batch_size * model.seq_len
    stacks = _find_stacks(config, params)
    rows = train.batch_size / train.grad_accum_steps / pieces.num_shards("batch")  # of a device's microbatch
    # Tokens of it that pass each of the decoder's layers; with an encoder as many as make up for its layers too.
    own = rows * sum(stack.model.n_layers * stack.length for stack in stacks) / model.n_layers
    moments = held * _moment_bytes(config)
    gradients = 4 * held
    plain = _makes_scores(model, topology)
    kept = model.n_layers * own / pieces.num_shards("sequence") * _activation_bytes(model, pieces, item, plain)
    logits = (
        rows
        * config.target_len
        / pieces.num_shards("sequence")
        / train.loss_chunks
        * model.n_vocab
        / pieces.num_shards("vocab")
    )
    head = 4 * model.d_model * model.n_vocab / pieces.num_shards("vocab")
    working = max(LOGIT_BYTES * logits + head, _layer_bytes(model, pieces, rows * model.seq_len, item, plain))
    peak = 4 * held + moments + gradients * (2 if train.grad_accum_steps > 1 else 1) + kept + working
    counted = [
        _flops(
            stack.model,
            count_active(stack.params, expert_rows_per_token(model), model),
            train.batch_size * stack.length,
        )
        for stack in stacks
    ]
    flops, again = (sum(numbers) for numbers in zip(*counted, strict=True))
    return CompiledStats(
        topology=topology_name,
        platform=topology.chip.platform if topology.chip else "cpu",
        devices=math.prod(pieces.sizes.values()),
        mesh=pieces.sizes,
        parameters=total,
        tokens=tokens,
        flops=flops,
        hardware_flops=flops + again,
        bytes_by_kind={
            "parameters": int(4 * held),
            "moments": int(moments),
            "batch": int(20 * tokens / pieces.num_shards("batch")),
        },
        gradient_bytes=int(gradients),
        argument_bytes=int(4 * held + moments + 20 * tokens / pieces.num_shards("batch")),
        peak_bytes=int(peak),
        activation_bytes=int(kept),
        logits_bytes=int(4 * logits),
        hbm_bytes=_hbm_bytes(config, held, own, item, pieces, plain),
        traffic=list(_traffic(config, pieces, held, own_experts, own, item, topology)),
        compiler=LABEL,
        state_bytes=int(total * (4 + moments / held)),
    )


class Stack(NamedTuple):
    """An encoder or a decoder, what is learned in it, and how many tokens of a sequence pass through it."""

    model: ModelConfig
    params: Mapping[str, ParamInfo]
    length: int


def _find_stacks(config: Config, params: Mapping[str, ParamInfo]) -> list[Stack]:
    """The decoder's with the head, which takes no part in looking tokens up; and the encoder's, if there is one."""
    inside = {name: info for name, info in params.items() if name.startswith("transformer/encoder/")}
    tables = set() if config.model.tied_embeddings else {"transformer/w_tokens"}
    rest = {name: info for name, info in params.items() if name not in inside.keys() | tables}
    found = [Stack(config.model, rest, config.target_len)]
    return (
        found if config.model.encoder is None else [*found, Stack(config.model.encoder, inside, config.model.seq_len)]
    )


def describe_model(model: ModelConfig) -> dict[str, ParamInfo]:
    """Shape and logical axes of every parameter by name."""
    return flatten_names(describe_params(dataclasses.replace(model, remat="none")))


def count_active(params: Mapping[str, ParamInfo], expert_rows: float, model: ModelConfig) -> float:
    """Parameters that a token meets, if experts compute `rows` for each token."""
    share = expert_rows / model.experts.n_experts if model.experts else 1.0
    return sum(math.prod(info.shape) * (share if "expert" in info.axes else 1.0) for info in params.values())


def _moment_bytes(config: Config) -> float:
    """Of each parameter."""
    first = 2 if config.optimizer.moment_dtype == "bfloat16" else 4
    match config.optimizer.name:
        case "adamw":
            return first + 4
        case "adafactor":
            return first if config.optimizer.beta1 else 0.0
        case _:
            return first


def _makes_scores(model: ModelConfig, topology: Topology) -> bool:
    """Whether attention writes all its scores: not on accelerators, where kernels go by blocks, nor with long CPU rows."""
    if model.attention_kernel != "auto":
        return model.attention_kernel == "dense"
    return topology.chip is None and model.seq_len <= 1024


def _activation_bytes(model: ModelConfig, pieces: MeshSizes, item: int, plain: bool) -> float:
    """Bytes that one layer keeps for each token's backward pass; with full remat, one period of layers its input."""
    period = len(model.pattern)
    stream = model.d_model * item / (pieces.num_shards("activation_seq") / pieces.num_shards("sequence"))
    mixed = model.n_heads * model.head_dim * item / pieces.num_shards("heads")
    heads = mixed + 2 * model.kv_heads * model.head_dim * item / pieces.num_shards("kv_heads")
    hidden = _ffn_rows(model) / period * model.ff_dim * item * (2 if model.gated_ffn else 1) / pieces.num_shards("ff")
    scores = 6 * model.n_heads / pieces.num_shards("heads") * model.seq_len if plain else mixed
    match model.remat:
        case "none":
            return 5 * stream + 2 * heads + hidden + scores
        case "dots":
            return stream / period + 2 * stream + heads + hidden
        case "attention":
            return 4 * stream + heads + hidden
        case "offload":
            return 0.0
        case _:
            return stream / period


def _layer_bytes(model: ModelConfig, pieces: MeshSizes, own: float, item: int, plain: bool) -> float:
    """One period of layers at work: scores or the heads' arrays, hidden units, and a layer's gathered weights."""
    own /= pieces.num_shards("sequence")
    mixed = 6 * item * model.n_heads * model.head_dim / pieces.num_shards("heads")
    scores = SCORE_BYTES * model.n_heads / pieces.num_shards("heads") * model.seq_len if plain else mixed
    rows = _ffn_rows(model)
    hidden = FFN_BYTES * rows * model.ff_dim / pieces.num_shards("ff") * (2 if model.gated_ffn else 1)
    layers = own * ((scores + 4 * item * model.d_model) * len(model.pattern) + hidden)
    n_experts = model.experts.n_experts / pieces.num_shards("expert") if model.experts else 1.0
    return layers + 2 * item * _layer_weights(model, max(n_experts, 1.0)) / pieces.num_shards("ff")


def _ffn_rows(model: ModelConfig) -> float:
    """Rows of hidden units that a period of layers computes for each token."""
    rows = expert_rows_per_token(model) + (1.0 if model.experts and model.experts.shared_expert else 0.0)
    return sum(rows if has_experts else 1.0 for _, has_experts in model.pattern)


def _layer_weights(model: ModelConfig, feed_forwards: float) -> float:
    """Of attention and so many feed-forward layers."""
    attention = 2 * model.d_model * (model.n_heads + model.kv_heads) * model.head_dim
    return attention + feed_forwards * model.d_model * model.ff_dim * (3 if model.gated_ffn else 2)


def _flops(model: ModelConfig, parameters: float, tokens: int) -> tuple[float, float]:
    """The model's own, and what remat computes again."""
    products = 2.0 * parameters * tokens
    attention = 4.0 * model.n_layers * model.n_heads * model.head_dim * model.seq_len * tokens
    mean_rows = _ffn_rows(model) / len(model.pattern)
    layers = 2.0 * model.n_layers * _layer_weights(model, mean_rows) * tokens + attention
    again = {"none": 0.0, "dots": attention, "attention": attention}.get(model.remat, layers)
    return 3.0 * (products + attention), again


def _hbm_bytes(config: Config, held: float, own: float, item: int, pieces: MeshSizes, plain: bool) -> float:
    """State read and written, weights read three times, and about thirty passes over each layer's activations."""
    model, micro = config.model, config.train.grad_accum_steps
    state = held * (2 * (4 + _moment_bytes(config)) + 8)
    weights = 3 * item * held * pieces.sizes["fsdp"] * micro
    stream = 30 * item * model.d_model * own * model.n_layers * micro
    scores = 4 * SCORE_BYTES * own * model.n_heads / pieces.num_shards("heads") * model.seq_len * model.n_layers * micro
    scores *= plain
    logits = 2 * LOGIT_BYTES * own * model.n_vocab / pieces.num_shards("vocab") * micro
    return state + weights + stream + scores + logits


def _traffic(
    config: Config, pieces: MeshSizes, held: float, own_experts: float, own: float, item: int, topology: Topology
) -> list[Traffic]:
    model, micro = config.model, config.train.grad_accum_steps
    sizes, rows = pieces.sizes, []

    def add(axis: str, kind: str, count: int, sent: float) -> None:
        if sizes.get(axis, 1) > 1:
            outer, dims, wrapped = _locate_axis(axis, sizes, topology)
            rows.append(Traffic([axis], kind, sizes[axis], count, sent, dims, wrapped, outer))

    fsdp, data, tensor = sizes["fsdp"], sizes["data"], sizes["tensor"]
    add("fsdp", "all-gather", 2 * model.n_layers * micro, 2 * micro * item * held * (fsdp - 1))
    add("fsdp", "reduce-scatter", model.n_layers * micro, micro * item * held * (fsdp - 1))
    add("data", "all-reduce", model.n_layers, 2 * 4 * held * (data - 1) / data)
    sums = (2 if model.residual != "serial" else 4) * (1.5 if model.remat not in ("none", "dots") else 1)
    stream = own * model.d_model * item
    if model.experts is not None:
        expert, passes = sizes["expert"], 4 + 2 * (model.remat not in ("none", "dots"))
        moved, count = (
            stream * expert_rows_per_token(model) * (expert - 1) / expert,
            passes * count_expert_layers(model) * micro,
        )
        add("expert", "all-to-all", count, count * moved)
        add("expert", "all-reduce", model.n_layers, 2 * 4 * (held - own_experts) * (expert - 1) / expert)
    add(
        "tensor",
        "all-reduce",
        int(sums * model.n_layers * micro),
        sums * model.n_layers * micro * 2 * stream * (tensor - 1) / tensor,
    )
    return rows


def _locate_axis(axis: str, sizes: dict[str, int], topology: Topology) -> tuple[int, int, bool]:
    """(slices or hosts spanned, directions of the torus, whether they close), without the devices themselves."""
    chip = topology.chip
    if chip is None:
        return 1, 1, False
    axes = list(sizes)
    inner = math.prod(sizes[a] for a in axes[axes.index(axis) + 1 :])
    span = sizes[axis] * inner
    if chip.platform == "gpu":
        return max(1, min(sizes[axis], math.ceil(span / chip.per_host))), 1, False
    outer = topology.slices if axis == "data" and topology.slices > 1 else 1
    within = sizes[axis] / outer / (chip.devices if axis == axes[-1] else 1)
    dims = 0 if within <= 1 else next((n for n in (1, 2) if within <= max(topology.shape) ** n), 3)
    return outer, dims, len(topology.shape) == 3 and math.prod(topology.shape) >= 64

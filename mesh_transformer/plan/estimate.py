# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Estimates of the memory, FLOPs and traffic of a training step by formulas, without compilation.

They select the candidates that a search compiles, and replace compilation if no compiler is installed. Memory of one
device:

    state         every array of the training state, sharded by the mesh rules
    gradients     float32, with the parameters' shapes; twice if microbatches are accumulated
    activations   for each layer the arrays that remat saves (`_activation_bytes`)
    working set   the larger of the loss (14 bytes per logit of a chunk, and the full gradient of its weights) and one
                  layer: attention scores (10 bytes per entry, if they are stored), the feed-forward's hidden units
                  (6 bytes) and its gathered weights

Traffic by mesh axis: `fsdp` gathers bfloat16 weights for the forward and the backward pass of every microbatch and reduces
gradients once per microbatch; `tensor` reduces the residual stream four times per layer (twice if attention and
feed-forward are parallel); `data` reduces gradients. For experts, only the rows that they process count
(model.moe.router.expert_rows_per_token): `expert` sends these in both directions, forward and backward, and reduces the
gradients of all other parameters. docs/plans.md states the error compared with compiled programs.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mesh_transformer.config import Config, ModelConfig, OptimizerConfig
from mesh_transformer.mesh import MESH_AXES, make_rules
from mesh_transformer.model.moe.router import count_expert_layers, expert_rows_per_token
from mesh_transformer.model.params import STACK, ParamInfo, flatten_names
from mesh_transformer.model.shapes import describe_params
from mesh_transformer.plan.hardware.topologies import Topology, parse_topology
from mesh_transformer.plan.job import CompiledStats, Traffic
from mesh_transformer.train.loss import require_head
from mesh_transformer.train.optimizer import make_optimizer, optimizer_state_axes

SCORE_BYTES = 10  # per attention score
LOGIT_BYTES = 14  # per logit
FFN_BYTES = 6  # per hidden unit of the feed-forward
LABEL = "estimated from formulas, not compiled"


class MeshSizes(NamedTuple):
    """Sizes of the mesh axes, and the mesh axes over which each logical axis is sharded."""

    sizes: dict[str, int]
    rules: dict[str, tuple[str, ...]]

    def num_shards(self, *axes: str) -> int:
        """Return the number of shards of an array with these logical axes."""
        return math.prod(self.sizes[mesh_axis] for axis in axes for mesh_axis in self.rules[axis])


def mesh_sizes(config: Config, devices: int) -> MeshSizes:
    """Return the mesh of a run over `devices` devices."""
    sizes = {axis: getattr(config.mesh, axis) for axis in MESH_AXES}
    if sizes["data"] == -1:
        sizes["data"] = max(devices // math.prod(size for axis, size in sizes.items() if axis != "data"), 1)
    rules = make_rules(config.mesh.rules)
    if config.mesh.sequence_parallel and "activation_seq" not in config.mesh.rules:
        rules["activation_seq"] = (*rules["sequence"], "tensor")
    return MeshSizes(sizes, rules)


class _Step(NamedTuple):
    """Quantities of a training step on one device that several formulas use."""

    config: Config
    topology: Topology
    mesh: MeshSizes
    itemsize: int  # bytes of one element of the activations
    n_params: float
    n_expert_params: float  # the part of n_params in experts
    moment_bytes: float
    tokens: float  # tokens of a microbatch; the encoder's layers are counted as additional tokens of the decoder
    stores_scores: bool  # whether attention writes its scores to memory


def estimate_training(config: Config, topology_name: str, params: dict[str, ParamInfo] | None = None) -> CompiledStats:
    """Estimate the statistics of a compiled training step; `params` is the result of `describe_model`, if known."""
    require_head(config.model)
    topology = parse_topology(topology_name)
    mesh = mesh_sizes(config, topology.devices)
    params = params or describe_model(config.model)
    model, train = config.model, config.train
    sizes = {name: math.prod(info.shape) / mesh.num_shards(*info.axes) for name, info in params.items()}
    stacks = _find_stacks(config, params)
    sequences = train.batch_size / train.grad_accum_steps / mesh.num_shards("batch")  # per microbatch and device
    moments = describe_moments(config.optimizer, model)
    step = _Step(
        config=config,
        topology=topology,
        mesh=mesh,
        itemsize=2 if model.dtype == "bfloat16" else 4,
        n_params=sum(sizes.values()),
        n_expert_params=sum(size for name, size in sizes.items() if "expert" in params[name].axes),
        moment_bytes=sum(moment.nbytes / mesh.num_shards(*moment.axes) for moment in moments),
        tokens=sequences * sum(stack.model.n_layers * stack.length for stack in stacks) / model.n_layers,
        stores_scores=_stores_scores(model, topology),
    )
    parameter_bytes = 4 * step.n_params
    batch_bytes = 20 * train.batch_size * model.seq_len / mesh.num_shards("batch")
    activations = model.n_layers * step.tokens / mesh.num_shards("sequence") * _activation_bytes(step)
    chunk_tokens = sequences * config.target_len / mesh.num_shards("sequence") / train.loss_chunks
    logits = chunk_tokens * model.n_vocab / mesh.num_shards("vocab")
    head_gradient = 4 * model.token_embedding_dim * model.n_vocab / mesh.num_shards("vocab")
    working_set = max(LOGIT_BYTES * logits + head_gradient, _layer_bytes(step, sequences * model.seq_len))
    gradient_bytes = parameter_bytes * (2 if train.grad_accum_steps > 1 else 1)
    n_params = sum(math.prod(info.shape) for info in params.values())
    flops, recomputed = _total_flops(config, stacks)
    return CompiledStats(
        topology=topology_name,
        platform=topology.chip.platform if topology.chip else "cpu",
        devices=math.prod(mesh.sizes.values()),
        mesh=mesh.sizes,
        parameters=n_params,
        tokens=train.batch_size * model.seq_len,
        flops=flops,
        hardware_flops=flops + recomputed,
        bytes_by_kind={
            "parameters": int(parameter_bytes),
            "moments": int(step.moment_bytes),
            "batch": int(batch_bytes),
        },
        gradient_bytes=int(parameter_bytes),
        argument_bytes=int(parameter_bytes + step.moment_bytes + batch_bytes),
        peak_bytes=int(parameter_bytes + step.moment_bytes + gradient_bytes + activations + working_set),
        activation_bytes=int(activations),
        logits_bytes=int(4 * logits),
        hbm_bytes=_hbm_bytes(step),
        traffic=_traffic(step),
        compiler=LABEL,
        state_bytes=4 * n_params + sum(moment.nbytes for moment in moments),
    )


class Stack(NamedTuple):
    """An encoder or a decoder: its configuration, its parameters, and the number of tokens per sequence that it processes."""

    model: ModelConfig
    params: Mapping[str, ParamInfo]
    length: int


def _find_stacks(config: Config, params: Mapping[str, ParamInfo]) -> list[Stack]:
    """Return the stack with the LM head and, for an encoder-decoder model, the encoder.

    Embedding look-ups are excluded because they need no FLOPs, and the pooler and the classifier because they read only one
    token of a sequence.
    """
    encoder = {name: info for name, info in params.items() if name.startswith("transformer/encoder/")}
    embeddings = set() if config.model.tied_embeddings else {"transformer/w_tokens"}
    sequence_heads = ("transformer/pooler/", "transformer/classifier/")
    unused = encoder.keys() | embeddings | {name for name in params if name.startswith(sequence_heads)}
    decoder = {name: info for name, info in params.items() if name not in unused}
    stacks = [Stack(config.model, decoder, config.target_len)]
    if config.model.encoder is not None:
        stacks.append(Stack(config.model.encoder, encoder, config.model.seq_len))
    return stacks


def describe_model(model: ModelConfig) -> dict[str, ParamInfo]:
    """Return the shape and logical axes of every parameter by name."""
    return flatten_names(describe_params(dataclasses.replace(model, remat="none")))


class Moment(NamedTuple):
    """Size and logical axes of an array of the optimizer state."""

    nbytes: int
    axes: tuple[str, ...]


def describe_moments(optimizer: OptimizerConfig, model: ModelConfig) -> tuple[Moment, ...]:
    """Return size and axes of the arrays of an optimizer's state, by abstract evaluation of the optimizer."""
    return _describe_moments(optimizer, dataclasses.replace(model, remat="none"))  # remat does not change shapes


@functools.lru_cache(maxsize=64)  # a search requests the same state many times
def _describe_moments(optimizer: OptimizerConfig, model: ModelConfig) -> tuple[Moment, ...]:
    described = describe_params(model)
    axes = {module: {name: info.axes for name, info in arrays.items()} for module, arrays in described.items()}
    params = {
        module: {name: jax.ShapeDtypeStruct(info.shape, jnp.float32) for name, info in arrays.items()}
        for module, arrays in described.items()
    }
    steps = optimizer.warmup_steps + 1  # the schedule does not change the state
    state = jax.eval_shape(make_optimizer(optimizer, steps, axes).init, params)
    state_axes = optimizer_state_axes(state, params, axes)
    leaves, structure = jax.tree.flatten(state)
    return tuple(
        Moment(math.prod(leaf.shape) * leaf.dtype.itemsize, leaf_axes)
        for leaf, leaf_axes in zip(leaves, structure.flatten_up_to(state_axes), strict=True)
    )


def count_active(params: Mapping[str, ParamInfo], expert_rows: float, model: ModelConfig) -> float:
    """Return the number of parameters that process a token, if experts compute `expert_rows` rows per token.

    Parameters shared by several layers count once per layer.
    """
    share = expert_rows / model.experts.n_experts if model.experts else 1.0
    return sum(
        math.prod(info.shape)
        * (share if "expert" in info.axes else 1.0)
        * (model.layer_uses if STACK in info.axes else 1.0)
        for info in params.values()
    )


def _stores_scores(model: ModelConfig, topology: Topology) -> bool:
    """Return whether attention stores all scores, as the dense kernel does."""
    if model.attention_kernel != "auto":
        return model.attention_kernel == "dense"
    return topology.chip is None and model.seq_len <= 1024


def _activation_bytes(step: _Step) -> float:
    """Return the bytes per token that one layer saves for the backward pass, by model.remat."""
    model, mesh, itemsize = step.config.model, step.mesh, step.itemsize
    period = len(model.pattern)
    residual = model.d_model * itemsize / (mesh.num_shards("activation_seq") / mesh.num_shards("sequence"))
    attn_output = model.n_heads * model.head_dim * itemsize / mesh.num_shards("heads")
    kv = model.kv_heads * (model.head_dim + model.value_dim) * itemsize / mesh.num_shards("kv_heads")
    heads = attn_output + kv
    hidden = _hidden_units(model) * itemsize * (2 if model.gated_ffn else 1) / mesh.num_shards("ff")
    scores = 6 * model.n_heads / mesh.num_shards("heads") * model.seq_len if step.stores_scores else attn_output
    match model.remat:
        case "none":
            return 5 * residual + 2 * heads + hidden + scores
        case "dots":
            return residual / period + 2 * residual + heads + hidden
        case "attention":
            return 4 * residual + heads + hidden
        case "offload":
            return 0.0
        case "full":
            return residual / period


def _layer_bytes(step: _Step, tokens: float) -> float:
    """Return the working set of one period of layers: scores or attention arrays, hidden units, and gathered weights."""
    model, mesh, itemsize = step.config.model, step.mesh, step.itemsize
    attention = 6 * itemsize * model.n_heads * model.head_dim / mesh.num_shards("heads")
    if step.stores_scores:
        attention = SCORE_BYTES * model.n_heads / mesh.num_shards("heads") * model.seq_len
    hidden = FFN_BYTES * _hidden_units(model) / mesh.num_shards("ff") * (2 if model.gated_ffn else 1)
    per_token = (attention + 4 * itemsize * model.d_model + hidden) * len(model.pattern)
    n_experts = model.experts.n_experts / mesh.num_shards("expert") if model.experts else 0.0
    units = max(n_experts * model.expert_ff_dim, model.ff_dim)
    weights = 2 * itemsize * _layer_weights(model, units) / mesh.num_shards("ff")
    return tokens / mesh.num_shards("sequence") * per_token + weights


def _hidden_units(model: ModelConfig) -> float:
    """Return the number of feed-forward hidden units that a layer computes per token, on average over the layers."""
    shared = model.shared_ff_dim if model.experts and model.experts.shared_expert else 0
    sparse = expert_rows_per_token(model) * model.expert_ff_dim + shared
    return sum(sparse if kind.has_experts else model.ff_dim for kind in model.layer_kinds) / model.n_layers


def _layer_weights(model: ModelConfig, hidden_units: float) -> float:
    """Return the number of weights of an attention layer and a feed-forward layer with `hidden_units` hidden units."""
    return _attention_weights(model) + hidden_units * model.d_model * (3 if model.gated_ffn else 2)


def _attention_weights(model: ModelConfig) -> float:
    """Return the number of weights of an attention layer."""
    queries = model.n_heads * model.head_dim
    outputs = model.d_model * model.n_heads * model.value_dim
    latent = model.latent_attention
    if latent is None:
        return model.d_model * (queries + 2 * model.kv_heads * model.head_dim) + outputs
    projected = model.d_model * queries if latent.q_rank is None else latent.q_rank * (model.d_model + queries)
    up = latent.kv_rank * model.n_heads * (latent.d_unrotated + latent.d_value)
    return projected + model.d_model * (latent.kv_rank + latent.d_rotated) + up + outputs


def _total_flops(config: Config, stacks: list[Stack]) -> tuple[float, float]:
    """Return the model FLOPs of a step and the FLOPs that remat recomputes."""
    rows = expert_rows_per_token(config.model)
    flops = recomputed = 0.0
    for stack in stacks:
        n_params = count_active(stack.params, rows, config.model)
        stack_flops, stack_recomputed = _stack_flops(stack.model, n_params, config.train.batch_size * stack.length)
        flops += stack_flops
        recomputed += stack_recomputed
    return flops, recomputed


def _stack_flops(model: ModelConfig, n_params: float, tokens: int) -> tuple[float, float]:
    matmuls = 2.0 * n_params * tokens
    per_key = model.n_heads * (model.head_dim + model.value_dim)
    attention = 2.0 * model.n_layers * per_key * model.seq_len * tokens
    layers = 2.0 * model.n_layers * _layer_weights(model, _hidden_units(model)) * tokens + attention
    recomputed = {"none": 0.0, "dots": attention, "attention": attention}.get(model.remat, layers)
    return 3.0 * (matmuls + attention), recomputed


def _hbm_bytes(step: _Step) -> float:
    """Return the HBM traffic in bytes: state read and written, weights read 3 times, about 30 passes over activations."""
    model, mesh, itemsize = step.config.model, step.mesh, step.itemsize
    microbatches = step.config.train.grad_accum_steps
    state = 2 * (4 * step.n_params + step.moment_bytes) + 8 * step.n_params
    weights = 3 * itemsize * step.n_params * mesh.sizes["fsdp"] * microbatches
    tokens = step.tokens * microbatches
    residual = 30 * itemsize * model.d_model * tokens * model.n_layers
    scores = 4 * SCORE_BYTES * tokens * model.n_heads / mesh.num_shards("heads") * model.seq_len * model.n_layers
    logits = 2 * LOGIT_BYTES * tokens * model.n_vocab / mesh.num_shards("vocab")
    return state + weights + residual + scores * step.stores_scores + logits


def _traffic(step: _Step) -> list[Traffic]:
    model, itemsize = step.config.model, step.itemsize
    microbatches = step.config.train.grad_accum_steps
    sizes = step.mesh.sizes
    traffic: list[Traffic] = []

    def add(axis: str, kind: str, count: int, sent: float) -> None:
        if sizes.get(axis, 1) > 1:
            spanned, dims, wrapped = _locate_axis(axis, sizes, step.topology)
            traffic.append(Traffic([axis], kind, sizes[axis], count, sent, dims, wrapped, spanned))

    fsdp, data, tensor, expert = (sizes[axis] for axis in ("fsdp", "data", "tensor", "expert"))
    weights = microbatches * itemsize * step.n_params * (fsdp - 1)
    add("fsdp", "all-gather", 2 * model.n_layers * microbatches, 2 * weights)
    add("fsdp", "reduce-scatter", model.n_layers * microbatches, weights)
    add("data", "all-reduce", model.n_layers, 2 * 4 * step.n_params * (data - 1) / data)
    recomputes_layers = model.remat not in ("none", "dots")
    residual = step.tokens * model.d_model * itemsize
    if model.experts is not None:
        passes = 4 + 2 * recomputes_layers
        count = passes * count_expert_layers(model) * microbatches
        moved = residual * expert_rows_per_token(model) * (expert - 1) / expert
        add("expert", "all-to-all", count, count * moved)
        dense_params = step.n_params - step.n_expert_params
        add("expert", "all-reduce", model.n_layers, 2 * 4 * dense_params * (expert - 1) / expert)
    per_layer = (2 if model.residual.startswith("parallel") else 4) * (1.5 if recomputes_layers else 1)
    reductions = per_layer * model.n_layers * microbatches
    add("tensor", "all-reduce", int(reductions), reductions * 2 * residual * (tensor - 1) / tensor)
    return traffic


def _locate_axis(axis: str, sizes: dict[str, int], topology: Topology) -> tuple[int, int, bool]:
    """Return the number of slices or hosts and of torus dimensions that a mesh axis spans, and whether the dimensions are rings.

    Only sizes are considered, not the positions of devices.
    """
    chip = topology.chip
    if chip is None:
        return 1, 1, False
    axes = list(sizes)
    inner = math.prod(sizes[a] for a in axes[axes.index(axis) + 1 :])
    span = sizes[axis] * inner
    if chip.platform == "gpu":
        return max(1, min(sizes[axis], math.ceil(span / chip.per_host))), 1, False
    slices = topology.slices if axis == "data" and topology.slices > 1 else 1
    within = sizes[axis] / slices / (chip.devices if axis == axes[-1] else 1)
    dims = 0 if within <= 1 else next((n for n in (1, 2) if within <= max(topology.shape) ** n), 3)
    return slices, dims, len(topology.shape) == 3 and math.prod(topology.shape) >= 64

# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Estimates compared with published FLOPs per sequence and with the real optimizer state."""

import math
import typing

import jax
import pytest

from mesh_transformer.config import ConfigError, OptimizerConfig, parse_config
from mesh_transformer.plan.compile_worker import lower_training, make_topology_layout
from mesh_transformer.plan.estimate import describe_model, describe_moments, estimate_training
from mesh_transformer.plan.job import CompileJob
from mesh_transformer.train.state import describe_state

# Switch Transformers (arXiv 2101.03961), table 9, forward pass; here of 512 source and 114 target tokens.
PUBLISHED = {
    "t5-v1.1-base": 124e9,
    "t5-v1.1-large": 425e9,
    "t5-v1.1-xxl": 6.3e12,
    "switch-base-128": 124e9,
    "switch-large-128": 425e9,
    "switch-xxl": 6.3e12,
    "switch-c": 890e9,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_flops_per_sequence_match_the_paper(name):
    table = {
        "model": {"preset": name},
        "data": {"train": {"a": {"path": "x"}}},
        "train": {"steps": 1, "batch_size": 64},
    }
    stats = estimate_training(parse_config(table, where=name), "local")
    assert stats.flops / 3 / 64 == pytest.approx(PUBLISHED[name], rel=0.15)


@pytest.mark.parametrize("beta1", [0.0, 0.9])
@pytest.mark.parametrize("name", typing.get_args(typing.get_type_hints(OptimizerConfig)["name"]))
def test_optimizer_state_has_the_size_of_the_real_one(name, beta1):
    """Every optimizer of the schema, with one device and sharded over eight."""
    table = {
        "model": dict(n_layers=2, d_model=64, n_heads=4, n_vocab=264, seq_len=32, tied_embeddings=False),
        "data": {"train": {"a": {"path": "x"}}},
        "train": {"steps": 10, "batch_size": 8},
        "optimizer": {"name": name, "beta1": beta1, "moment_dtype": "bfloat16"},
        "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
    }
    config = parse_config(table, where=name)
    job = CompileJob(config=config, topology="cpu-8")
    estimate = estimate_training(config, "cpu-8")
    _, traced = lower_training(job, make_topology_layout(job))
    assert estimate.bytes_by_kind["moments"] == traced.bytes_by_kind["moments"]
    shapes, _ = describe_state(config)
    state = [leaf for tree in (shapes.params, shapes.opt_state) for leaf in jax.tree.leaves(tree)]
    assert estimate.state_bytes == sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in state)


def test_muon_counts_both_moments_of_arrays_that_adam_updates():
    model = parse_config(
        {"model": {"preset": "gpt2"}, "data": {"train": {"a": {"path": "x"}}}, "train": {"steps": 1, "batch_size": 1}},
        where="test",
    ).model
    muon = sum(moment.nbytes for moment in describe_moments(OptimizerConfig(name="muon"), model))
    embedding = 4 * model.n_vocab * model.d_model
    n_bytes = 4 * sum(math.prod(info.shape) for info in describe_model(model).values())
    assert muon > n_bytes + embedding


def test_shared_layers_cost_flops_but_no_memory():
    """A training step of ALBERT, compared with the jaxpr's count and with a model whose layers are its own."""
    table = {
        "model": {"preset": "albert-base-v2", "seq_len": 128},
        "data": {"train": {"a": {"path": "x"}}},
        "train": {"steps": 1, "batch_size": 8},
    }
    shared, separate = (
        parse_config({**table, "model": table["model"] | dict(shared_layers=is_shared)}, where="albert")
        for is_shared in (True, False)
    )
    estimates = [estimate_training(config, "cpu-1") for config in (shared, separate)]
    assert estimates[0].flops == pytest.approx(estimates[1].flops)
    assert estimates[0].state_bytes < estimates[1].state_bytes / 5
    job = CompileJob(config=shared, topology="cpu-1")
    _, traced = lower_training(job, make_topology_layout(job))
    assert estimates[0].flops == pytest.approx(traced.flops, rel=0.05)


def test_a_model_without_logits_has_no_training_step():
    table = {
        "model": {"preset": "all-minilm-l6-v2"},
        "data": {"train": {"a": {"path": "x"}}},
        "train": {"steps": 1, "batch_size": 8},
    }
    with pytest.raises(ConfigError, match=r'model\.head="none" computes no logits'):
        estimate_training(parse_config(table, where="minilm"), "local")

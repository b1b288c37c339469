# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Routing by sigmoids, biases and groups equals a loop over tokens, and a model with every choice is equal on a mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mesh_transformer.config import MeshConfig, ModelConfig
from mesh_transformer.config.moe import ExpertsConfig
from mesh_transformer.mesh import make_layout, use_layout
from mesh_transformer.model.moe.router import count_expert_layers, router_scores, select_experts
from mesh_transformer.model.params import flatten_names
from mesh_transformer.model.shapes import describe_params, init_cache
from mesh_transformer.model.transformer import make_model

CHOICES = {
    "plain": dict(),
    "normalized": dict(n_experts_per_token=1, normalize_gates=True),
    "not normalized": dict(normalize_gates=False, gate_scale=2.5),
    "group maximum": dict(n_expert_groups=4, n_groups_per_token=2, normalize_gates=False),
    "DeepSeek V3": dict(
        scores="sigmoid",
        selection_bias=True,
        n_expert_groups=4,
        n_groups_per_token=2,
        group_score="sum-of-top-2",
        gate_scale=2.5,
    ),
}


@pytest.mark.parametrize("name", CHOICES)
def test_selection_equals_a_loop(name):
    e = ExpertsConfig(**{"n_experts": 12, "n_experts_per_token": 3, **CHOICES[name]})
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 40, 12)).astype(np.float32)
    bias = rng.normal(size=12).astype(np.float32) if e.selection_bias else None
    scores = router_scores(jnp.asarray(logits), e)
    gates, selected = select_experts(scores, None if bias is None else jnp.asarray(bias), e)
    differs = 0
    for token in np.ndindex(2, 40):
        x = logits[token].astype(np.float64)
        own = 1 / (1 + np.exp(-x)) if e.scores == "sigmoid" else np.exp(x) / np.exp(x).sum()
        preference = own + (0 if bias is None else bias)
        groups = np.split(np.arange(12), e.n_expert_groups)
        n_summed = 1 if e.group_score == "max" else 2
        ranked = sorted(groups, key=lambda group: -np.sort(preference[group])[-n_summed:].sum())
        allowed = np.concatenate(ranked[: e.groups_per_token])
        wanted = allowed[np.argsort(-preference[allowed])][: e.n_experts_per_token]
        total = own[wanted].sum() if e.normalizes_gates else 1.0
        assert list(selected[token]) == list(wanted)
        np.testing.assert_allclose(gates[token], e.gate_scale * own[wanted] / total, rtol=1e-5)
        differs += list(wanted) != list(np.argsort(-own)[: e.n_experts_per_token])
    assert (differs > 0) == (e.limits_groups or e.selection_bias), "the choice selects other experts"


EVERY_CHOICE = dict(
    n_experts=4, n_experts_per_token=2, d_ff=8, bias=True, scores="sigmoid", router_bias=True, selection_bias=True,
    n_expert_groups=2, n_groups_per_token=1, group_score="max", gate_scale=1.5, dense_layers=(0,), shared_expert=True,
    shared_d_ff=12, shared_gate=True,
)  # fmt: skip


def make_config(**experts) -> ModelConfig:
    return ModelConfig(
        n_layers=3, d_model=16, n_heads=2, n_vocab=24, seq_len=12, d_ff=20, positions="rope-half", gated_ffn=True,
        activation="clamped-swiglu", experts=ExpertsConfig(**{**EVERY_CHOICE, **experts}),
    )  # fmt: skip


def draw_params(config: ModelConfig):
    rng = np.random.default_rng(0)
    return {
        module: {leaf: jnp.asarray(0.5 * rng.normal(size=info.shape), jnp.float32) for leaf, info in infos.items()}
        for module, infos in describe_params(config).items()
    }


TOKENS = jnp.asarray(np.random.default_rng(1).integers(0, 24, (4, 12)), jnp.int32)


def gradients_of(config: ModelConfig, layout=None):
    """Return the mean of weighted logits, and its gradients."""
    weights = np.random.default_rng(2).normal(size=(4, 12, 24)).astype(np.float32)

    def loss(params, tokens):
        with use_layout(layout):
            return jnp.mean(make_model(config).apply(params, tokens)[0] * weights)

    params = draw_params(config)
    if layout is not None:
        described = describe_params(config)
        params = {
            module: {
                k: jax.device_put(x, layout.sharding(described[module][k].axes, x.shape, k)) for k, x in own.items()
            }
            for module, own in params.items()
        }
    return jax.jit(jax.value_and_grad(loss))(params, TOKENS)


@pytest.mark.slow
@pytest.mark.parametrize("capacity", [None, 1.0])
def test_every_choice_is_equal_on_a_mesh(capacity):
    config = make_config(eval_capacity_factor=capacity)
    loss, gradients = gradients_of(config)
    layout = make_layout(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    found, found_gradients = gradients_of(config, layout)
    np.testing.assert_allclose(found, loss, rtol=1e-5, atol=1e-6)
    for name, gradient in flatten_names(gradients).items():
        scale = np.abs(gradient).max()
        assert (scale > 0) == (not name.endswith("selection_bias")), name
        other = flatten_names(found_gradients)[name]
        np.testing.assert_allclose(other, gradient, atol=1e-5 * max(scale, 1e-3), rtol=0, err_msg=name)


def test_dense_layers_are_a_stack_of_their_own_and_decode():
    config = make_config()
    assert [(stack.name, stack.first, stack.n_repeats) for stack in config.layer_stacks] == [
        ("first_layers", 0, 1),
        ("layers", 1, 2),
    ]
    assert count_expert_layers(config) == 2
    described = describe_params(config)
    assert described["transformer/first_layers/block_0/feed_forward"]["w_in"].shape == (1, 16, 20)
    assert described["transformer/layers/block_0/feed_forward"]["w_in"].shape == (2, 16, 12)
    assert described["transformer/layers/block_0/experts"]["w_in"].shape == (2, 4, 16, 8)
    params, model = draw_params(config), make_model(config)
    full, _ = jax.jit(model.apply)(params, TOKENS)
    cache, found = init_cache(config, 4, 12), []
    for first, last in ((0, 7), (7, 8), (8, 12)):
        positions = jnp.broadcast_to(jnp.arange(first, last), (4, last - first))
        logits, cache = model.apply(params, TOKENS[:, first:last], positions=positions, cache=cache)
        found.append(logits)
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), full, atol=2e-5 * np.abs(full).max())


def test_layers_are_split_where_fewest_are_compiled():
    base = dict(n_layers=12, d_model=16, n_heads=2, n_vocab=24, seq_len=12)

    def stacks(*dense: int, **choices):
        experts = ExpertsConfig(n_experts=2, dense_layers=dense, layer_interval=choices.pop("interval", 1))
        config = ModelConfig(**{**base, **choices}, experts=experts)
        kinds = [kind for stack in config.layer_stacks for kind in stack.pattern * stack.n_repeats]
        assert tuple(kinds) == config.layer_kinds
        return [(stack.first, len(stack.pattern), stack.n_repeats) for stack in config.layer_stacks]

    assert stacks() == [(0, 1, 12)]
    assert stacks(0, 1, 2) == [(0, 1, 3), (3, 1, 9)]
    assert stacks(5) == [(0, 6, 1), (6, 1, 6)]
    assert stacks(1, interval=2) == [(0, 1, 2), (2, 2, 5)]
    assert stacks(0, attention_pattern=("local", "global")) == [(0, 2, 1), (2, 2, 5)]


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        (dict(n_expert_groups=3), "n_expert_groups=3 must divide n_experts=4"),
        (
            dict(n_expert_groups=4, n_groups_per_token=1),
            "n_groups_per_token=1 groups of 1 experts have fewer experts than n_experts_per_token=2",
        ),
        (dict(shared_expert=False), "shared_d_ff=12 has no effect without shared_expert=true"),
        (dict(dense_layers=(3,)), "experts.dense_layers contains 3, but with n_layers=3 the largest index is 2"),
        (dict(dense_layers=(0, 1, 2)), "leave no layer with experts"),
        (dict(routing="expert-choice"), 'scores="sigmoid" has no effect with routing="expert-choice"'),
    ],
)
def test_contradictions_are_refused(experts, message):
    with pytest.raises(ValueError, match=message):
        make_config(**experts)


def test_equal_functions_have_equal_descriptions():
    config = make_config(n_expert_groups=1, n_groups_per_token=None)
    assert config.experts is not None
    other = dataclasses.replace(config, experts=dataclasses.replace(config.experts, layer_interval=1, shared_d_ff=12))
    assert other.effective_fields() == config.effective_fields()
    grouped = dataclasses.replace(config, experts=dataclasses.replace(config.experts, n_expert_groups=2))
    assert grouped.effective_fields() == config.effective_fields()  # a token may use both groups
    scaled = dataclasses.replace(config, experts=dataclasses.replace(config.experts, gate_scale=2.0))
    assert scaled.effective_fields() != config.effective_fields()

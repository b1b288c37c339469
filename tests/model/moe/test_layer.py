# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The mixture-of-experts layer equals a loop over tokens, a dense layer if it has one expert, and itself on any mesh."""

import dataclasses
import math
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from mesh_transformer.config import ConfigError, MeshConfig, ModelConfig
from mesh_transformer.config.moe import ExpertsConfig
from mesh_transformer.mesh import make_layout, use_layout
from mesh_transformer.model.attention.ring import from_zigzag
from mesh_transformer.model.moe.layer import MoELayer
from mesh_transformer.model.moe.router import RoutingStats, expert_capacity, router_losses
from mesh_transformer.model.params import flatten_names, make_inits
from mesh_transformer.model.shapes import count_params, describe_params, init_cache
from mesh_transformer.model.transformer import make_model
from mesh_transformer.train.flops import count_flops

B, T, V = 4, 16, 24


def make_config(experts: dict[str, Any] | None = None, **choices) -> ModelConfig:
    sizes = dict(n_layers=2, d_model=16, n_heads=4, n_vocab=V, seq_len=T, d_ff=24, ff_bias=False, activation="silu")
    own = None if experts is None else ExpertsConfig(**{"n_experts": 4, **experts})
    return ModelConfig(**{**sizes, "experts": own, **choices})


def draw_params(config: ModelConfig, seed: int = 0):
    rng = np.random.default_rng(seed)
    return {
        module: {leaf: jnp.asarray(0.4 * rng.normal(size=info.shape), jnp.float32) for leaf, info in infos.items()}
        for module, infos in describe_params(config).items()
    }


# The layer by itself


def apply_layer(config: ModelConfig, params, x, *, key=None, decoding: bool = False):
    layer = hk.transform(lambda x: MoELayer(config, make_inits(config))(x, training=key is not None, decoding=decoding))
    return layer.apply(jax.tree.map(jnp.asarray, params), key, jnp.asarray(x))


def draw_layer(config: ModelConfig, *, skew: float = 0.0):
    """Return weights and input. With `skew`, most tokens prefer the first expert."""
    assert config.experts is not None
    rng, (d, f, e) = np.random.default_rng(3), (config.d_model, config.ff_dim, config.experts.n_experts)
    w = dict(w_router=(d, e), w_in=(e, d, f), w_out=(e, f, d), **(dict(w_gate=(e, d, f)) if config.gated_ffn else {}))
    params = {name: rng.normal(size=shape).astype(np.float32) / shape[-2] ** 0.5 for name, shape in w.items()}
    x = rng.normal(size=(B, T, d)).astype(np.float32)
    if skew:
        params["w_router"][0, 0] += skew
        x[..., 0] = np.abs(x[..., 0]) + 1
    return {"experts": params}, x


def loop_over_tokens(
    config: ModelConfig, params, x: np.ndarray, capacity: int | None
) -> tuple[np.ndarray, RoutingStats]:
    """Compute the layer in float64, one token and one expert at a time."""
    e = config.experts
    assert e is not None
    w = {name: np.asarray(value, np.float64) for name, value in params["experts"].items()}

    def silu(v):
        return v / (1 + np.exp(-v))

    y = np.zeros(x.shape)
    count = np.zeros(e.n_experts)
    used = np.zeros(e.n_experts, int)
    dropped = 0
    probabilities, squares, entropies = [], [], []
    for sequence in range(x.shape[0]):
        if sequence % min(e.group_size, B) == 0:
            used = np.zeros(e.n_experts, int)
        for position in range(x.shape[1]):
            token = x[sequence, position].astype(np.float64)
            logits = token @ w["w_router"]
            p = np.exp(logits) / np.exp(logits).sum()
            probabilities.append(p)
            squares.append(np.log(np.exp(logits).sum()) ** 2)
            entropies.append(-(p * np.log(p)).sum())
            best = np.argsort(-p)[: e.n_experts_per_token]
            total = p[best].sum() if e.n_experts_per_token > 1 else 1.0
            for expert in best:
                count[expert] += 1
                if capacity is not None and used[expert] >= capacity:
                    dropped += 1
                    y[sequence, position] += p[expert] / total * token if e.dropped_tokens == "gated-input" else 0
                    continue
                used[expert] += 1
                hidden = token @ w["w_in"][expert]
                hidden = silu(token @ w["w_gate"][expert]) * hidden if config.gated_ffn else silu(hidden)
                y[sequence, position] += p[best][list(best).index(expert)] / total * (hidden @ w["w_out"][expert])
    load = count / count.sum()
    aux_loss = e.n_experts * (load * np.mean(probabilities, axis=0)).sum()
    numbers = [aux_loss, np.mean(squares), np.mean(entropies), dropped / count.sum()]
    return y, RoutingStats(load, *map(np.asarray, numbers))  # type: ignore[arg-type]


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("factor", [None, 1.0, 0.4])
@pytest.mark.parametrize("n_experts_per_token", [1, 2, 4])
def test_layer_equals_a_loop(n_experts_per_token, factor, gated):
    config = make_config(
        dict(n_experts_per_token=n_experts_per_token, capacity_factor=8.0, eval_capacity_factor=factor), gated_ffn=gated
    )
    params, x = draw_layer(config, skew=1.0)
    capacity = None if factor is None else expert_capacity(factor, T, n_experts_per_token, 4)
    wanted, wanted_routing = loop_over_tokens(config, params, x, capacity)
    found, routing = apply_layer(config, params, x)
    np.testing.assert_allclose(found, wanted, atol=2e-6 * np.abs(wanted).max())
    for name, value in routing._asdict().items():
        np.testing.assert_allclose(value, getattr(wanted_routing, name), rtol=1e-5, atol=1e-7, err_msg=name)
    all_dropped = np.all(wanted == 0, axis=-1)
    assert bool(routing.dropped_fraction > 0) == ((factor is not None and n_experts_per_token < 4) or factor == 0.4)
    np.testing.assert_array_equal(np.asarray(found)[all_dropped], 0.0)  # exactly: the residual stream is unchanged
    assert all_dropped.any() or n_experts_per_token > 1 or factor is None


@pytest.mark.parametrize("n_experts_per_token", [1, 2])
def test_dropped_tokens_return_the_gated_input(n_experts_per_token):
    config = make_config(
        dict(n_experts_per_token=n_experts_per_token, eval_capacity_factor=0.4, dropped_tokens="gated-input")
    )
    params, x = draw_layer(config, skew=1.0)
    wanted, routing = loop_over_tokens(config, params, x, expert_capacity(0.4, T, n_experts_per_token, 4))
    assert routing.dropped_fraction > 0.2
    np.testing.assert_allclose(apply_layer(config, params, x)[0], wanted, atol=2e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("group", [2, 4, 64])
def test_sequences_of_a_group_share_capacity(group):
    config = make_config(dict(n_experts_per_token=2, eval_capacity_factor=1.0, group_size=group))
    params, x = draw_layer(config)
    wanted, routing = loop_over_tokens(config, params, x, expert_capacity(1.0, T * min(group, B), 2, 4))
    found, found_routing = apply_layer(config, params, x)
    np.testing.assert_allclose(found, wanted, atol=2e-6 * np.abs(wanted).max())
    np.testing.assert_allclose(found_routing.dropped_fraction, routing.dropped_fraction, rtol=1e-6)
    alone = apply_layer(make_config(dict(n_experts_per_token=2, eval_capacity_factor=1.0)), params, x)
    assert float(alone[1].dropped_fraction) > float(found_routing.dropped_fraction) > 0


def test_expert_choice_equals_a_loop():
    experts = dict(routing="expert-choice", allow_noncausal=True, capacity_factor=1.0, eval_capacity_factor=1.0)
    config = make_config(experts)
    params, x = draw_layer(config, skew=1.0)
    w = {name: np.asarray(value, np.float64) for name, value in params["experts"].items()}
    wanted = np.zeros(x.shape)
    processed = np.zeros((*x.shape[:2], 4), bool)
    logits = x.astype(np.float64) @ w["w_router"]
    p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    for sequence in range(B):
        for expert in range(4):
            for position in np.argsort(-p[sequence, :, expert])[: T // 4]:
                hidden = x[sequence, position] @ w["w_in"][expert]
                out = hidden / (1 + np.exp(-hidden)) @ w["w_out"][expert]
                wanted[sequence, position] += p[sequence, position, expert] * out
                processed[sequence, position, expert] = True
    found, routing = apply_layer(config, params, x)
    np.testing.assert_allclose(found, wanted, atol=2e-6 * np.abs(wanted).max())
    np.testing.assert_allclose(routing.expert_load, 0.25)
    np.testing.assert_allclose(routing.dropped_fraction, np.mean(~processed.any(axis=-1)))
    assert routing.dropped_fraction > 0
    changed = x.copy()
    changed[:, -1] *= 9
    assert not np.allclose(apply_layer(config, params, changed)[0][:, :-1], found[:, :-1]), (
        "later tokens have no influence"
    )
    one, other = apply_layer(config, params, x, decoding=True), apply_layer(config, params, changed, decoding=True)
    np.testing.assert_array_equal(one[0][:, :-1], other[0][:, :-1])  # no influence in decoding
    chosen = np.argmax(p, axis=-1)
    np.testing.assert_allclose(one[1].expert_load, np.bincount(chosen.ravel(), minlength=4) / chosen.size)


def test_expert_dropout_is_applied_in_training_only():
    for factor in (None, 4.0):  # 4.0: capacity for all tokens
        plain = make_config(dict(n_experts_per_token=2, capacity_factor=factor))
        config = make_config(dict(n_experts_per_token=2, capacity_factor=factor, expert_dropout=0.25))
        params, x = draw_layer(config)
        wanted, _ = apply_layer(plain, params, x)
        np.testing.assert_array_equal(apply_layer(config, params, x)[0], wanted)
        keys = jax.random.split(jax.random.key(1), 400)
        draws = jax.lax.map(lambda key: apply_layer(config, params, x, key=key)[0], keys)  # noqa: B023
        assert float(jnp.abs(draws[0] - draws[1]).max()) > 0.1
        spread = jnp.std(draws, axis=0) / len(keys) ** 0.5
        np.testing.assert_array_less(jnp.abs(draws.mean(axis=0) - wanted) / spread, 5.0)


def test_a_later_token_never_displaces_an_earlier_one():
    config = make_config(dict(n_experts_per_token=2, eval_capacity_factor=0.5))
    params, x = draw_layer(config, skew=1.0)
    changed = x.copy()
    changed[:, 9:] = 5 * x[:, 9:][::-1]
    one, other = (np.asarray(apply_layer(config, params, each)[0]) for each in (x, changed))
    np.testing.assert_array_equal(one[:, :9], other[:, :9])
    assert not np.array_equal(one[:, 9:], other[:, 9:])


def test_a_sequence_does_not_depend_on_the_others_in_its_batch():
    config = make_config(dict(eval_capacity_factor=0.5))
    params, x = draw_layer(config, skew=1.0)
    np.testing.assert_allclose(
        apply_layer(config, params, x[2:3])[0], apply_layer(config, params, x)[0][2:3], atol=1e-6
    )


@pytest.mark.parametrize("experts", [dict(n_experts_per_token=1), dict(n_experts_per_token=2)], ids=str)
def test_dropless_equals_a_large_capacity(experts):
    dropless = make_config(experts)
    roomy = make_config(dict(experts, eval_capacity_factor=4.0))
    params, x = draw_layer(dropless, skew=2.0)

    def loss(params, config):
        y, routing = apply_layer(config, params, x)
        return jnp.sum(jnp.sin(y)) + router_losses(config, routing), routing

    (one, routing), gradients = jax.value_and_grad(loss, has_aux=True)(params, dropless)
    (other, roomy_routing), roomy_gradients = jax.value_and_grad(loss, has_aux=True)(params, roomy)
    assert routing.dropped_fraction == roomy_routing.dropped_fraction == 0
    np.testing.assert_allclose(one, other, rtol=1e-6)
    for name, gradient in flatten_names(gradients).items():
        scale = np.abs(gradient).max()
        assert scale > 0, name
        np.testing.assert_allclose(gradient, flatten_names(roomy_gradients)[name], atol=1e-5 * scale, err_msg=name)


def test_router_computes_in_float32_in_a_bfloat16_model():
    """Activations are bfloat16; assignments, gates and losses follow from float32 matmuls."""
    config = make_config(dict(n_experts_per_token=2), dtype="bfloat16")
    params, x = draw_layer(config)
    x = jnp.asarray(x, jnp.bfloat16)
    y, routing = apply_layer(config, params, x)
    float32_y, float32_routing = apply_layer(config, params, x.astype(jnp.float32))
    assert (y.dtype, routing.router_z.dtype) == (jnp.bfloat16, jnp.float32)
    for one, other in zip(routing, float32_routing, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_allclose(y.astype(jnp.float32), float32_y, atol=0.03 * np.abs(float32_y).max())


def test_training_has_its_own_capacity_and_jitter():
    config = make_config(dict(capacity_factor=0.25, router_jitter=0.2))
    params, x = draw_layer(config, skew=1.0)
    keys = jax.random.split(jax.random.key(0), 2)
    (_, evaluated), (_, one), (_, again), (_, other) = (
        apply_layer(config, params, x, key=key) for key in (None, keys[0], keys[0], keys[1])
    )
    assert evaluated.dropped_fraction == 0
    assert one.dropped_fraction > 0.5
    assert float(one.router_z) == float(again.router_z) != float(other.router_z)
    steady = make_config(dict(capacity_factor=0.25))
    assert apply_layer(steady, params, x, key=keys[0])[1].router_z == evaluated.router_z


def test_aux_loss_is_one_for_a_uniform_load_and_n_experts_for_a_single_expert():
    config = make_config({})
    params, x = draw_layer(config)
    even = {"experts": dict(params["experts"], w_router=np.zeros_like(params["experts"]["w_router"]))}
    _, routing = apply_layer(config, even, x)
    np.testing.assert_allclose([routing.aux_loss, routing.entropy], [1.0, math.log(4)], rtol=1e-6)
    one_sided = {"experts": dict(params["experts"], w_router=np.zeros_like(params["experts"]["w_router"]))}
    one_sided["experts"]["w_router"][:, 2] = 50 * np.sign(x[0, 0])
    _, routing = apply_layer(config, one_sided, np.broadcast_to(x[:1, :1], x.shape))
    np.testing.assert_allclose(routing.aux_loss, 4.0, rtol=1e-6)
    np.testing.assert_array_equal(routing.expert_load, [0, 0, 1, 0])


def test_aux_loss_of_sequences_is_the_mean_over_microbatches():
    means = {}
    for over in ("batch", "sequence"):
        config = make_config(dict(aux_loss_scope=over))
        params, x = draw_layer(config, skew=0.5)
        parts = [apply_layer(config, params, part)[1].aux_loss for part in (x[:2], x[2:])]
        means[over] = (float(sum(parts)) / 2, float(apply_layer(config, params, x)[1].aux_loss))
    np.testing.assert_allclose(*means["sequence"], rtol=1e-6)
    assert abs(means["batch"][0] - means["batch"][1]) > 1e-4


def largest_array(jaxpr) -> int:
    sizes = [math.prod(v.aval.shape) for e in jaxpr.eqns for v in e.outvars if hasattr(v.aval, "shape")]
    inner = [largest_array(sub) for e in jaxpr.eqns for sub in jaxprs_in_params(e.params)]
    return max([*sizes, *inner, 0])


def test_no_array_has_tokens_by_experts_by_capacity():
    config = make_config(dict(n_experts=8, n_experts_per_token=2, eval_capacity_factor=1.0), seq_len=256)
    shapes = dict(w_router=(16, 8), w_in=(8, 16, 24), w_out=(8, 24, 16))
    params = {"experts": {name: jnp.zeros(shape) for name, shape in shapes.items()}}
    gradient = jax.grad(lambda params, x: jnp.sum(apply_layer(config, params, x)[0]), argnums=(0, 1))
    jaxpr = jax.make_jaxpr(gradient)(params, jnp.zeros((2, 256, 16))).jaxpr
    capacity = expert_capacity(1.0, 256, 2, 8)
    assert largest_array(jaxpr) <= 2 * 256 * 2 * 24 < 2 * 256 * 8 * capacity / 10


# In a model

TOKENS, TARGETS = jnp.asarray(np.random.default_rng(1).integers(0, V, (2, 8, T)), jnp.int32)


def make_loss(config: ModelConfig, key=None):
    def loss(params, tokens, targets):
        model = make_model(config)
        x, routing = model.hidden_states(params, tokens, dropout_key=key, training=key is not None)
        logits = from_zigzag(x) @ params["transformer"]["w_tokens"].T
        loss = -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1))
        return loss if routing is None else loss + router_losses(config, routing), routing

    return jax.value_and_grad(loss, has_aux=True)


def test_one_expert_is_the_dense_layer():
    dense, one = make_config(), make_config(dict(n_experts=1, aux_loss_weight=0.0, router_z_loss=0.0))
    params = draw_params(one)
    copied = {}
    for module, arrays in params.items():
        name = module.replace("/experts", "/feed_forward")
        copied[name] = {k: a[:, 0] for k, a in arrays.items() if k != "w_router"} if name != module else arrays
    assert describe_params(dense).keys() == copied.keys()
    for factor in (None, 1.0):
        experts = ExpertsConfig(n_experts=1, eval_capacity_factor=factor)
        config = dataclasses.replace(one, experts=experts)
        logits, _ = make_model(config).apply(params, TOKENS)
        np.testing.assert_allclose(logits, make_model(dense).apply(copied, TOKENS)[0], atol=2e-5)


def test_layer_interval_alternates_with_dense_layers():
    config = make_config(
        dict(layer_interval=2, shared_expert=True),
        n_layers=12,
        attention_pattern=("global", "local", "local"),
        attention_window=4,
    )
    assert tuple((kind.local, kind.has_experts) for kind in config.pattern) == (
        (False, False), (True, True), (True, False), (False, True), (True, False), (True, True),
    )  # fmt: skip
    described = describe_params(config)
    have = {module.split("/")[2] for module in described if module.endswith("/experts")}
    dense = {module.split("/")[2] for module in described if module.endswith("/feed_forward")}
    assert have == {"block_1", "block_3", "block_5"}
    assert dense == {f"block_{i}" for i in range(6)}
    assert described["transformer/layers/block_1/experts"]["w_in"].axes == ("layers", "expert", "embed", "ff")
    (_, routing), _ = make_loss(config)(draw_params(config), TOKENS, TARGETS)
    assert routing is not None
    assert routing.expert_load.shape == (6, 4)
    plain = dataclasses.replace(config, experts=None)
    assert count_params(config) - count_params(plain) == 6 * (4 * 2 * 16 * 24 + 16 * 4)


@pytest.mark.parametrize("remat", ["full", "dots", "attention"])
def test_rematerialized_equals_saved(remat):
    config = make_config(dict(n_experts_per_token=2, capacity_factor=1.0, router_jitter=0.1))
    params, key = draw_params(config), jax.random.key(4)
    wanted, found = (
        jax.jit(make_loss(each, key))(params, TOKENS, TARGETS)
        for each in (config, dataclasses.replace(config, remat=remat))
    )
    assert wanted[0][1].dropped_fraction.min() > 0
    for one, other in zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "experts",
    [dict(n_experts_per_token=2), dict(layer_interval=2, eval_capacity_factor=4.0, dropped_tokens="gated-input")],
    ids=str,
)
def test_cached_equals_full(experts):
    config = make_config(experts, positions="rope-half")
    params, model = draw_params(config), make_model(config)
    full, _ = model.apply(params, TOKENS)
    cache, found = init_cache(config, TOKENS.shape[0], T), []
    for first, last in ((0, 5), (5, 6), (6, 7), (7, T)):
        positions = jnp.broadcast_to(jnp.arange(first, last), (TOKENS.shape[0], last - first))
        logits, cache = model.apply(params, TOKENS[:, first:last], positions=positions, cache=cache)
        found.append(logits)
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), full, atol=2e-5 * np.abs(full).max())


def test_flops_are_those_of_the_chosen_experts():
    def flops(config: ModelConfig) -> float:
        return count_flops(make_loss(config), draw_params(config), TOKENS, TARGETS)

    tokens, dense = TOKENS.size, flops(make_config())
    layer, router = 2 * tokens * 16 * 24 * 2, 2 * tokens * 16
    for n_experts, n_experts_per_token in ((4, 1), (8, 2)):
        sizes = dict(n_experts=n_experts, n_experts_per_token=n_experts_per_token)
        extra = 3 * 2 * ((n_experts_per_token - 1) * layer + n_experts * router)
        assert flops(make_config(sizes)) - dense == extra
        assert flops(make_config(dict(sizes, eval_capacity_factor=1.0))) - dense == extra


# On meshes

MESHES = [
    dict(data=8), dict(fsdp=8), dict(tensor=8), dict(expert=4, data=2), dict(data=2, fsdp=2, expert=2),
    dict(expert=2, tensor=2, fsdp=2), dict(context=2, expert=2, tensor=2), dict(context=4, data=2),
    dict(expert=2, context=2, fsdp=2, sequence_parallel=True),
]  # fmt: skip
FORMS = {
    "capacity": dict(
        n_experts_per_token=2, capacity_factor=0.9, router_jitter=0.1, expert_dropout=0.2, dropped_tokens="gated-input"
    ),
    "group": dict(n_experts_per_token=2, capacity_factor=0.9, router_jitter=0.1, expert_dropout=0.2, group_size=8),
    "dropless": dict(n_experts_per_token=2, router_jitter=0.1, aux_loss_scope="sequence", expert_dropout=0.2),
    "expert choice": dict(
        routing="expert-choice",
        allow_noncausal=True,
        n_experts_per_token=2,
        capacity_factor=0.9,
        eval_capacity_factor=1.0,
        router_jitter=0.1,
    ),
}
SIZES: dict[str, Any] = dict(gated_ffn=True, d_ff=16, n_heads=8)
_one_device: dict[str, Any] = {}


def run_on(config: ModelConfig, mesh: dict[str, Any] | None):
    key, params = jax.random.key(5), draw_params(config)
    if mesh is None:
        return jax.jit(make_loss(config, key))(params, TOKENS, TARGETS)
    layout = make_layout(MeshConfig(**{"data": 1, **mesh}))
    sharded = {
        module: {
            name: jax.device_put(array, layout.sharding(describe_params(config)[module][name].axes, array.shape, name))
            for name, array in arrays.items()
        }
        for module, arrays in params.items()
    }

    def traced(params, tokens, targets):
        with use_layout(layout):
            return make_loss(config, key)(params, tokens, targets)

    return jax.jit(traced)(sharded, TOKENS, TARGETS)


@pytest.mark.parametrize(
    ("mesh", "form"),
    [(mesh, form) for mesh in MESHES for form in FORMS if form != "expert choice" or mesh == MESHES[6]]
    + [(MESHES[3], "group of 4"), (MESHES[4], "group of 2"), (MESHES[4], "group of 4"), (MESHES[6], "group of 2")],
    ids=str,
)
def test_sharded_equals_one_device(mesh, form):
    name, _, group = form.partition(" of ")
    config = make_config({**FORMS[name], "n_experts": 8, **({"group_size": int(group)} if group else {})}, **SIZES)
    if form not in _one_device:
        _one_device[form] = run_on(config, None)
    (loss, routing), gradients = _one_device[form]
    (found, found_routing), found_gradients = run_on(config, mesh)
    assert bool(routing.dropped_fraction.min() > 0) == (form != "dropless")
    np.testing.assert_allclose(found, loss, rtol=1e-5)
    for name, value in routing._asdict().items():
        np.testing.assert_allclose(getattr(found_routing, name), value, rtol=1e-5, atol=1e-7, err_msg=name)
    for name, gradient in flatten_names(gradients).items():
        scale = np.abs(gradient).max()
        assert scale > 0 or name.endswith("/b_k"), name
        np.testing.assert_allclose(
            flatten_names(found_gradients)[name], gradient, atol=1e-5 * max(scale, 1e-3), rtol=0, err_msg=name
        )


def test_experts_are_sharded_and_exchanged():
    config = make_config(dict(n_experts=8, capacity_factor=1.0))
    layout = make_layout(MeshConfig(data=2, expert=4))
    axes = describe_params(config)["transformer/layers/block_0/experts"]["w_in"]
    assert layout.sharding(axes.axes, axes.shape, "w_in").shard_shape(axes.shape) == (2, 2, 16, 24)
    params, key = draw_params(config), jax.random.key(0)

    def traced(params, tokens, targets):
        with use_layout(layout):
            return make_loss(config, key)(params, tokens, targets)

    text = jax.jit(traced).lower(params, TOKENS, TARGETS).as_text()
    assert text.count("all_to_all") >= 4  # to the experts and back, forward and backward


@pytest.mark.parametrize(
    ("experts", "mesh", "message"),
    [
        (dict(n_experts=6), dict(data=2, expert=4), "expert = 6 is not divisible by expert = 4.*mesh.rules.expert"),
        (
            dict(n_experts=8), dict(data=2, expert=4, rules={"batch": ["data"]}),
            "mesh.rules.expert: experts are sharded over expert, but the batch is not; .*mesh.rules.batch",
        ),
        (
            dict(group_size=3, eval_capacity_factor=1.0), dict(data=8),
            "group_size=3 does not divide the batch of 8 sequences.* set it to 1",
        ),
        (
            dict(group_size=2, eval_capacity_factor=1.0), dict(data=2, expert=4),
            r"group_size=2 does not divide evenly: .* one of \[1, 4, 8\]",
        ),
    ],
)  # fmt: skip
def test_unsuitable_meshes_are_refused(experts, mesh, message):
    config = make_config(experts)
    trace, params = jax.make_jaxpr(make_loss(config)), draw_params(config)
    with use_layout(make_layout(MeshConfig(**mesh))), pytest.raises(ConfigError, match=message):
        trace(params, TOKENS, TARGETS)

# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Tests of every optimizer against float64 NumPy over several steps, and of masks and states by logical axes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mesh_transformer.config import ConfigError, OptimizerConfig
from mesh_transformer.train.optimizer import (
    FactoredMoment,
    clip_by_global_norm,
    global_norm,
    make_optimizer,
    optimizer_state_axes,
    orthogonalize,
    scale_by_factored_moment,
    scale_by_muon,
)

AXES = {
    "t": {"w_tokens": ("vocab", "embed"), "w_head": ("embed", "vocab"), "w_positions": ("position", "embed")},
    "t/layers/attention": {
        "w_q": ("layers", "embed", "heads", "head_dim"),
        "b_q": ("layers", "heads", "head_dim"),
        "w_o": ("layers", "heads", "head_dim", "embed"),
        "table": ("buckets", "heads"),
    },
    "t/layers/feed_forward": {"w_in": ("layers", "embed", "ff"), "b_out": ("layers", "embed")},
    "t/norm": {"scale": ("embed",), "length": ()},
}
SIZES = {
    "layers": 7, "embed": 6, "heads": 2, "head_dim": 4, "ff": 10, "vocab": 11, "position": 5, "buckets": 3,
}  # fmt: skip
DECAYING = {"w_tokens", "w_head", "w_positions", "w_q", "w_o", "w_in"}
OUTER = {"w_tokens", "w_head", "w_positions", "b_q", "table", "b_out", "scale", "length"}
STEPS = 5


def make_tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)

    def make(axes):
        return np.asarray(scale * rng.normal(size=[SIZES[a] for a in axes]), np.float32)

    return {module: {name: make(axes) for name, axes in leaves.items()} for module, leaves in AXES.items()}


def flatten(tree):
    return {name: np.asarray(leaf, np.float64) for leaves in tree.values() for name, leaf in leaves.items()}


def make_config(name, **fields):
    base = {"learning_rate": 1e-2, "end_learning_rate": 1e-3, "schedule": "linear", "warmup_steps": 2, "clip_norm": 3.0}
    return OptimizerConfig(name=name, **{**base, **fields})


@functools.cache
def run(config, *, scale=1.0):
    """Return the flattened parameters after STEPS updates, and the last state."""
    optimizer = make_optimizer(config, STEPS, AXES)

    @jax.jit
    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = make_tree(0)
    state = jax.jit(optimizer.init)(params)
    for t in range(STEPS):
        params, state = step(params, state, make_tree(t + 1, scale))
    return flatten(params), state


def rate_at(config, t):
    if t < config.warmup_steps:
        return config.learning_rate * t / config.warmup_steps
    done = (t - config.warmup_steps) / (STEPS - config.warmup_steps)
    return config.learning_rate + (config.end_learning_rate - config.learning_rate) * done


def run_numpy(config, make_rule, *, decaying=DECAYING, scale=1.0):
    """Return the same from a rule (name, gradient, t) -> direction of an array."""
    params, rules = flatten(make_tree(0)), {}
    for t in range(STEPS):
        grads = {name: scale * g for name, g in flatten(make_tree(t + 1)).items()}
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        if config.clip_norm and norm > config.clip_norm:
            grads = {name: g * config.clip_norm / norm for name, g in grads.items()}
        for name, g in grads.items():
            rule = rules.setdefault(name, make_rule(name, g.shape, config))
            decay = config.weight_decay * params[name] if name in decaying else 0.0
            params[name] = params[name] - rate_at(config, t) * (rule(g, t + 1) + decay)
    return params


def adam_rule(name, shape, config):
    m, v = np.zeros(shape), np.zeros(shape)

    def rule(g, t):
        m[...] = config.beta1 * m + (1 - config.beta1) * g
        v[...] = config.beta2 * v + (1 - config.beta2) * g * g
        return (m / (1 - config.beta1**t)) / (np.sqrt(v / (1 - config.beta2**t)) + config.eps)

    return rule


def lion_rule(name, shape, config):
    m = np.zeros(shape)

    def rule(g, t):
        direction = np.sign(config.beta1 * m + (1 - config.beta1) * g)
        m[...] = config.beta2 * m + (1 - config.beta2) * g
        return direction

    return rule


def sgd_rule(name, shape, config):
    m = np.zeros(shape)

    def rule(g, t):
        m[...] = config.beta1 * m + g
        return m.copy()

    return rule


def as_matrices(name, x):
    """Return an inner matrix of AXES as [layers, embed, other axes], with one layer if it has none."""
    return {
        "w_q": lambda: x.reshape(7, 6, 8),
        "w_o": lambda: np.moveaxis(x, 3, 1).reshape(7, 6, 8),
        "w_in": lambda: x,
        "w_tokens": lambda: x.T[None],
        "w_head": lambda: x[None],
        "w_positions": lambda: x.T[None],
    }[name]()


def from_matrices(name, y):
    return {
        "w_q": lambda: y.reshape(7, 6, 2, 4),
        "w_o": lambda: np.moveaxis(y.reshape(7, 6, 2, 4), 1, 3),
        "w_in": lambda: y,
        "w_tokens": lambda: y[0].T,
        "w_head": lambda: y[0],
        "w_positions": lambda: y[0].T,
    }[name]()


def adafactor_rule(name, shape, config):
    memory = {}

    def rule(g, t):
        rate = min(config.beta2, 1 - t**-0.8)
        stacked = name in ("b_q", "b_out", *DECAYING)
        x = as_matrices(name, g) if name in DECAYING else g
        square = x * x + config.eps**2
        new = {"r": square.mean(axis=2), "c": square.mean(axis=1)} if name in DECAYING else {"v": square}
        for key, value in new.items():
            memory[key] = rate * memory.get(key, 0.0) + (1 - rate) * value
        if name in DECAYING:
            r, c = memory["r"], memory["c"]
            v = np.stack([np.outer(r[i], c[i]) / r[i].mean() for i in range(len(r))])
        else:
            v = memory["v"]
        u = x / np.sqrt(v)
        rows = u.reshape(len(u), -1) if stacked else u.reshape(1, -1)
        rms = np.sqrt((rows**2).mean(axis=1))
        rows = rows / np.maximum(rms, 1.0)[:, None]
        u = rows.reshape(u.shape)
        u = from_matrices(name, u) if name in DECAYING else u
        memory["m"] = config.beta1 * memory.get("m", 0.0) + (1 - config.beta1) * u
        return memory["m"]

    return rule


def muon_rule(name, shape, config):
    if name in OUTER:
        return adam_rule(name, shape, config)
    m = np.zeros(shape)

    def rule(g, t):
        m[...] = config.beta1 * m + (1 - config.beta1) * g
        x = as_matrices(name, config.beta1 * m + (1 - config.beta1) * g)
        layers = []
        for layer in x:
            y = layer / np.linalg.norm(layer)
            for _ in range(5):
                a = y @ y.T
                y = 3.4445 * y - 4.7750 * a @ y + 2.0315 * a @ a @ y
            layers.append(0.2 * np.sqrt(max(layer.shape)) * y)
        return from_matrices(name, np.stack(layers))

    return rule


RULES = {
    "adamw": adam_rule,
    "lion": lion_rule,
    "sgd": sgd_rule,
    "adafactor": adafactor_rule,
    "muon": muon_rule,
}


@pytest.mark.parametrize("name", RULES)
def test_steps_match_numpy(name):
    config = make_config(name)
    found, _ = run(config)
    expected = run_numpy(config, RULES[name])
    start = flatten(make_tree(0))
    for array, value in expected.items():
        assert not np.allclose(value, start[array], rtol=1e-3), array
        np.testing.assert_allclose(found[array], value, rtol=2e-5, atol=2e-5, err_msg=array)


def test_optimizers_differ():
    found = [run(make_config(name))[0]["w_q"] for name in RULES]
    for i, a in enumerate(found):
        assert all(np.max(np.abs(a - b)) > 1e-3 for b in found[:i])


def test_decay_by_axes():
    """With zero gradients only weight decay changes the matrices, except those with an excluded axis."""
    for excepted, decaying in (((), DECAYING), (("vocab", "position"), {"w_q", "w_o", "w_in"})):
        config = make_config("sgd", no_decay_axes=excepted, weight_decay=0.5)
        found, _ = run(config, scale=0.0)
        start = flatten(make_tree(0))
        moved = {name for name in start if not np.array_equal(found[name], start[name])}
        assert moved == decaying
        factor = np.prod([1 - rate_at(config, t) * 0.5 for t in range(STEPS)])
        np.testing.assert_allclose(found["w_q"], factor * start["w_q"], rtol=1e-5)


def test_unknown_no_decay_axis():
    with pytest.raises(
        ConfigError,
        match=r"no_decay_axes contains 'vocabulary', but no parameter has this logical axis; use axes from: buckets, embed",
    ):
        make_optimizer(make_config("adamw", no_decay_axes=("vocabulary",)), STEPS, AXES)


def test_clipping():
    grads = {"t": make_tree(1)["t"]}
    norm = np.sqrt(sum((g**2).sum() for g in flatten(grads).values()))
    assert float(global_norm(grads)) == pytest.approx(norm, rel=1e-6)
    loose, _ = jax.jit(clip_by_global_norm(2 * norm).update)(grads, optax.EmptyState())
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(loose), jax.tree.leaves(grads), strict=True))
    tight, _ = jax.jit(clip_by_global_norm(norm / 3).update)(grads, optax.EmptyState())
    assert float(global_norm(tight)) == pytest.approx(norm / 3, rel=1e-6)
    reference, _ = jax.jit(optax.clip_by_global_norm(norm / 3).update)(grads, optax.EmptyState())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), tight, reference)
    none, _ = clip_by_global_norm(1.0).update({"w": jnp.zeros(3)}, optax.EmptyState())
    assert np.array_equal(none["w"], np.zeros(3))


def test_clip_norm_zero_is_off():
    config = make_config("sgd", clip_norm=0.0)
    np.testing.assert_allclose(run(config)[0]["w_q"], run_numpy(config, sgd_rule)["w_q"], rtol=1e-5, atol=1e-5)
    assert not np.allclose(run(config)[0]["w_q"], run(make_config("sgd"))[0]["w_q"], rtol=1e-3)


def test_norm_is_float32():
    """A sum of ones in bfloat16 would stop at 256."""
    ones = {"a": {"b": jnp.ones(10_000, jnp.bfloat16)}}
    assert global_norm(ones).dtype == jnp.float32
    assert float(global_norm(ones)) == 100.0
    assert float(global_norm({"a": jnp.asarray(3e20, jnp.bfloat16)})) == np.inf
    clipped, _ = clip_by_global_norm(50.0).update(ones, optax.EmptyState())
    assert clipped["a"]["b"].dtype == jnp.bfloat16
    assert float(clipped["a"]["b"][0]) == 0.5


@pytest.mark.parametrize("name", RULES)
def test_bfloat16_moments(name):
    float32, float32_state = run(make_config(name))
    bfloat16, bfloat16_state = run(make_config(name, moment_dtype="bfloat16"))
    types = {str(leaf.dtype) for leaf in jax.tree.leaves(bfloat16_state)}
    assert "bfloat16" in types
    assert "bfloat16" not in {str(leaf.dtype) for leaf in jax.tree.leaves(float32_state)}
    assert any(not np.array_equal(float32[array], bfloat16[array]) for array in float32)
    if name != "lion":  # whose signs may flip
        # a rounded moment is off by 2^-9 of itself, and a step is at most about the learning rate
        assert all(np.max(np.abs(float32[array] - bfloat16[array])) < 2e-3 for array in float32)


def test_second_moments_stay_float32():
    for name in ("adamw", "adafactor"):
        _, state = run(make_config(name, moment_dtype="bfloat16"))
        second = [leaf for leaf in jax.tree.leaves(state) if leaf.dtype == jnp.float32]
        assert second
        assert all(bool(jnp.all(leaf > 0)) for leaf in second)


def test_muon_orthogonalizes_every_layer():
    x = np.random.default_rng(0).normal(size=(3, 16, 40)) * np.array([1e-6, 1.0, 1e6])[:, None, None]
    found = np.asarray(jax.jit(orthogonalize)(jnp.asarray(x, jnp.float32)))
    for layer, y in zip(x, found, strict=True):
        u, _, vt = np.linalg.svd(layer, full_matrices=False)
        singular = np.linalg.svd(y, compute_uv=False)
        assert singular.min() > 0.6
        assert singular.max() < 1.3
        assert np.sum(y * (u @ vt)) / np.linalg.norm(y) / np.linalg.norm(u @ vt) > 0.97
    np.testing.assert_allclose(jax.jit(orthogonalize)(jnp.asarray(x[1].T, jnp.float32)), found[1].T, atol=1e-5)
    assert not np.any(jax.jit(orthogonalize)(jnp.zeros((2, 3, 4))))


def test_muon_first_step_is_optax():
    """For one matrix, the first step equals optax's: its bias correction does not change an orthogonalized update."""
    g = jnp.asarray(np.random.default_rng(0).normal(size=(8, 20)), jnp.float32)
    native = scale_by_muon({"m": {"w": ("embed", "ff")}}, momentum=0.9, dtype=jnp.float32)
    found, _ = native.update({"m": {"w": g}}, native.init({"m": {"w": g}}))
    reference = optax.contrib.scale_by_muon(
        beta=0.9, weight_dimension_numbers={"w": optax.contrib.MuonDimensionNumbers()}
    )
    expected, _ = reference.update({"w": g}, reference.init({"w": g}))
    np.testing.assert_allclose(found["m"]["w"], 0.2 * np.sqrt(20) * expected["w"], atol=1e-4)


def test_muon_step_has_the_size_of_adam():
    rng = np.random.default_rng(0)
    for shape in ((64, 64), (64, 256), (256, 64)):
        axes = {"m": {"w": ("embed", "ff")}}
        muon = scale_by_muon(axes, momentum=0.9, dtype=jnp.float32)
        g = {"m": {"w": jnp.asarray(rng.normal(size=shape), jnp.float32)}}
        update, _ = jax.jit(muon.update)(g, muon.init(g))
        assert float(jnp.sqrt(jnp.mean(update["m"]["w"] ** 2))) == pytest.approx(0.2, rel=0.15), shape


def test_adafactor_factors_matrices_not_layers():
    """Layers are the second longest dimension here: optax, which goes by length, would factor layers x ff."""
    state = jax.eval_shape(make_optimizer(make_config("adafactor"), STEPS, AXES).init, make_tree(0))
    second = next(s for s in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "second")) if hasattr(s, "second"))
    w_in = second.second["t/layers/feed_forward"]["w_in"]
    assert isinstance(w_in, FactoredMoment)
    assert [x.shape for x in w_in] == [(7, 10), (7, 6)]
    assert [x.shape for x in second.second["t/layers/attention"]["w_q"]] == [(7, 2, 4), (7, 6)]
    assert second.second["t/layers/attention"]["b_q"].shape == (7, 2, 4)
    by_length = jax.eval_shape(optax.scale_by_factored_rms(min_dim_size_to_factor=1).init, {"w": jnp.zeros((7, 6, 10))})
    assert by_length.v_row["w"].shape == (7, 6)
    assert by_length.v_col["w"].shape == (6, 10)


def test_adafactor_of_one_matrix_is_optax():
    axes = {"m": {"w": ("embed", "ff"), "b": ("ff",)}}
    native = scale_by_factored_moment(axes, decay=1.0, eps=1e-15)
    reference = optax.chain(
        optax.scale_by_factored_rms(min_dim_size_to_factor=1, epsilon=1e-30), optax.clip_by_block_rms(1.0)
    )
    rng = np.random.default_rng(0)
    params = {"m": {"w": jnp.zeros((5, 9)), "b": jnp.zeros(9)}}
    our_state, their_state = native.init(params), reference.init(params)
    for _ in range(4):
        grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)
        found, our_state = jax.jit(native.update)(grads, our_state)
        expected, their_state = jax.jit(reference.update)(grads, their_state, params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected)


@pytest.mark.parametrize("name", RULES)
def test_state_axes(name):
    optimizer = make_optimizer(make_config(name), STEPS, AXES)
    params = make_tree(0)
    shapes = jax.eval_shape(optimizer.init, params)
    axes = optimizer_state_axes(shapes, params, AXES)
    checked = 0

    def check(leaf, own):
        nonlocal checked
        checked += 1
        assert isinstance(own, tuple)
        assert leaf.shape == tuple(SIZES[axis] for axis in own)

    jax.tree.map(check, shapes, axes)
    assert checked == len(jax.tree.leaves(shapes)) > 10
    expected = (
        {("layers", "embed"), ("layers", "heads", "head_dim")} if name == "adafactor" else set(AXES["t"].values())
    )
    assert expected <= set(
        jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple) and isinstance(x[0], str) if x else False)
    )


def test_state_axes_of_equal_sizes():
    """With embed = ff the factors have equal shapes, and are distinguished by their names."""
    axes = {"m": {"w": ("layers", "embed", "ff")}}
    params = {"m": {"w": jnp.zeros((2, 4, 4))}}
    shapes = jax.eval_shape(scale_by_factored_moment(axes, decay=0.9, eps=1e-8).init, params)
    found = optimizer_state_axes(shapes, params, axes).second["m"]["w"]
    assert found == FactoredMoment(("layers", "ff"), ("layers", "embed"))


@pytest.mark.parametrize(
    "state",
    [
        {"elsewhere": jnp.zeros(3)},
        {"mu": {"t/norm": {"scale": jnp.zeros(5)}}},  # the parameter has 6
        {"mu": {"t/norm": {"scale": jnp.zeros(())}}},
        {"mu": {"t/norm": {"bias": jnp.zeros(6)}}},
        FactoredMoment(jnp.zeros(3), jnp.zeros(3)),
    ],
)
def test_unknown_state_leaves(state):
    with pytest.raises(ValueError, match="belongs to no parameter"):
        optimizer_state_axes(state, make_tree(0), AXES)


def test_sharded_state_follows_parameters():
    """Adafactor, whose state differs most from the parameters, takes the same steps on eight devices as on one."""
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rules = {"embed": "fsdp", "head_dim": "tensor"}

    def shard(leaf, axes):
        spec = jax.sharding.PartitionSpec(*(rules.get(axis) for axis in axes))
        return jax.device_put(leaf, jax.sharding.NamedSharding(mesh, spec))

    some = {module: AXES[module] for module in ("t/layers/attention", "t/norm")}
    optimizer = make_optimizer(make_config("adafactor", warmup_steps=0), STEPS, some)
    params, grads = ({module: make_tree(seed)[module] for module in some} for seed in (0, 1))
    state = jax.jit(optimizer.init)(params)
    axes = optimizer_state_axes(state, params, some)
    alone, _ = jax.jit(optimizer.update)(grads, state, params)
    sharded_params, sharded_grads = (jax.tree.map(shard, tree, some) for tree in (params, grads))
    sharded_state = jax.tree.map(shard, state, axes)
    assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(sharded_state))
    together, _ = jax.jit(optimizer.update)(sharded_grads, sharded_state, sharded_params)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(alone))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), alone, together)

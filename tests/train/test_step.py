# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Tests of the training step: equality across meshes and microbatches, skipped steps, and the golden loss curve."""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mesh_transformer.config import Config, parse_config
from mesh_transformer.data.loader import Batch
from mesh_transformer.mesh import MeshLayout, make_layout, use_layout
from mesh_transformer.train.state import (
    GUARD_WINDOW,
    TrainState,
    describe_state,
    flatten_state,
    make_init_state,
    state_shardings,
)
from mesh_transformer.train.step import make_gradients, make_train_step

GOLDEN = Path(__file__).parents[1] / "golden" / "train_curve.json"
N_VOCAB, SEQ_LEN, BATCH = 32, 16, 16


def make_config(**sections: dict) -> Config:
    table = {
        "model": dict(n_layers=2, d_model=32, n_heads=4, n_vocab=N_VOCAB, seq_len=SEQ_LEN),
        "mesh": dict(data=1),
        "data": {"train": {"numbers": {"path": "made-up"}}},
        "optimizer": dict(learning_rate=1e-2, end_learning_rate=1e-3, warmup_steps=2),
        "train": dict(steps=40, batch_size=BATCH),
    }
    for name, fields in sections.items():
        table[name] = {**table[name], **fields}
    return parse_config(table, where="test")


def make_batch(step: int) -> Batch:
    """Return a batch whose tokens are functions of the previous token, so that there is something to learn."""
    rng = np.random.default_rng(step)
    tokens = rng.integers(0, N_VOCAB, (BATCH, SEQ_LEN + 1), dtype=np.int32)
    for t in range(1, SEQ_LEN + 1):
        tokens[:, t] = (5 * tokens[:, t - 1] + 3) % N_VOCAB
    ones = np.ones((BATCH, SEQ_LEN), np.int32)
    positions = np.broadcast_to(np.arange(SEQ_LEN, dtype=np.int32), ones.shape)
    return Batch(tokens[:, :-1], tokens[:, 1:], ones, positions, ones.astype(np.float32))


_compiled: dict[str, tuple] = {}


def compile_config(config: Config) -> tuple[MeshLayout, TrainState, Callable]:
    """Return layout, initial state and step of a configuration, compiled once for all tests."""
    if repr(config) not in _compiled:
        count = max(config.mesh.data, 1) * config.mesh.fsdp * config.mesh.tensor * config.mesh.expert
        layout = make_layout(config.mesh, jax.devices()[:count])
        shapes, axes = describe_state(config)
        shardings = state_shardings(layout, shapes, axes)
        state = jax.jit(make_init_state(config), out_shardings=shardings)(jax.random.key(0))
        step = make_train_step(config)

        def step_with_layout(state: TrainState, batch: Batch):
            with use_layout(layout):
                return step(state, batch)

        _compiled[repr(config)] = (layout, state, jax.jit(step_with_layout, out_shardings=(shardings, None)))
    return _compiled[repr(config)]


class Runner:
    """Trains a configuration from its initial state."""

    def __init__(self, config: Config):
        self.layout, self.state, self._step = compile_config(config)

    def shard(self, batch: Batch) -> Batch:
        return jax.tree.map(
            lambda x: jax.device_put(x, self.layout.sharding(("batch", "sequence"), x.shape, "batch")), batch
        )

    def step(self, batch: Batch) -> dict[str, jax.Array]:
        self.state, metrics = self._step(self.state, self.shard(batch))
        return metrics

    def run(self, steps: int) -> list[float]:
        return [float(self.step(make_batch(i))["loss"]) for i in range(steps)]


def assert_states_close(a: TrainState, b: TrainState, **tolerance: float) -> None:
    for name, leaf in flatten_state(a.params).items():
        # A key bias shifts all scores of a query equally: its gradient is only rounding error, which Adam scales up.
        if not name.endswith("/b_k"):
            np.testing.assert_allclose(leaf, flatten_state(b.params)[name], err_msg=name, **tolerance)


@pytest.fixture(scope="module")
def one_device() -> tuple[list[float], TrainState]:
    runner = Runner(make_config())
    return runner.run(5), runner.state


@pytest.mark.parametrize("mesh", [(8, 1, 1), (1, 8, 1), (1, 1, 4), (2, 2, 2)], ids=str)
def test_five_steps_on_a_mesh_equal_one_device(mesh, one_device):
    losses, state = one_device
    runner = Runner(make_config(mesh=dict(zip(("data", "fsdp", "tensor"), mesh, strict=True))))
    w_in = runner.state.params["transformer/layers/block_0/feed_forward"]["w_in"]
    moments = [
        leaf for name, leaf in flatten_state(runner.state.opt_state).items() if name.endswith("feed_forward/w_in")
    ]
    n_shards = mesh[1] * mesh[2]
    for array in (w_in, *moments):
        assert array.addressable_shards[0].data.size * n_shards == array.size, "the array is not sharded by this mesh"
    assert len(moments) == 2
    np.testing.assert_allclose(runner.run(5), losses, rtol=1e-6)
    assert_states_close(runner.state, state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mesh", [dict(data=1), dict(data=2, fsdp=2)], ids=["one device", "mesh"])
def test_accumulated_equals_one_batch(mesh):
    one_batch = Runner(make_config(mesh=mesh))
    accumulated = Runner(make_config(mesh=mesh, train=dict(grad_accum_steps=4)))
    for step in range(3):
        batch = make_batch(step)
        mask = batch.mask.copy()
        mask[:5] = 0  # microbatches of unequal weight
        mask[5:, step:9] = 0
        batch = batch._replace(mask=mask)
        a = one_batch.step(batch)
        b = accumulated.step(batch)
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-6)
        np.testing.assert_allclose(a["grad_norm"], b["grad_norm"], rtol=1e-5)
    assert_states_close(one_batch.state, accumulated.state, rtol=1e-5, atol=1e-5)


# MoE layers are every second layer, with a capacity at which some tokens are dropped.
EXPERTS = dict(
    n_experts=4, n_experts_per_token=2, layer_interval=2, capacity_factor=0.8, router_jitter=0.1, aux_loss_weight=0.1
)


@pytest.mark.parametrize("form", [{}, dict(capacity_factor=1e-9), dict(shared_expert=True)], ids=str)
@pytest.mark.parametrize("mesh", [dict(data=2, expert=4), dict(fsdp=2, expert=2, tensor=2)], ids=str)
def test_five_steps_with_experts_equal_one_device(mesh, form):
    experts = EXPERTS | form
    if form.get("capacity_factor"):
        del experts["capacity_factor"]  # without a capacity no token is dropped
    model = dict(experts=experts)
    alone, runner = Runner(make_config(model=model)), Runner(make_config(model=model, mesh=mesh))
    w_in = runner.state.params["transformer/layers/block_1/experts"]["w_in"]
    n_shards = mesh["expert"] * mesh.get("fsdp", 1) * mesh.get("tensor", 1)
    assert w_in.addressable_shards[0].data.size * n_shards == w_in.size
    for step in range(5):
        expected, found = alone.step(make_batch(step)), runner.step(make_batch(step))
        assert (float(expected["dropped_fraction"]) > 0) == ("capacity_factor" in experts)
        assert expected["expert_load"].shape == (1, 4)
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-7, err_msg=name)
    assert_states_close(runner.state, alone.state, rtol=1e-5, atol=1e-5)


def test_accumulated_equals_one_batch_with_aux_loss_per_sequence():
    model = dict(experts=dict(EXPERTS, router_jitter=0.0, aux_loss_scope="sequence"))
    one_batch = Runner(make_config(model=model))
    accumulated = Runner(make_config(model=model, train=dict(grad_accum_steps=4)))
    for step in range(3):
        a = one_batch.step(make_batch(step))
        b = accumulated.step(make_batch(step))
        for name, value in a.items():
            np.testing.assert_allclose(b[name], value, rtol=1e-5, err_msg=name)
    assert_states_close(one_batch.state, accumulated.state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_optimizers_treat_each_expert_as_a_matrix(name):
    runner = Runner(make_config(model=dict(experts=dict(EXPERTS, layer_interval=1)), optimizer=dict(name=name)))
    before = runner.state.params["transformer/layers/block_0/experts"]
    losses = runner.run(8)
    after = runner.state.params["transformer/layers/block_0/experts"]
    assert losses[-1] < losses[0]
    assert all(bool(jnp.any(after[key] != before[key])) for key in before)
    if name == "adafactor":
        factored = {
            key: leaf.shape for key, leaf in flatten_state(runner.state.opt_state).items() if "experts/w_in" in key
        }
        assert (2, 4, 32) in factored.values(), factored  # layers, experts, embed


def test_a_dense_model_reports_no_routing():
    assert not {"aux_loss", "expert_load"} & set(Runner(make_config()).step(make_batch(0)))


@pytest.mark.parametrize("grad_accum_steps", [1, 2])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing_but_the_counters(bad, grad_accum_steps):
    runner = Runner(make_config(train=dict(grad_accum_steps=grad_accum_steps)))
    runner.run(2)
    before = flatten_state(runner.state)
    batch = make_batch(2)
    mask = batch.mask.copy()
    mask[3, 7] = bad
    metrics = runner.step(batch._replace(mask=mask))
    assert not np.isfinite(metrics["loss"])
    after = flatten_state(runner.state)
    assert int(after.pop("step")) == int(before.pop("step")) + 1
    assert (int(after.pop("guard/skipped")), int(after.pop("guard/in_a_row"))) == (1, 1)
    for name, leaf in after.items():
        np.testing.assert_array_equal(leaf, before[name], err_msg=name)
    good = runner.step(make_batch(3))
    assert np.isfinite(good["loss"])
    assert (int(good["skipped"]), int(good["consecutive_skips"])) == (1, 0)


@pytest.mark.parametrize("field", ["losses", "grad_norms"])
def test_a_spike_is_skipped_once_the_window_is_full(field):
    runner = Runner(make_config(train=dict(loss_spike_factor=5.0)))
    typical = runner.step(make_batch(0))
    calm = dict(losses=float(typical["loss"]), grad_norms=float(typical["grad_norm"]))
    calm[field] /= 6  # the next step is then at six times the median
    guard = runner.state.guard.replace(**{name: jnp.full(GUARD_WINDOW, value) for name, value in calm.items()})
    filling = runner.state.replace(guard=guard.replace(accepted=jnp.int32(GUARD_WINDOW - 1)))
    full = runner.state.replace(guard=guard.replace(accepted=jnp.int32(GUARD_WINDOW)))
    runner.state = filling
    assert int(runner.step(make_batch(1))["skipped"]) == 0
    runner.state = full
    assert int(runner.step(make_batch(1))["skipped"]) == 1
    np.testing.assert_array_equal(getattr(runner.state.guard, field), getattr(full.guard, field))
    runner.state = full.replace(guard=full.guard.replace(**{field: getattr(full.guard, field) * 6}))
    assert int(runner.step(make_batch(1))["skipped"]) == 0


def test_z_loss_reduces_log_z():
    without, with_z_loss = Runner(make_config()), Runner(make_config(train=dict(z_loss=10.0)))
    a = [float(without.step(make_batch(i))["z_loss_raw"]) for i in range(8)]
    b = [float(with_z_loss.step(make_batch(i))["z_loss_raw"]) for i in range(8)]
    np.testing.assert_allclose(a[0], b[0], rtol=1e-6)
    assert b[-1] < 0.9 * a[-1]


def test_norms_by_layer_equal_those_of_the_layers_arrays():
    pattern = dict(n_layers=4, attention_pattern=["global", "local"], attention_window=4)
    runner = Runner(
        make_config(model=pattern, train=dict(log_layer_grad_norms=True), optimizer=dict(name="sgd", clip_norm=0.0))
    )
    norms = np.asarray(runner.step(make_batch(0))["layer_grad_norms"])
    assert norms.shape == (4,)
    assert (norms > 0).all()
    config = make_config(model=pattern)
    grads = make_gradients(config)(Runner(config).state.params, jax.tree.map(jnp.asarray, make_batch(0)), None).grads
    second = sum(
        float(jnp.sum(jnp.square(g[0])))
        for module, arrays in grads.items()
        if "/block_1" in module
        for g in arrays.values()
    )
    np.testing.assert_allclose(norms[1], second**0.5, rtol=1e-4)


def test_dropout_differs_between_steps_and_repeats_between_runs():
    runs = [
        Runner(make_config(model=dict(dropout=0.3), optimizer=dict(learning_rate=1e-9, end_learning_rate=0.0)))
        for _ in range(2)
    ]
    batch = make_batch(0)
    first, second = ([float(runner.step(batch)["loss"]) for _ in range(3)] for runner in runs)
    assert first == second
    assert len({round(loss, 4) for loss in first}) == 3


def test_loss_curve_equals_the_golden_one():
    """After an intended change: compare the curves, explain it in the commit, and store the new curve as shown below."""
    runner = Runner(make_config())
    losses = runner.run(20)
    assert losses[-1] < 0.8 * losses[0], "the loss did not decrease"
    golden = json.loads(GOLDEN.read_text())
    np.testing.assert_allclose(
        losses,
        golden["losses"],
        rtol=2e-4,
        err_msg=f"the loss curve changed; if that is intended, write\n{json.dumps(losses)}\ninto {GOLDEN}",
    )

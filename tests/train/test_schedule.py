# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Tests of learning rates against published values and formulas, and of batch ramps against explicit sums."""

import math

import jax
import numpy as np
import pytest

from mesh_transformer.config import ConfigError, OptimizerConfig, TrainConfig
from mesh_transformer.train.schedule import batch_ramp, batch_size_at, first_sequence, make_schedule

PEAK, END, WARMUP, STEPS = 6e-4, 6e-5, 10, 110


def make(name, *, steps=STEPS, **fields):
    base = {"learning_rate": PEAK, "end_learning_rate": END, "warmup_steps": WARMUP}
    return make_schedule(OptimizerConfig(schedule=name, **{**base, **fields}), steps)


def reference_rate(name, t):
    """Return the rate at step t of a run of 110 steps, 10 of them warm-up."""
    if t < WARMUP:
        return PEAK * t / WARMUP
    if name in ("cosine", "gptj"):
        return END + (PEAK - END) * 0.5 * (1 + math.cos(math.pi * min((t - 10) / 100, 1)))
    if name == "linear":
        return PEAK + (END - PEAK) * min((t - 10) / 100, 1)
    if name == "wsd":
        return PEAK if t < 88 else PEAK + (END - PEAK) * min((t - 88) / 22, 1)
    if name == "inverse-sqrt":
        return max(PEAK * math.sqrt(10 / t), END)
    return PEAK


NAMES = ["cosine", "gptj", "linear", "wsd", "inverse-sqrt", "constant"]


@pytest.mark.parametrize("name", NAMES)
def test_formula_at_every_step(name):
    found = jax.jit(jax.vmap(make(name)))(np.arange(150))
    np.testing.assert_allclose(found, [reference_rate(name, t) for t in range(150)], rtol=2e-6, atol=1e-12)
    assert found[0] == 0.0
    assert found.dtype == np.float32


def test_schedules_differ():
    rates = {name: float(make(name)(95)) for name in NAMES if name != "gptj"}
    assert len(set(rates.values())) == len(rates)


def test_gptj_is_the_original():
    """The schedule of GPT-J in mesh-transformer-jax: 3,000 steps of warm-up, 300,000 of annealing."""
    schedule = make(
        "gptj", steps=383_500, learning_rate=1.2e-4, end_learning_rate=1.2e-5, warmup_steps=3000, decay_steps=300_000
    )
    assert float(schedule(0)) == 0.0
    for step, rate in ((1500, 6e-5), (3000, 1.2e-4), (153_000, 6.6e-5), (303_000, 1.2e-5), (383_499, 1.2e-5)):
        assert float(schedule(step)) == pytest.approx(rate, rel=2e-6), step


def test_gpt3_rates_at_tokens():
    """GPT-3 175B: warm-up over 375M tokens, cosine until 260B, then constant; a step has 3.125M tokens."""
    per_step = 3_125_000
    schedule = make(
        "cosine",
        steps=96_000,
        learning_rate=6e-5,
        end_learning_rate=6e-6,
        warmup_steps=375_000_000 // per_step,
        decay_steps=(260_000_000_000 - 375_000_000) // per_step,
    )
    rates = {187_500_000: 3.0e-5, 375_000_000: 6.0e-5, 130 * 10**9: 3.306e-5, 260 * 10**9: 6.0e-6, 300 * 10**9: 6.0e-6}
    for tokens, rate in rates.items():
        assert float(schedule(tokens // per_step)) == pytest.approx(rate, rel=1e-4), tokens


def test_no_warmup_starts_at_the_peak():
    for name in ("cosine", "linear", "wsd", "inverse-sqrt", "constant"):
        assert float(make(name, warmup_steps=0)(0)) == pytest.approx(PEAK), name


def test_decay_steps_set():
    assert float(make("linear", decay_steps=50)(35)) == pytest.approx((PEAK + END) / 2)
    assert float(make("wsd", decay_steps=10)(105)) == pytest.approx((PEAK + END) / 2)
    # A fifth of 12 steps is 2, which are all that are left after the warm-up.
    assert float(make("wsd", steps=12)(11)) == pytest.approx((PEAK + END) / 2)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("constant", {"decay_steps": 5}, "optimizer.decay_steps=5 has no effect"),
        ("inverse-sqrt", {"decay_steps": 5}, "optimizer.decay_steps=5 has no effect"),
        ("gptj", {"warmup_steps": 0}, "optimizer.warmup_steps=0"),
        ("wsd", {"decay_steps": 101}, "exceed train.steps=110"),
    ],
)
def test_fields_without_effect_are_refused(name, fields, message):
    with pytest.raises(ConfigError, match=message):
        make(name, **fields)


RAMPS = [
    TrainConfig(steps=100, batch_size=12),
    TrainConfig(steps=100, batch_size=12, batch_ramp_from=12, batch_ramp_steps=5),
    TrainConfig(steps=100, batch_size=12, batch_ramp_from=3, batch_ramp_steps=20),
    TrainConfig(steps=100, batch_size=1600, batch_ramp_from=16, batch_ramp_steps=70),
    TrainConfig(steps=100, batch_size=64, batch_ramp_from=2, batch_ramp_steps=4),
    TrainConfig(steps=100, batch_size=64, batch_ramp_from=2, batch_ramp_steps=1),
]


@pytest.mark.parametrize("train", RAMPS)
def test_ramp(train):
    sizes = [batch_size_at(train, step) for step in range(100)]
    unit = train.batch_ramp_from or train.batch_size
    assert sizes[0] == unit
    assert set(sizes[train.batch_ramp_steps :]) == {train.batch_size}
    assert (
        train.batch_ramp_steps == 0 or unit == train.batch_size or sizes[train.batch_ramp_steps - 1] < train.batch_size
    )
    assert sizes == sorted(sizes)
    assert all(size % unit == 0 for size in sizes)
    assert len(set(sizes)) <= 16
    assert {size for _, size in batch_ramp(train)} == set(sizes)
    assert [first_sequence(train, step) for step in range(101)] == [sum(sizes[:step]) for step in range(101)]


def test_ramp_is_linear():
    train = TrainConfig(steps=10**6, batch_size=1600, batch_ramp_from=16, batch_ramp_steps=30_000)
    phases = batch_ramp(train)
    assert len(phases) == 16
    for first, size in phases:
        assert abs(size - (16 + (1600 - 16) * first / 30_000)) <= 16
    # Exact for step numbers that float32 cannot represent.
    assert first_sequence(train, 10**9) - first_sequence(train, 10**9 - 1) == 1600
    assert batch_ramp(TrainConfig(steps=9, batch_size=8, batch_ramp_from=2, batch_ramp_steps=9)) == [
        (0, 2),
        (3, 4),
        (6, 6),
        (9, 8),
    ]


def test_negative_step():
    for function in (batch_size_at, first_sequence):
        with pytest.raises(ValueError, match="negative"):
            function(RAMPS[0], -1)

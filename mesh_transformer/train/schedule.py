# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Schedules: learning rate, batch size and position in the data as functions of the step."""

from collections.abc import Callable

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from mesh_transformer.config import ConfigError, OptimizerConfig, TrainConfig

Schedule = Callable[[ArrayLike], Float[Array, ""]]

MAX_RAMP_SIZES = 16  # a training step is compiled for each batch size


def make_schedule(config: OptimizerConfig, steps: int) -> Schedule:
    """Return the learning rate of step t = 0, 1, ... as a float32 scalar; can be jitted.

    With P = learning_rate, E = end_learning_rate, W = warmup_steps, D = decay_steps, and a(x) = x clipped to [0, 1], every
    schedule except "gptj" is P t / W in the warm-up (t < W), and then:

        cosine        E + (P - E) (1 + cos(pi a((t - W) / D))) / 2      D: steps - W unless set
        linear        P - (P - E) a((t - W) / D)                        D: steps - W unless set
        wsd           P - (P - E) a((t - (steps - D)) / D)              D: a fifth of steps unless set
        inverse-sqrt  max(E, P sqrt(max(W, 1) / t))
        constant      P

    The schedule "gptj" of mesh-transformer-jax is

        a(t / W) P - (P - E) (1 - cos(pi a((t - W) / D))) / 2           D: steps - W unless set

    With a warm-up, step 0 has the rate 0, and step W is the first at the peak. wsd (warm-up, stable, decay) is the
    schedule of Hu et al. 2024 (MiniCPM), with the linear decay over 10 to 20 % of the steps of Haegele et al. 2024 (arXiv
    2405.18392).
    Raises ConfigError for a field that the schedule does not use.
    """
    peak, end, warmup = config.learning_rate, config.end_learning_rate, config.warmup_steps
    decay = _decay_steps(config, steps)

    def warm(t: Array) -> Array:
        return jnp.clip(t / warmup, 0.0, 1.0) if warmup else jnp.ones_like(t)

    def decayed(t: Array, first: int) -> Array:
        return jnp.clip((t - first) / decay, 0.0, 1.0)

    def cosine(t: Array) -> Array:
        after = end + (peak - end) * (1.0 + jnp.cos(jnp.pi * decayed(t, warmup))) / 2.0
        return jnp.where(t < warmup, warm(t) * peak, after)

    def gptj(t: Array) -> Array:
        return warm(t) * peak - (peak - end) * (1.0 - jnp.cos(jnp.pi * decayed(t, warmup))) / 2.0

    def linear(t: Array) -> Array:
        return warm(t) * peak - (peak - end) * decayed(t, warmup)

    def wsd(t: Array) -> Array:
        return warm(t) * peak - (peak - end) * decayed(t, steps - decay)

    def inverse_sqrt(t: Array) -> Array:
        after = jnp.maximum(end, peak * jnp.sqrt(max(warmup, 1) / jnp.maximum(t, 1.0)))
        return jnp.where(t < warmup, warm(t) * peak, after)

    def constant(t: Array) -> Array:
        return warm(t) * peak

    formulas = {
        "cosine": cosine,
        "gptj": gptj,
        "linear": linear,
        "wsd": wsd,
        "inverse-sqrt": inverse_sqrt,
        "constant": constant,
    }
    formula = formulas[config.schedule]
    return lambda step: formula(jnp.asarray(step, jnp.float32))


def _decay_steps(config: OptimizerConfig, steps: int) -> int:
    """Return D of the formulas in `make_schedule`, at least 1."""
    schedule, warmup, decay = config.schedule, config.warmup_steps, config.decay_steps
    if schedule in ("inverse-sqrt", "constant"):
        if decay is not None:
            raise ConfigError(
                f'optimizer.decay_steps={decay} has no effect with optimizer.schedule="{schedule}"; remove it'
            )
        return 1
    if schedule == "gptj" and not warmup:
        raise ConfigError(
            'optimizer.schedule="gptj" divides by optimizer.warmup_steps=0; set it to 1 or more, or use "cosine"'
        )
    if schedule != "wsd":
        return max(steps - warmup, 1) if decay is None else decay
    if decay is None:
        return max(min(steps // 5, steps - warmup), 1)
    if warmup + decay > steps:
        raise ConfigError(
            f"optimizer.warmup_steps={warmup} and optimizer.decay_steps={decay} together exceed train.steps={steps}; "
            "lower one of them"
        )
    return decay


def batch_ramp(train: TrainConfig) -> list[tuple[int, int]]:
    """Return (first step, batch size in sequences) of every phase of the run; one phase without a ramp.

    With F = batch_ramp_from and n = batch_size / F, the ramp has r = min(n, 16) sizes F m, where m increases from 1 to n in
    equal strides, rounded down to integers. Size i = 0, ..., r - 1 is used from step ceil(i batch_ramp_steps / (r - 1)). The
    growth is linear, from F at step 0 to batch_size at batch_ramp_steps (GPT-3,
    arXiv 2005.14165, appendix B). A multiple of F is divisible by the same numbers of microbatches and devices as F.
    """
    if train.batch_ramp_from is None or train.batch_ramp_from == train.batch_size:
        return [(0, train.batch_size)]
    multiples = train.batch_size // train.batch_ramp_from
    last = min(multiples, MAX_RAMP_SIZES) - 1
    phases: dict[int, int] = {}
    for i in range(last + 1):  # if there are more sizes than steps, the largest size of a step is used
        phases[-(-i * train.batch_ramp_steps // last)] = train.batch_ramp_from * (1 + i * (multiples - 1) // last)
    return list(phases.items())


def batch_size_at(train: TrainConfig, step: int) -> int:
    """Return the number of sequences in the batch of `step`."""
    _check_step(step)
    return next(size for first, size in reversed(batch_ramp(train)) if step >= first)


def first_sequence(train: TrainConfig, step: int) -> int:
    """Return the exact number of sequences in all batches before `step`: the index of the step's first sequence."""
    _check_step(step)
    phases = batch_ramp(train)
    ends = [first for first, _ in phases[1:]] + [max(step, phases[-1][0])]
    return sum(size * max(min(step, end) - first, 0) for (first, size), end in zip(phases, ends, strict=True))


def _check_step(step: int) -> None:
    if step < 0:
        raise ValueError(f"step {step} is negative; steps are numbered from 0")

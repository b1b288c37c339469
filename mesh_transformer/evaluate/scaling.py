# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Losses against compute -> the law L = a (C / C0)^-b + c that fits them best (2001.08361, 2010.14701), and how well."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import minimize_scalar

B_RANGE = (0.01, 3.0)
FEWEST = 4  # points: one more than the law has numbers


class Fit(NamedTuple):
    """L = a (C / c0)^-b + c with standard errors, and what it misses."""

    a: float
    b: float
    c: float
    c0: float  # the smallest compute, so that a is the reducible loss there
    errors: tuple[float, float, float]  # standard errors of a, b and c; infinite where points do not determine them
    rms: float  # of what the points miss the law by, nats
    last_error: float  # the last point less its prediction by a fit without it, nats; NaN with too few points for that

    def __call__(self, compute: float) -> float:
        """The law."""
        return self.a * (compute / self.c0) ** -self.b + self.c

    def __str__(self) -> str:
        a, b, c = (
            f"{value:.3g} ± {error:.2g}" for value, error in zip((self.a, self.b, self.c), self.errors, strict=True)
        )
        missed = "" if math.isnan(self.last_error) else f", last point {self.last_error:+.3f} off a fit without it"
        return f"L = ({a}) (C / {self.c0:.3g})^-({b}) + ({c}), rms {self.rms:.4f}{missed}"


def fit_law(compute: Sequence[float], losses: Sequence[float]) -> Fit | None:
    """The least-squares fit with a > 0 and c >= 0; None for fewer than four points, or if losses do not fall."""
    order = np.argsort(compute)
    x, y = np.asarray(compute, float)[order], np.asarray(losses, float)[order]
    if len(x) < FEWEST or x[0] <= 0 or x[0] == x[-1]:
        return None
    found = _fit(x / x[0], y)
    if found is None:
        return None
    a, b, c = found
    relative = x / x[0]
    power = relative**-b
    missed = y - (a * power + c)
    jacobian = np.stack([power, -a * power * np.log(relative), np.ones_like(x)], axis=1)
    variance = float(missed @ missed) / (len(x) - 3)
    with np.errstate(all="ignore"):
        inverse = np.linalg.pinv(jacobian.T @ jacobian)
        determined = np.linalg.matrix_rank(jacobian) == 3
    errors = np.sqrt(np.maximum(np.diag(inverse) * variance, 0.0)) if determined else np.full(3, math.inf)
    last = math.nan
    if len(x) > FEWEST and (without := _fit(relative[:-1], y[:-1])) is not None:
        last = float(y[-1] - (without[0] * relative[-1] ** -without[1] + without[2]))
    e_a, e_b, e_c = map(float, errors)
    return Fit(a, b, c, float(x[0]), (e_a, e_b, e_c), float(np.sqrt(np.mean(missed**2))), last)


def _fit(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float] | None:
    """For each b the best a and c follow; b is searched for on a grid, then between its neighbours."""

    def solve(b: float) -> tuple[float, float, float]:
        power = x**-b
        spread = power - power.mean()
        a = float(spread @ y / (spread @ spread))
        c = float(y.mean() - a * power.mean())
        if c < 0:
            a, c = float(power @ y / (power @ power)), 0.0
        missed = y - (a * power + c)
        return float(missed @ missed), a, c

    grid = np.geomspace(*B_RANGE, 200)
    best = int(np.argmin([solve(float(b))[0] for b in grid]))
    low, high = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, len(grid) - 1)])
    found: Any = minimize_scalar(lambda b: solve(b)[0], bounds=(low, high), method="bounded", options={"xatol": 1e-9})
    b = float(found.x)
    _, a, c = solve(b)
    return (a, b, c) if a > 0 else None

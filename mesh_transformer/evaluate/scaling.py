# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Scaling laws: least-squares fit of L = a (C / C0)^-b + c to losses L at compute C (arXiv 2001.08361, 2010.14701)."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import minimize_scalar

B_RANGE = (0.01, 3.0)  # lowest and highest exponent b that is tried
MIN_POINTS = 4  # number of points: one more than the law has parameters


class Fit(NamedTuple):
    """The law L = a (C / c0)^-b + c with standard errors and residuals."""

    a: float
    b: float
    c: float
    c0: float  # the smallest compute; `a` is the reducible loss at c0
    errors: tuple[float, float, float]  # standard errors of a, b and c; infinite if the points do not determine the law
    rms: float  # root mean square of the residuals in nats
    last_error: float  # nats; last loss minus the prediction of a fit to the other points, NaN for only 4 points

    def __call__(self, compute: float) -> float:
        """Return the predicted loss."""
        return self.a * (compute / self.c0) ** -self.b + self.c

    def __str__(self) -> str:
        a, b, c = (
            f"{value:.3g} ± {error:.2g}" for value, error in zip((self.a, self.b, self.c), self.errors, strict=True)
        )
        last = "" if math.isnan(self.last_error) else f", last point {self.last_error:+.3f} from a fit without it"
        return f"L = ({a}) (C / {self.c0:.3g})^-({b}) + ({c}), rms {self.rms:.4f}{last}"


def fit_law(compute: Sequence[float], losses: Sequence[float]) -> Fit | None:
    """Return the least-squares fit with a > 0 and c >= 0, or None if there is none.

    There is none for fewer than four points, a compute of 0, a single distinct compute, or losses that do not decrease.
    """
    order = np.argsort(compute)
    x = np.asarray(compute, float)[order]
    y = np.asarray(losses, float)[order]
    if len(x) < MIN_POINTS or x[0] <= 0 or x[0] == x[-1]:
        return None
    parameters = _fit(x / x[0], y)
    if parameters is None:
        return None
    a, b, c = parameters
    relative = x / x[0]
    power = relative**-b
    residuals = y - (a * power + c)
    jacobian = np.stack([power, -a * power * np.log(relative), np.ones_like(x)], axis=1)
    variance = float(residuals @ residuals) / (len(x) - 3)
    with np.errstate(all="ignore"):
        inverse = np.linalg.pinv(jacobian.T @ jacobian)
        determined = np.linalg.matrix_rank(jacobian) == 3
    errors = np.sqrt(np.maximum(np.diag(inverse) * variance, 0.0)) if determined else np.full(3, math.inf)
    last_error = math.nan
    if len(x) > MIN_POINTS and (others := _fit(relative[:-1], y[:-1])) is not None:
        last_error = float(y[-1] - (others[0] * relative[-1] ** -others[1] + others[2]))
    e_a, e_b, e_c = map(float, errors)
    return Fit(a, b, c, float(x[0]), (e_a, e_b, e_c), float(np.sqrt(np.mean(residuals**2))), last_error)


def _fit(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float] | None:
    """Fit a, b and c: b by a grid search and a refinement between grid neighbors, a and c by linear least squares."""

    def solve(b: float) -> tuple[float, float, float]:
        power = x**-b
        spread = power - power.mean()
        a = float(spread @ y / (spread @ spread))
        c = float(y.mean() - a * power.mean())
        if c < 0:
            a, c = float(power @ y / (power @ power)), 0.0
        residuals = y - (a * power + c)
        return float(residuals @ residuals), a, c

    grid = np.geomspace(*B_RANGE, 200)
    best = int(np.argmin([solve(float(b))[0] for b in grid]))
    low, high = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, len(grid) - 1)])
    minimum: Any = minimize_scalar(lambda b: solve(b)[0], bounds=(low, high), method="bounded", options={"xatol": 1e-9})
    b = float(minimum.x)
    _, a, c = solve(b)
    return (a, b, c) if a > 0 else None

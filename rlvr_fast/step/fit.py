"""The curve of the success rate along one update, fitted to what was measured at its two ends.

J′(m) = a + c·m + d·m²/2 in multiples m of the step. A slope at the start measures a, a slope at the end a + c + d/2, a
curvature at the end c + d, a gain of the step a + c/2 + d/6; two of them give a parabola. How far J is from one is
hardly measured, so d = 0 is assumed with an error: on the way to the peak of the parabola the curvature may change by
``departure`` times itself, one standard deviation, and a curvature at the end may differ by as much from what the cubic
has there. Without that, intervals from precise data miss the truth by the bend that they do not know of, above all
where the step went past its break-even (docs/simulate, step_meter).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

ROUNDING = 1e-6  # smallest believable eigenvalue of a correlation matrix: the measurements of one end share rollouts
MULTIPLES = torch.logspace(-3, 3, 4001, dtype=torch.float64)


def slope_row(m: float) -> list[float]:
    """Coefficients of (a, c, d) in J′(m)."""
    return [1.0, m, m * m / 2]


def curvature_row(m: float) -> list[float]:
    """In J″(m)."""
    return [0.0, 1.0, m]


def mean_slope_row(m: float) -> list[float]:
    """In (J(m) − J(0))/m."""
    return [1.0, m / 2, m * m / 6]


@dataclass(frozen=True)
class Crossing:
    """Where a curve that starts above zero falls below it, in multiples, and its interval.

    ``low``: first multiple at which it is not above zero by z standard errors; 0 if it never was. ``high``: first at
    which it is below by as much; inf if nowhere. The set between them is Fieller's: a ratio of two noisy numbers can
    have an unbounded interval.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class StepFit:
    """(a, c, d) with their covariance, float64 on the CPU."""

    coefficients: torch.Tensor
    covariance: torch.Tensor

    def evaluate(self, row: Sequence[float]) -> tuple[float, float]:
        """Value and standard error of a linear combination."""
        weights = torch.tensor(row, dtype=torch.float64)
        return float(weights @ self.coefficients), math.sqrt(max(0.0, float(weights @ self.covariance @ weights)))

    def peak(self, z: float) -> Crossing:
        """Where J′ falls below zero."""
        return self._crossing(torch.stack([torch.ones_like(MULTIPLES), MULTIPLES, MULTIPLES ** 2 / 2], 1), z)

    def break_even(self, z: float) -> Crossing:
        """Where J falls below J(0)."""
        return self._crossing(torch.stack([torch.ones_like(MULTIPLES), MULTIPLES / 2, MULTIPLES ** 2 / 6], 1), z)

    def _crossing(self, basis: torch.Tensor, z: float) -> Crossing:
        value = basis @ self.coefficients
        error = ((basis @ self.covariance) * basis).sum(1).clamp(min=0).sqrt()
        return Crossing(*(_first_below_zero(curve) for curve in (value, value - z * error, value + z * error)))


def _first_below_zero(curve: torch.Tensor) -> float:
    below = curve < 0
    i = int(below.to(torch.int8).argmax())
    if not below[i]:
        return math.inf
    if i == 0:
        return 0.0
    share = float(curve[i - 1] / (curve[i - 1] - curve[i]))
    return float(MULTIPLES[i - 1] + share * (MULTIPLES[i] - MULTIPLES[i - 1]))


def fit_step(rows: Sequence[Sequence[float]], values: torch.Tensor, covariance: torch.Tensor,
             departure: float) -> StepFit | None:
    """Generalised least squares of (a, c, d), with d = 0 ± departure·(what J′ is, or changes by)/(peak or end)².

    Args:
        rows: one per measurement, as ``slope_row`` and the others give them.
        values, covariance: [n], [n, n] of the measurements, float64 on the CPU.
        departure: relative change of the curvature on the way to the peak, where that lies beyond the end.

    Returns:
        None where the measurements do not fix a parabola, or one of them has no spread at all.
    """
    design = torch.tensor(rows, dtype=torch.float64).reshape(-1, 3)
    if len(rows) < 2 or not (covariance.diagonal() > 0).all() or torch.linalg.matrix_rank(design[:, :2]) < 2:
        return None
    parabola, spread = _least_squares(design[:, :2], values, covariance)
    a, c = parabola.tolist()
    farthest = max(1.0, -a / c) if a > 0 > c else 1.0
    bend = departure * max(abs(a), abs(c), abs(a + c)) / farthest ** 2
    if bend == 0:
        return StepFit(torch.nn.functional.pad(parabola, (0, 1)), torch.nn.functional.pad(spread, (0, 1, 0, 1)))
    local = (design[:, 0] == 0).double()  # a curvature: of one place, where slope and gain are of the way
    variances = torch.full((1, 1), bend * bend, dtype=torch.float64)
    design = torch.cat([design, torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)])
    return StepFit(*_least_squares(design, torch.nn.functional.pad(values, (0, 1)),
                                   torch.block_diag(covariance + variances * local.diag(), variances)))


def _least_squares(design: torch.Tensor, values: torch.Tensor, covariance: torch.Tensor) -> tuple[torch.Tensor, ...]:
    scale = covariance.diagonal().sqrt()
    design, values = design / scale[:, None], values / scale
    correlation = covariance / scale.outer(scale) + ROUNDING * torch.eye(len(values), dtype=torch.float64)
    weighted = torch.linalg.solve(correlation, design)
    inverse = torch.linalg.inv(design.T @ weighted)
    return inverse @ (weighted.T @ values), inverse

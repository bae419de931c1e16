"""Exact figures along one direction: the gain of a step, its derivatives, and where it breaks even."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from rlvr_fast.simulate.problems import Problem

Tensor = torch.Tensor


def success(problem: Problem, theta: Tensor) -> Tensor:
    """[..., D] -> [...]: mean success rate of the population."""
    return problem.log_odds(theta).sigmoid().mean(-1)


def gain(problem: Problem, theta: Tensor, direction: Tensor, steps: Tensor) -> Tensor:
    """[M]: J(θ + step·direction) − J(θ)."""
    return success(problem, theta + steps[:, None] * direction) - success(problem, theta)


def derivatives(curve: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """First and second derivative at 0 of a differentiable function of one number."""
    step = torch.zeros((), dtype=torch.float64, requires_grad=True)
    first, = torch.autograd.grad(curve(step), step, create_graph=True)
    second, = torch.autograd.grad(first, step)
    return first.detach(), second


def first_loss(curve: Callable[[Tensor], Tensor], longest: float, *, shortest: float | None = None,
               n_scanned: int = 400) -> float:
    """The smallest step up to ``longest`` at which ``curve`` ([M] -> [M], 0 at 0) falls below 0.

    inf if it never does, 0 if it does from the start (still at 1e-9 of ``shortest``). Scans a geometric grid from
    ``shortest`` on and bisects, so a loss narrower than one grid interval is overlooked.
    """
    shortest = longest * 1e-6 if shortest is None else shortest
    steps = torch.logspace(math.log10(shortest), math.log10(longest), n_scanned, dtype=torch.float64)
    lost = (curve(steps) < 0).nonzero()
    if not len(lost):
        return math.inf
    i = int(lost[0])
    low, high = (float(steps[i - 1]) if i else 0.0), float(steps[i])
    while high - low > 1e-12 * high:
        if high < 1e-9 * shortest:
            return 0.0
        # 20 points a round: an evaluation costs the same for one step and for twenty
        inner = torch.linspace(low, high, 20, dtype=torch.float64)[1:]
        i = int((curve(inner) < 0).to(torch.int8).argmax())
        low, high = (float(inner[i - 1]) if i else low), float(inner[i])
    return high


def break_even(problem: Problem, theta: Tensor, direction: Tensor, *, longest: float = 1e3) -> float:
    """Multiple of ``direction`` at which the mean success rate is back where it started; inf if it never is."""
    return first_loss(lambda steps: gain(problem, theta, direction, steps), longest)

"""Training runs: fixed rates with exact gradients or rollouts, and steps measured in units of their break-even."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from rlvr_fast.simulate.lines import break_even, success
from rlvr_fast.simulate.problems import Batch, Problem, sample
from rlvr_fast.simulate.rules import Rule
from rlvr_fast.step.scan import StepCurve, scan_step

Tensor = torch.Tensor


def fixed_rate(problem: Problem, start: Tensor, rule: Rule, rates: Tensor, n_steps: int) -> Tensor:
    """[n_steps + 1, B]: success rate of B runs side by side, each at its own constant rate; exact gradients."""
    visited = [start.expand(len(rates), -1)]
    for _ in range(n_steps):
        visited.append(visited[-1] + rates[:, None] * rule.exact(problem, visited[-1]))
    return torch.cat([success(problem, torch.stack(part))
                      for part in (visited[i:i + 64] for i in range(0, len(visited), 64))])


def fixed_rate_sampled(problem: Problem, start: Tensor, rule: Rule, rate: float, n_steps: int, *, n_prompts: int,
                       group_size: int, generator: torch.Generator) -> Tensor:
    """[n_steps + 1]: exact success rate of one run whose gradients come from rollouts."""
    theta, history = start, [success(problem, start)]
    for _ in range(n_steps):
        batch = sample(problem, theta, n_prompts, group_size, generator)
        theta = theta + rate * rule.sampled(problem, theta, batch)
        history.append(success(problem, theta))
    return torch.stack(history)


def relative(problem: Problem, start: Tensor, fraction: float, n_steps: int, *,
             longest: float = 30.0) -> tuple[Tensor, Tensor]:
    """Steps of ``fraction`` times the exact break-even along the exact gradient: perfect alignment at every step.

    Where a step has no break-even within ``longest``, that length stands for it. Ends early when the gradient is gone.

    Returns:
        [K+1] success rates and [K] break-even lengths, K ≤ n_steps.
    """
    rule, theta = Rule("unit_norm"), start
    history, lengths = [success(problem, start)], []
    for _ in range(n_steps):
        direction = rule.exact(problem, theta)
        length = break_even(problem, theta, direction, longest=longest)
        if not direction.norm() > 0.5:
            break
        lengths.append(length)
        theta = theta + fraction * min(length, longest) * direction
        history.append(success(problem, theta))
    return torch.stack(history), torch.tensor(lengths, dtype=torch.float64)


SCANNED = tuple(2.0 ** k for k in range(-9, 2))


def adaptive_sampled(problem: Problem, start: Tensor, fraction: float, n_steps: int, *, n_prompts: int,
                     group_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Steps of ``fraction`` times what rollouts can vouch for; everything but the recorded truth is measured.

    The direction is the unit-norm update from one batch; its break-even is ``scan_step``'s on a second, held-out batch,
    cut at the longest scanned multiple that the rollouts reach with a significant gain. No such multiple, no step.

    Returns:
        [n_steps + 1] exact success rates and [n_steps] step lengths.
    """
    rule, theta = Rule("unit_norm"), start
    history, lengths = [success(problem, start)], []
    for _ in range(n_steps):
        update = rule.sampled(problem, theta, sample(problem, theta, n_prompts, group_size, generator))
        held_out = sample(problem, theta, n_prompts, group_size, generator)
        lengths.append(fraction * vouched(scan(problem, theta, update, held_out, SCANNED)))
        theta = theta + lengths[-1] * update
        history.append(success(problem, theta))
    return torch.stack(history), torch.tensor(lengths, dtype=torch.float64)


def scan(problem: Problem, theta: Tensor, update: Tensor, batch: Batch, multiples: Sequence[float]) -> StepCurve:
    """``scan_step`` of ``update`` on held-out rollouts."""
    parameter = theta.clone()
    return scan_step(lambda: problem.logp(parameter, batch), [parameter], [update], batch.rollouts,
                     multiples=multiples, in_sample=False)


def vouched(curve: StepCurve, *, ess_floor: float = 0.1, z: float = 2.0) -> float:
    """The longest scanned multiple reached with a significant gain, or the break-even if that is nearer; else 0."""
    reached = (curve.ess_fraction >= ess_floor) & (curve.success_gain > z * curve.success_gain_stderr)
    if not reached[0]:
        return 0.0
    last = int(reached.to(torch.int8).argmin()) if not reached.all() else len(reached)
    found = float(curve.success_break_even)
    return min(curve.multiples[last - 1], found if math.isfinite(found) else math.inf)

"""How far the sampled figures can be trusted: bias, spread and interval coverage against the exact truth.

Prompts are drawn at random from a population of closed-form tasks of different margins, so truths are population means
and standard errors over prompts are the right ones. Everything is in units of the true break-even 2|θ|. A 95 % interval
is the estimate ± 1.96 of its stated standard errors.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from functools import cache

import torch

from rlvr_fast.simulate.estimators import Estimate, end_slope, ratio_gains, two_ended
from rlvr_fast.simulate.lines import derivatives, gain, success
from rlvr_fast.simulate.output import Numbers, Report
from rlvr_fast.simulate.problems import SignTask, sample
from rlvr_fast.simulate.runs import scan
from rlvr_fast.step.measure import measure_step
from rlvr_fast.step.scan import StepCurve

LENGTH, Z95 = 16, 1.96
REGIMES = {  # margins and θ
    "hard": ((0,), 0.12), "middle": ((2, 4), 0.12), "easy": ((4, 6, 8), 0.12), "near one": ((8, 10), 0.12),
    "almost one": ((10, 12), 0.12), "far": ((2, 4), 0.25),
}
GROUP_SIZES, PROMPT_COUNTS, PROMPTS = (8, 32, 128, 512, 1024), (4, 16, 64), 32
STEPS = {0.3: "safe", 0.8: "near", 1.2: "overshoot"}  # proposed steps in break-evens, and the true verdict
SCANNED = tuple(sorted({round(f * m, 6) for f in STEPS for m in (0.5, 1, 2)} | {1.0}))
SHORT = 0.02  # step of the two-sided differences, in break-evens
CLASS_FLOORS = (0, 10, 30, 100)  # 30: the verdict as it is
RESPONSES_PER_CELL = 300_000
Values = defaultdict[str, list[tuple[float, float, float]]]  # figure -> (estimate, its standard error, truth)


def run(*, seeds: int = 150, quick: bool = False) -> Report:
    """``seeds``: replicates of every cell, fewer where they would need more than ``RESPONSES_PER_CELL``."""
    from rlvr_fast.simulate.coverage_report import figure, tables

    seeds = min(seeds, 5) if quick else seeds
    group_sizes = (8, 128) if quick else GROUP_SIZES
    cells = {}
    for regime in ("middle", "almost one") if quick else REGIMES:
        for group_size in group_sizes:
            cells[f"{regime}, {PROMPTS} x {group_size}"] = cell(regime, PROMPTS, group_size, seeds)
    for n_prompts in () if quick else PROMPT_COUNTS:
        cells[f"middle, {n_prompts} x 128"] = cell("middle", n_prompts, 128, seeds)
    regimes = {name: truth(name) for name in REGIMES}
    numbers = {"regimes": regimes, "cells": cells}
    parameters = {"length": LENGTH, "regimes": {name: {"margins": m, "theta": t} for name, (m, t) in REGIMES.items()},
                  "group_sizes": group_sizes, "n_prompts": PROMPTS, "prompt_counts": PROMPT_COUNTS, "steps": STEPS,
                  "scanned": SCANNED, "seeds": f"0 to {seeds - 1}, fewer in large cells: see n", "quick": quick}
    return Report("coverage", parameters, numbers, figure(numbers), tables(numbers))


def problem_of(regime: str) -> tuple[SignTask, torch.Tensor, torch.Tensor]:
    """Task, θ, and the update that breaks even exactly."""
    margins, at = REGIMES[regime]
    theta = torch.tensor([at], dtype=torch.float64)
    return SignTask(LENGTH, margins), theta, -2 * theta


@cache
def truth(regime: str) -> dict[str, float]:
    """Exact figures of the population, along the update that breaks even."""
    task, theta, update = problem_of(regime)
    slope, second = map(float, derivatives(lambda step: success(task, theta + step * update)))
    gains = gain(task, theta, update, torch.tensor(list(STEPS), dtype=torch.float64))
    return {"success": float(success(task, theta)), "success_slope": slope, "success_curvature": second,
            "success_peak": -slope / second if second < 0 else math.nan, "break_even": 1.0,
            **{f"success_gain {f:g}": float(g) for f, g in zip(STEPS, gains, strict=True)},
            **{f"success_log_odds_gain {f:g}": float(success(task, theta + f * update).logit()
                                                     - success(task, theta).logit()) for f in STEPS}}


@cache
def prompt_truth(regime: str) -> dict[str, torch.Tensor]:
    """[P] exact figures of each prompt of the population."""
    task, theta, update = problem_of(regime)
    one_by_one = [SignTask(LENGTH, (margin,)) for margin in task.margins]
    found = [derivatives(lambda step: one.log_odds(theta + step * update)[0]) for one in one_by_one]  # noqa: B023
    gains = {f"log_odds_gain {f:g}": task.log_odds(theta + f * update) - task.log_odds(theta) for f in STEPS}
    return {"alignment": torch.stack([f[0] for f in found]), "curvature": torch.stack([f[1] for f in found]), **gains}


def cell(regime: str, n_prompts: int, group_size: int, seeds: int) -> Numbers:
    """All figures of one regime at one sample size, over replicates."""
    n = min(seeds, max(12, RESPONSES_PER_CELL // (n_prompts * group_size)))
    values: Values = defaultdict(list)
    verdicts: dict[tuple[float, int], Counter[str]] = {(f, floor): Counter() for f in STEPS for floor in CLASS_FLOORS}
    reasons: dict[float, Counter[str]] = {f: Counter() for f in STEPS}
    for seed in range(n):
        replicate(regime, n_prompts, group_size, seed, values, verdicts, reasons)
    figures = {name: judge(*map(torch.tensor, zip(*rows, strict=True))) for name, rows in values.items()}
    return {"regime": regime, "n_prompts": n_prompts, "group_size": group_size, "n": n, "figures": figures,
            "verdicts": {f"{f:g}": {str(floor): {word: count / n for word, count in verdicts[f, floor].items()}
                                    for floor in CLASS_FLOORS} for f in STEPS},
            "reasons": {f"{f:g}": {why: count / n for why, count in reasons[f].items()} for f in STEPS}}


def replicate(regime: str, n_prompts: int, group_size: int, seed: int, values: Values,
              verdicts: dict[tuple[float, int], Counter[str]], reasons: dict[float, Counter[str]]) -> None:
    """Append (estimate, stated standard error, truth) of every figure from one draw of rollouts."""
    task, theta, update = problem_of(regime)
    true, generator = truth(regime), torch.Generator().manual_seed(seed)
    batch = sample(task, theta, n_prompts, group_size, generator)

    before, ahead, behind = (task.logp(theta + shift * update, batch) for shift in (0.0, SHORT, -SHORT))
    short = measure_step(before, ahead, batch.rollouts, logp_reverse=behind, in_sample=False)
    for name, power in (("success_slope", 1), ("success_curvature", 2), ("success_peak", -1)):
        values[name].append((float(getattr(short, name)) / SHORT ** power,
                             float(getattr(short, f"{name}_stderr")) / SHORT ** power, true[name]))
    values["quadratic break-even"].append((SHORT * float(short.success_break_even), math.nan, 1.0))

    curve = scan(task, theta, update, batch, SCANNED)
    measured = dict(zip(curve.multiples, curve.measures, strict=True))
    values["scan break-even"].append((float(curve.success_break_even), math.nan, 1.0))
    per_prompt = {"alignment": (short.alignment / SHORT, short.alignment_stderr / SHORT),
                  "curvature": (short.curvature / SHORT ** 2, short.curvature_stderr / SHORT ** 2)}
    start = Estimate(float(short.success_slope) / SHORT, float(short.success_slope_stderr) / SHORT)
    for f, correct in STEPS.items():
        step = measured[f]
        for name in ("success_gain", "success_log_odds_gain"):
            values[f"{name} {f:g}"].append((float(getattr(step, name)), float(getattr(step, f"{name}_stderr")),
                                            true[f"{name} {f:g}"]))
        values[f"ess_fraction {f:g}"].append((float(step.ess_fraction), math.nan, math.exp(-ratio_variance(regime, f))))
        per_prompt[f"log_odds_gain {f:g}"] = step.log_odds_gain, step.stderr
        for floor in CLASS_FLOORS:
            at_three = StepCurve((0.5, 1.0, 2.0), tuple(measured[round(f * m, 6)] for m in (0.5, 1, 2)), curve.z, 2.0,
                                 curve.ess_floor, floor)
            verdicts[f, floor][outcome(at_three.verdict, correct)] += 1
            if floor == curve.class_floor:
                reasons[f][at_three.reason or "determined"] += 1

        alternatives = ratio_gains(task, theta, f * update, batch)
        fresh = sample(task, theta + f * update, n_prompts, group_size, generator)
        end = end_slope(task, theta + f * update, update, fresh)
        trapezoid, crossing = two_ended(start, end)
        alternatives["two-ended"] = trapezoid._replace(value=f * trapezoid.value, stderr=f * trapezoid.stderr)
        values[f"two-ended break-even {f:g}"].append((f * crossing, math.nan, 1.0))
        for name, estimate in alternatives.items():
            values[f"{name} {f:g}"].append((*estimate, true[f"success_gain {f:g}"]))
    exact = prompt_truth(regime)
    for name, (estimates, errors) in per_prompt.items():
        values[name].extend(zip(estimates.tolist(), errors.tolist(), exact[name][batch.prompts].tolist(), strict=True))


def ratio_variance(regime: str, fraction: float) -> float:
    """Log of E[ρ²] for the step: the exact effective share is e^−this (independent tokens, so it is T times one's)."""
    _, theta, update = problem_of(regime)
    here, there = (torch.sigmoid(2 * torch.cat([-at, at])) for at in (theta, theta + fraction * update))
    return LENGTH * float((there.square() / here).sum().log())


def outcome(said: str, correct: str) -> str:
    """right; cautious: a safe step called near; wrong: a false claim; undetermined."""
    if said in (correct, "undetermined"):
        return "right" if said == correct else said
    return "cautious" if (said, correct) == ("near", "safe") else "wrong"


def judge(estimate: torch.Tensor, stderr: torch.Tensor, true: torch.Tensor) -> dict[str, float]:
    """Over replicates: bias, spread and root mean square of the error, coverage, all over estimates that exist.

    Errors are relative to the mean |truth|. ``defined``: share that was finite, with a finite standard error where one
    is stated. ``right_sign``, ``wrong_sign``: share that differs from 0 by two standard errors, by its sign.
    ``median``, ``low`` and ``high``: quantiles 50, 5 and 95 % of the estimates, infinite ones included.
    """
    estimate, stderr, true = estimate.double(), stderr.double(), true.double()
    stated = not bool(stderr.isnan().all())
    usable = estimate.isfinite() & (stderr.isfinite() if stated else True)
    error = (estimate - true)[usable]
    scale = true[usable].abs().mean()
    known = estimate[~estimate.isnan()]
    low, middle, high = (float(known.quantile(q, interpolation="nearest")) if len(known) else math.nan
                         for q in (0.05, 0.5, 0.95))
    significant = usable & (estimate.abs() > 2 * stderr)
    agrees = estimate.sign() == true.sign()
    covered = ((error.abs() <= Z95 * stderr[usable]).double().mean()) if stated else torch.tensor(math.nan)
    return {"truth": float(true.mean()), "mean": float(estimate[usable].mean()), "bias": float(error.mean() / scale),
            "spread": float(error.std() / scale) if len(error) > 1 else math.nan,
            "rms": float(error.square().mean().sqrt() / scale), "coverage": float(covered),
            "defined": float(usable.double().mean()),
            "right_sign": float((significant & agrees).double().mean()),
            "wrong_sign": float((significant & ~agrees).double().mean()), "median": middle, "low": low,
            "high": high, "count": int(usable.sum())}

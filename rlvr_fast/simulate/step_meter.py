"""Which estimator finds peak and break-even of a training step from 64 prompts x 8 rollouts, against the exact truth.

A step of ``STEPS`` true break-evens has been taken from θ. The *end* batch is sampled from where it ended; a *held-out*
batch and, for bandits, the batch that *built* the update are sampled from θ. Everything is in units of the true
break-even or peak. Closed-form regimes are those of ``coverage``; in a bandit every replicate has another update, made
by GRPO from its own batch, so that in-sample estimates can be shown too.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch

from rlvr_fast.simulate import coverage
from rlvr_fast.simulate.lines import break_even, first_loss, success
from rlvr_fast.simulate.output import BLACK, BLUE, GREEN, ORANGE, PINK, RED, SKY, Numbers, Report, label, panels, table
from rlvr_fast.simulate.problems import Bandit, Batch, Problem, sample
from rlvr_fast.simulate.rules import Rule
from rlvr_fast.simulate.runs import scan
from rlvr_fast.step.directional_scores import DirectionalScores, directional_scores
from rlvr_fast.step.measure import measure_step
from rlvr_fast.step.meter import StepMeter
from rlvr_fast.step.reading import StepReading

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

Tensor = torch.Tensor
N_PROMPTS, GROUP_SIZE, N_SMOOTHED = 64, 8, 5
STEPS = (0.1, 0.3, 0.8, 1.2)
BANDITS = {"bandit": 0.0, "bandit, trained": 3.0}  # length of θ; 32 contexts, 6 arms, 8 parameters
SCANNED = (0.25, 0.5, 0.8, 1.25, 2, 3.2, 5, 8, 12)
COLOURS = {"meter": BLACK, "meter, five steps": BLUE, "meter and start": GREEN, "end slope, curvature": SKY,
           "two slopes": ORANGE, "scan, held out": RED, "quadratic, held out": PINK, "scan, in sample": "#888888"}


class Step(NamedTuple):
    """One update on one problem: Δ breaks even at ``break_even`` multiples and is best at ``peak``."""

    problem: Problem
    theta: Tensor
    update: Tensor
    break_even: float
    peak: float
    built_from: Batch | None


class Found(NamedTuple):
    """An estimate with its 95 % interval; NaN where it has none."""

    value: float
    low: float = math.nan
    high: float = math.nan


def run(*, seeds: int = 24, quick: bool = False) -> Report:
    """``seeds``: replicates of every cell."""
    seeds = min(seeds, 4) if quick else seeds
    regimes = ("middle", "bandit") if quick else (*coverage.REGIMES, *BANDITS)
    steps = (0.3, 1.2) if quick else STEPS
    cells = {f"{regime}, {fraction:g}": cell(regime, fraction, seeds) for regime in regimes for fraction in steps}
    numbers = {"cells": cells}
    parameters = {"n_prompts": N_PROMPTS, "group_size": GROUP_SIZE, "steps": steps, "smoothed": N_SMOOTHED,
                  "regimes": regimes, "bandits": BANDITS, "scanned": SCANNED, "seeds": list(range(seeds)),
                  "quick": quick}
    return Report("step_meter", parameters, numbers, figure(numbers), tables(numbers))


def step_of(regime: str, fraction: float, seed: int) -> Step:
    """The update that covers ``fraction`` of the way to break-even."""
    if regime in coverage.REGIMES:
        task, theta, update = coverage.problem_of(regime)
        return Step(task, theta, fraction * update, 1 / fraction, 0.5 / fraction, None)
    bandit, theta, direction, length, peak, batch = bandit_step(regime, seed)
    return Step(bandit, theta, fraction * length * direction, 1 / fraction, peak / length / fraction, batch)


@cache
def bandit_step(regime: str, seed: int) -> tuple[Bandit, Tensor, Tensor, float, float, Batch]:
    """Bandit, θ, a direction that GRPO finds, its break-even and peak, and the batch that it was found with."""
    generator = torch.Generator().manual_seed(10_000 + seed)
    while True:  # until the direction helps at first and breaks even within reach; some bandits only saturate
        bandit = Bandit.random(32, 6, 8, generator)
        theta = torch.randn(8, generator=generator, dtype=torch.float64)
        theta = BANDITS[regime] * theta / theta.norm()
        batch = sample(bandit, theta, N_PROMPTS, GROUP_SIZE, generator)
        direction = Rule("grpo").sampled(bandit, theta, batch)
        length = break_even(bandit, theta, direction, longest=300)
        if 0 < length < math.inf:
            peak = first_loss(lambda steps: slopes(bandit, theta, direction, steps), length)  # noqa: B023
            if 0 < peak < length:
                return bandit, theta, direction, length, peak, batch


def slopes(problem: Problem, theta: Tensor, direction: Tensor, steps: Tensor) -> Tensor:
    """[M]: J′ along the direction."""
    at = steps.detach().requires_grad_()
    return torch.autograd.grad(success(problem, theta + at[:, None] * direction).sum(), at)[0]


def scores(problem: Problem, theta: Tensor, update: Tensor, batch: Batch) -> DirectionalScores:
    parameter = theta.clone()
    return directional_scores(lambda: problem.logp(parameter, batch), [parameter], [update], batch.rollouts)


def estimates(step: Step, generator: torch.Generator) -> tuple[dict[str, dict[str, Found]], str]:
    """{"peak" and "break-even": {estimator: estimate}} in multiples of the step, and the meter's verdict."""
    problem, theta, update = step[:3]
    ends = [sample(problem, theta + update, N_PROMPTS, GROUP_SIZE, generator) for _ in range(N_SMOOTHED)]
    held_out = sample(problem, theta, N_PROMPTS, GROUP_SIZE, generator)
    at_end = [scores(problem, theta + update, update, end) for end in ends]
    at_start = scores(problem, theta, update, held_out)

    def read(smoothing: float, start: DirectionalScores | None, *measured: tuple[Batch, DirectionalScores]
             ) -> StepReading:
        meter = StepMeter(smoothing=smoothing)
        if start is not None:
            meter.start(held_out.rollouts, start, held_out=True)
        for batch, along in measured:
            meter.end(batch.rollouts, along)
        return meter.reading()

    end, along = ends[0], at_end[0]
    readings = {
        "meter": read(0.0, None, (end, along)),
        "meter, five steps": read(0.999, None, *zip(ends, at_end, strict=True)),
        "meter and start": read(0.0, at_start, (end, along)),
        "end slope, curvature": read(0.0, None, (end, DirectionalScores(along.slope, along.curvature))),
        "two slopes": read(0.0, at_start, (end, DirectionalScores(along.slope))),
    }
    found = {"peak": {name: Found(r.peak, r.peak_low, r.peak_high) for name, r in readings.items()},
             "break-even": {name: Found(r.break_even, r.break_even_low, r.break_even_high)
                            for name, r in readings.items()}}
    curve = scan(problem, theta, update, held_out, SCANNED)
    found["break-even"]["scan, held out"] = Found(float(curve.success_break_even))
    before, ahead, behind = (problem.logp(theta + m * update, held_out) for m in (0.0, 0.1, -0.1))
    short = measure_step(before, ahead, held_out.rollouts, logp_reverse=behind, in_sample=False)
    for name, figure in (("peak", "success_peak"), ("break-even", "success_break_even")):
        value, error = (0.1 * float(getattr(short, f"{figure}{kind}")) for kind in ("", "_stderr"))
        found[name]["quadratic, held out"] = Found(value, value - 1.96 * error, value + 1.96 * error)
    if step.built_from is not None:
        inside = scan(problem, theta, update, step.built_from, SCANNED)
        found["break-even"]["scan, in sample"] = Found(float(inside.success_break_even))
    return found, readings["meter"].verdict


def cell(regime: str, fraction: float, seeds: int) -> Numbers:
    rows: dict[str, defaultdict[str, list[list[float]]]] = {"peak": defaultdict(list), "break-even": defaultdict(list)}
    verdicts: Counter[str] = Counter()
    for seed in range(seeds):
        step = step_of(regime, fraction, seed)
        found, verdict = estimates(step, torch.Generator().manual_seed(seed))
        verdicts[verdict] += 1
        for name, true in (("peak", step.peak), ("break-even", step.break_even)):
            for estimator, estimate in found[name].items():
                rows[name][estimator].append([x / true for x in estimate])
    return {"regime": regime, "fraction": fraction, "n": seeds,
            **{name: {estimator: judge(torch.tensor(values, dtype=torch.float64))
                      for estimator, values in rows[name].items()} for name in rows},
            "verdicts": {word: count / seeds for word, count in verdicts.items()}}


def judge(found: Tensor) -> dict[str, float]:
    """[n, 3] estimates and intervals over the truth -> their quality; a NaN is an estimate that was refused.

    ``near``: share within 15 % of the truth; ``coverage``: of intervals that hold it; ``bounded``: of intervals with an
    end; ``given``: of draws in which there is an estimate. All but the last among the given.
    """
    value, low, high = found[~found[:, 0].isnan()].unbind(1)
    if not len(value):
        return dict.fromkeys(("median", "low", "high", "near", "coverage", "bounded"), math.nan) | {"given": 0.0}
    quantiles = [float(value.quantile(q, interpolation="nearest")) for q in (0.5, 0.05, 0.95)]
    stated = not bool(low.isnan().all())
    covered = float(((low <= 1) & (high >= 1)).double().mean()) if stated else math.nan
    return {**dict(zip(("median", "low", "high"), quantiles, strict=True)),
            "near": float(((value - 1).abs() <= 0.15).double().mean()), "coverage": covered,
            "bounded": float(high.isfinite().double().mean()) if stated else math.nan,
            "given": len(value) / len(found)}


def tables(numbers: Numbers) -> list[Table]:
    cells, names = numbers["cells"], list(COLOURS)
    found = []
    for what in ("break-even", "peak"):
        shown = [name for name in names if any(name in cell[what] for cell in cells.values())]
        rows = [[name, *(_band(cell[what].get(estimator)) for estimator in shown)] for name, cell in cells.items()]
        found.append(table(f"{what} over the true one: median (5 % to 95 %) coverage of the 95 % interval, share given",
                           ["regime, step", *shown], rows))
    rows = [[name, *(f"{cell['verdicts'].get(word, 0):.2f}" for word in ("safe", "near", "overshoot", "undetermined"))]
            for name, cell in cells.items()]
    return [*found, table("Verdict of the meter", ["regime, step", "safe", "near", "overshoot", "undetermined"], rows)]


def _band(f: dict[str, float] | None) -> str:
    if f is None or not f["given"]:
        return "" if f is None else "refused"
    covered = "" if math.isnan(f["coverage"]) else f" {f['coverage']:.2f}"
    given = "" if f["given"] == 1 else f" [{f['given']:.2f}]"
    return f"{f['median']:.2f} ({f['low']:.2f}–{f['high']:.2f}){covered}{given}"


def figure(numbers: Numbers) -> Figure:
    fig, (even, peak, cover, near) = panels(4, width=7.5)
    cells = numbers["cells"]
    for axis, what in ((even, "break-even"), (peak, "peak"), (cover, "coverage"), (near, "near")):
        for k, (name, colour) in enumerate(COLOURS.items()):
            figures = [cell["peak" if what == "peak" else "break-even"].get(name) for cell in cells.values()]
            known = [(i, f) for i, f in enumerate(figures) if f is not None and f["given"] > 0.1]
            if not known:
                continue
            places = [i + 0.09 * (k - 3.5) for i, _ in known]
            if what in ("break-even", "peak"):
                middle = [min(f["median"], 9.0) for _, f in known]
                ends = [[m - f["low"] for m, (_, f) in zip(middle, known, strict=True)],
                        [min(f["high"], 9.0) - m for m, (_, f) in zip(middle, known, strict=True)]]
                axis.errorbar(places, middle, [[max(0.0, e) for e in end] for end in ends], fmt="o", color=colour,
                              markersize=3, linewidth=0.8, label=name)
            else:
                axis.plot(places, [f[what] for _, f in known], "o", color=colour, markersize=3.5, label=name)
        axis.set_xticks(range(len(cells)), list(cells), rotation=90)
        axis.legend(fontsize=6, ncols=2)
    for axis in (even, peak):
        axis.axhspan(0.85, 1.15, color=GREEN, alpha=0.2, linewidth=0)
        axis.set_ylim(0, 3)
    cover.axhspan(0.93, 0.97, color=GREEN, alpha=0.2, linewidth=0)
    label(even, "Break-even over the true one, median and 5 to 95 %", "", "estimate / truth")
    label(peak, "Peak over the true one", "", "estimate / truth")
    label(cover, "Coverage of the 95 % interval of the break-even", "", "share holding the truth")
    label(near, "Break-even within 15 % of the true one", "", "share of draws")
    for axis in (even, peak, cover, near):
        axis.tick_params(axis="x", labelsize=6)
    return fig

"""The relay: success, gap and share of the gradient per level while mixtures of horizons train from Q = 0."""

from __future__ import annotations

import math
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from rlvr_fast.simulate.output import Numbers, Report, table
from rlvr_fast.simulate.relay.exact import MASTERED, VISIBLE, Curve, Flow, curve, flow, hand_over
from rlvr_fast.simulate.relay.figures import relay_figure
from rlvr_fast.simulate.relay.runs import Condition, History, crossing, run_all, spread
from rlvr_fast.simulate.relay.training import Recipe, level_gaps

if TYPE_CHECKING:
    from rich.table import Table

SMOOTH, ABRUPT, ALONE, NOT_ABELIAN = "R = 3", "R = 7", "longest alone", "R = 3, not abelian"
CONDITIONS = {
    SMOOTH: Condition("Z_96", (5, 15, 45), 1050, 35, 256),
    ABRUPT: Condition("Z_96", (5, 35), 500, 50, 256),
    ALONE: Condition("Z_96", (45,), 120, 60, 256),
    NOT_ABELIAN: Condition("A_5", (3, 9, 27), 700, 35, 256),
}
_SMALL = partial(Condition, n_steps=320, measure_every=40, n_measured=256, n_identifiers=32,
                 recipe=Recipe(learning_rate=40.0, batch_size=256))
QUICK = {SMOOTH: _SMALL("Z_32", (3, 9, 27)), ABRUPT: _SMALL("Z_32", (3, 21)), ALONE: _SMALL("Z_32", (27,), n_steps=40),
         NOT_ABELIAN: _SMALL("S_4", (2, 6, 18))}
N_SHOWN = 2048  # responses per level and measurement in the run of the figure
START = 0.1  # β at which the flow starts; Q = 0 is a saddle in abelian groups, which only noise leaves


def run(*, seeds: int = 5, quick: bool = False) -> Report:
    """``seeds``: runs per condition."""
    conditions, seeds = (QUICK, min(seeds, 2)) if quick else (CONDITIONS, seeds)
    options = {"processes": 1} if quick else {"n_shown": N_SHOWN}
    histories = dict(zip(conditions, run_all(list(conditions.values()), range(seeds), **options), strict=True))
    beta = torch.arange(0.0, 6.5, 0.25 if quick else 0.05, dtype=torch.float64)
    curves = {name: [curve(condition.task, length, beta, n_prompts=8 if quick else 16)
                     for length in condition.lengths] for name, condition in conditions.items()}
    numbers = {"conditions": {name: condition_numbers(condition, histories[name], curves[name])
                              for name, condition in conditions.items()},
               "agreement": agreement(conditions[SMOOTH], curves[SMOOTH], 512 if quick else 2048)}
    parameters = {"conditions": {name: asdict(condition) for name, condition in conditions.items()},
                  "seeds": list(range(seeds)), "n_shown": None if quick else N_SHOWN, "start": START,
                  "visible": f"1/d + {VISIBLE}", "mastered": MASTERED, "quick": quick}
    return Report("relay", parameters, numbers, relay_figure(numbers, (SMOOTH, ABRUPT, NOT_ABELIAN), ALONE),
                  tables(numbers))


def condition_numbers(condition: Condition, histories: list[History], curves: list[Curve]) -> Numbers:
    """All runs of a condition, when each level woke and was mastered, and what expected learning says about it."""
    order = condition.task.group.order
    weight, rate = condition.recipe.entropy_weight, condition.recipe.learning_rate
    expected = flow(curves, condition.n_identifiers, entropy_weight=weight, start=START)
    times = expected.times(order)
    levels = {}
    for i, length in enumerate(condition.lengths):
        visible, mastered = ([crossing(history, i, threshold) for history in histories]
                             for threshold in (1 / order + VISIBLE, MASTERED))
        levels[length] = {
            "visible": visible, "mastered": mastered,
            "expected_visible": times[length][0] / rate, "expected_mastered": times[length][1] / rate,
            "peak_signal": [peak(history, i) for history in histories],
            "final_success": [history["success"][-1][i] for history in histories],
            "final_greedy": [history["greedy"][-1][i] for history in histories]}
    shown = torch.linspace(0, 1, 200, dtype=torch.float64) * (len(expected.beta) - 1)
    kept = shown.long().unique()
    along = beta_index(curves[0], expected)
    return {"group": condition.group, "order": order, "lengths": list(condition.lengths), "levels": levels,
            "runs": histories, "stalled_at": expected.stalled_at,
            "expected": {"step": expected.time[kept] / rate,
                         "success": [level.success[along][kept] for level in curves]},
            "hand_over": [hand_over(*pair) for pair in pairwise(curves)]}


def beta_index(level: Curve, expected: Flow) -> torch.Tensor:
    """Where the flow's β lie on the curves' grid."""
    return torch.searchsorted(level.beta, expected.beta).clamp(max=len(level.beta) - 1)


def peak(history: History, level: int) -> float:
    """The step at which a level's measured part of the gradient was largest; inf if none was ever significant."""
    signals = [row[level] for row in history["signal"]]
    largest = max(signals)
    return history["step"][signals.index(largest)] if largest > 0 else math.inf


def agreement(condition: Condition, curves: list[Curve], n_responses: int) -> Numbers:
    """Sampled success and squared gap against the exact ones at Q = β·I, in standard errors of the sample."""
    task, generator = condition.task, torch.Generator().manual_seed(1)
    line = torch.eye(task.n_identifiers)
    result: Numbers = {"beta": [], "length": [], "success": [], "gap": [], "n_responses": n_responses}
    for i, beta in enumerate(curves[0].beta.tolist()):
        levels = [level for level in curves if 0.05 < float(level.success[i]) < 0.95]
        if i % (len(curves[0].beta) // 26) or not levels:
            continue
        gap = level_gaps(task, beta * line, [level.length for level in levels], n_responses, generator)
        for j, level in enumerate(levels):
            rate = float(level.success[i])
            truth = (float(level.slope[i]) / (level.length * rate * (1 - rate))) ** 2 / (task.n_identifiers - 1)
            result["beta"].append(beta)
            result["length"].append(level.length)
            result["success"].append((float(gap.success_rate[j]) - rate) / (rate * (1 - rate) / n_responses) ** 0.5)
            result["gap"].append(float((gap.norm_sq[j] - truth) / gap.stderr[j]))
    return result


def tables(numbers: Numbers) -> list[Table]:
    rows, handed = [], []
    for name, condition in numbers["conditions"].items():
        title, first = f"{name} ({condition['group']})", condition["levels"][condition["lengths"][0]]
        for length, level in condition["levels"].items():
            # the flow starts off the saddle, so both are counted from where the first level wakes
            waits = [cell for event in ("visible", "mastered") for cell in (
                count([at - start for at, start in zip(level[event], first["visible"], strict=True)]),
                level[f"expected_{event}"] - first["expected_visible"])]
            rows.append([title, length, count(level["visible"]), *waits, value(level["final_success"]),
                         value(level["final_greedy"]), count(level["peak_signal"])])
        handed += [[title, "{} → {}".format(*pair), *handing.values()]
                   for pair, handing in zip(pairwise(condition["lengths"]), condition["hand_over"], strict=True)]
    zs = [[name, len(z), float(z.mean()), float(z.std()), float(z.abs().max())]
          for name, z in ((name, torch.tensor(numbers["agreement"][name])) for name in ("success", "gap"))]
    return [
        table("Steps, mean ± sd over seeds (seeds that got there); since: after the first level became visible",
              ["", "L", "visible", "since", "expected", "mastered, since", "expected", "final J", "final greedy",
               "signal peaks"], rows),
        table("Hand-over along Q = β·I: where the harder level's gradient overtakes, and the condition Δ'^L' = 1 − Δ",
              ["", "levels", "β", "Δ'^L' there", "1 − Δ there", "β of the condition"], handed),
        table("Sampled against exact at Q = β·I, in standard errors", ["", "n", "mean", "sd", "largest"], zs)]


def count(values: list[float]) -> str:
    found = spread(values)
    if not found["finite"]:
        return f"never (0/{found['of']})"
    return f"{found['mean']:.0f} ± {found['sd']:.0f} ({found['finite']}/{found['of']})"


def value(values: list[float]) -> str:
    found = spread(values)
    return f"{found['mean']:.3f} ± {found['sd']:.3f}"

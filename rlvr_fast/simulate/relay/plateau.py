"""How long a level waits for its turn: plateau length against the difficulty ratio R, the order d and C_B.

The plateau of a mixture {L, ⌈R·L⌉} is the time from mastering L to ⌈R·L⌉ becoming visible; negative where the harder
level wakes first. Expected learning gives it as a quadrature, sampled runs with their spread over seeds.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch

from rlvr_fast.simulate.output import BLACK, BLUE, GREEN, ORANGE, RED, Numbers, Report, label, panels, table
from rlvr_fast.simulate.relay.exact import (
    MASTERED,
    VISIBLE,
    Curve,
    curve,
    flow,
    mixture,
    plateau_exponent,
    spread_success,
)
from rlvr_fast.simulate.relay.group import cyclic, named
from rlvr_fast.simulate.relay.runs import Condition, crossing, run_all, spread
from rlvr_fast.simulate.relay.task import StateTracking
from rlvr_fast.simulate.relay.training import Recipe
from rlvr_fast.simulate.scaling import slope

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

SHORTEST, RATIOS = 5, (2, 3, 4, 5, 6, 7)
N_STEPS, LARGEST_SAMPLED = 1500, 5  # runs stop where the plateau ends, or are given up
ORDERS, SHARPNESS = (96, 144, 216, 324, 486), (2.0, 3.0, 4.0, 6.0, 8.0)
ENTROPY_WEIGHTS = (0.0, 1e-3)


def run(*, seeds: int = 5, quick: bool = False) -> Report:
    """``seeds``: sampled runs per ratio."""
    seeds = min(seeds, 2) if quick else seeds
    recipe = Recipe(batch_size=256 if quick else 512, entropy_weight=0.0)
    numbers = {"ratios": ratios(seeds, recipe, quick), "orders": orders((96, 144) if quick else ORDERS, quick),
               "sharpness": sharpness((4.0,) if quick else SHARPNESS, quick), "margin": margins(quick)}
    parameters = {"shortest": SHORTEST, "n_steps": N_STEPS, "seeds": list(range(seeds)),
                  "recipe": asdict(recipe), "visible": f"1/d + {VISIBLE}", "mastered": MASTERED, "quick": quick}
    return Report("plateau", parameters, numbers, figure(numbers), tables(numbers))


def grid(quick: bool, end: float = 8.0) -> torch.Tensor:
    return torch.arange(0.1, end, 0.2 if quick else 0.05, dtype=torch.float64)


def waiting(levels: list[Curve], task: StateTracking, *, entropy_weight: float = 0.0) -> float:
    """t from the first level mastered to the second visible, in the flow; inf if never."""
    way = flow(levels, task.n_identifiers, entropy_weight=entropy_weight)
    mastered, visible = way.reaches(levels[0], MASTERED), way.reaches(levels[1], 1 / task.group.order + VISIBLE)
    return visible - mastered if math.isfinite(mastered) else math.inf


def ratios(seeds: int, recipe: Recipe, quick: bool) -> Numbers:
    """Z_96, C_B = 4: expected plateaus, with and without entropy bonus, and sampled ones without."""
    group, shown = ("Z_48", (2, 4)) if quick else ("Z_96", RATIOS)
    task = StateTracking(named(group))
    order = task.group.order
    lengths = {ratio: mixture(task, SHORTEST, ratio, math.ceil(SHORTEST * ratio)) for ratio in shown}
    easy = curve(task, SHORTEST, grid(quick), n_prompts=32)
    pairs = {ratio: [easy, curve(task, lengths[ratio][-1], grid(quick), n_prompts=8)] for ratio in shown}
    conditions = {ratio: Condition(group, lengths[ratio], 600 if quick else N_STEPS, 10, 0,
                                   (MASTERED, 1 / order + VISIBLE), recipe=recipe)
                  for ratio in shown if ratio <= LARGEST_SAMPLED}
    runs = dict(zip(conditions, run_all(list(conditions.values()), range(seeds), processes=1 if quick else 2),
                    strict=True))
    result = {}
    for ratio in shown:
        ends = [(crossing(history, 0, MASTERED), crossing(history, 1, 1 / order + VISIBLE))
                for history in runs.get(ratio, ())]
        result[ratio] = {
            "lengths": lengths[ratio], "mastered_and_visible": ends,
            "sampled": [visible - mastered if max(mastered, visible) < math.inf else math.inf
                        for mastered, visible in ends],
            **{f"expected, entropy weight {weight:g}": waiting(pairs[ratio], task, entropy_weight=weight)
               / recipe.learning_rate for weight in ENTROPY_WEIGHTS}}
    return {"group": group, "learning_rate": recipe.learning_rate, "by_ratio": result}


def orders(shown: tuple[int, ...], quick: bool) -> Numbers:
    """Expected plateau against d at C_B = 4: slope of log length, as it is and with the pace's own (ln d)²."""
    result: Numbers = {"order": shown, "by_ratio": {}}
    for ratio in (5,) if quick else (3, 5, 7):
        lengths = []
        for order in shown:
            task = StateTracking(cyclic(order))
            lengths.append(waiting([curve(task, length, grid(quick), n_prompts=4)
                                    for length in (SHORTEST, SHORTEST * ratio)], task))
        corrected = [length * math.log(order) ** 2 for length, order in zip(lengths, shown, strict=True)]
        result["by_ratio"][ratio] = {
            "time": lengths, "slope": slope(shown, [lengths])["mean"], "corrected": slope(shown, [corrected])["mean"],
            "paper": plateau_exponent(4.0, ratio), "derived": plateau_exponent(4.0, ratio, derived=True)}
    return result


def sharpness(shown: tuple[float, ...], quick: bool) -> Numbers:
    """Z_96: what becomes of {5, 15, 45}, {5, 35} and {45} in expectation, for the constants that are not known."""
    result = {}
    for c_b in shown:
        task = StateTracking(cyclic(96), c_b=c_b)
        beta = grid(quick, 12.0)[::1 if quick else 2]
        curves = {length: curve(task, length, beta, n_prompts=16 if length < 10 else 4)
                  for length in (5, 15, 35, 45)}
        for weight in ENTROPY_WEIGHTS:
            row = {}
            for lengths in ((5, 15, 45), (5, 35), (45,)):
                way = flow([curves[length] for length in lengths], task.n_identifiers, entropy_weight=weight)
                row[str(lengths)] = {"visible": way.reaches(curves[lengths[-1]], 1 / 96 + VISIBLE),
                                     "mastered": way.reaches(curves[lengths[-1]], MASTERED),
                                     "stalled_at": way.stalled_at}
            result[f"C_B = {c_b:g}, entropy weight {weight:g}"] = row
    return result


def margins(quick: bool) -> Numbers:
    """How far success is from 1/d + (1 − 1/d)Δ^L between 0.02 and 0.99, and how uncertain the exact side is."""
    result = {}
    for name, lengths in (("Z_96", (5, 15, 45)), ("A_5", (5, 15, 45))):
        task = StateTracking(named(name))
        for length in lengths[:1] if quick else lengths:
            level = curve(task, length, grid(quick, 6.0), n_prompts=32 if length < 10 else 8)
            formula = spread_success(level.margin, length, task.group.order)
            between = (level.success > 0.02) & (level.success < 0.99)
            result[f"{name}, L = {length}"] = {
                "difference": float((level.success - formula)[between].abs().max()),
                "stderr": float(level.stderr[between].max()), "success": level.success, "formula": formula,
                "margin": level.margin}
    return result


def tables(numbers: Numbers) -> list[Table]:
    rows, by_ratio = [], numbers["ratios"]["by_ratio"]
    for ratio, row in by_ratio.items():
        found = spread(row["sampled"])
        sampled = [f"{found['mean']:.0f} ± {found['stderr']:.0f}", found["sd"], f"{found['finite']}/{found['of']}"]
        rows.append([f"{ratio}", ", ".join(map(str, row["lengths"])),
                     *(row[f"expected, entropy weight {weight:g}"] for weight in ENTROPY_WEIGHTS),
                     *(sampled if row["sampled"] else ["", "", ""])])
    drawn = numbers["ratios"]
    return [
        table(f"Plateau in steps at η = {drawn['learning_rate']:g}, {drawn['group']}, C_B = 4; ± standard error",
              ["R", "levels", "expected", "with entropy 1e-3", "sampled", "sd", "seeds"], rows),
        table("Growth of the expected plateau with d, C_B = 4",
              ["R", "slope", "of length·(ln d)²", "C_B R/(C_B + R) − 1 [paper B]", "C_B R/(C_B + R − 1) − 1 [derived]"],
              [[str(ratio), row["slope"], row["corrected"], row["paper"], row["derived"]]
               for ratio, row in numbers["orders"]["by_ratio"].items()]),
        table("Expected η·steps until the longest level is visible / mastered, Z_96, from β = 0.1",
              ["", *next(iter(numbers["sharpness"].values()))],
              [[name, *(f"{cell['visible']:.3g} / {cell['mastered']:.3g}" for cell in row.values())]
               for name, row in numbers["sharpness"].items()]),
        table("Success against 1/d + (1 − 1/d)Δ^L, 0.02 < J < 0.99", ["", "largest difference", "stderr of exact J"],
              [[name, row["difference"], row["stderr"]] for name, row in numbers["margin"].items()])]


def figure(numbers: Numbers) -> Figure:
    fig, (against_ratio, against_order, formula) = panels(3)
    by_ratio = numbers["ratios"]["by_ratio"]
    shown = list(by_ratio)
    found = {ratio: spread(row["sampled"]) for ratio, row in by_ratio.items() if row["sampled"]}
    for weight, colour in zip(ENTROPY_WEIGHTS, (BLACK, RED), strict=True):
        lengths = [by_ratio[ratio][f"expected, entropy weight {weight:g}"] for ratio in shown]
        against_ratio.plot(shown, [length if math.isfinite(length) else math.nan for length in lengths], "--",
                           color=colour, marker="s", markersize=4, label=f"expected, entropy weight {weight:g}")
    against_ratio.errorbar(list(found), [row["mean"] for row in found.values()],
                           [row["stderr"] for row in found.values()], fmt="o", color=BLUE, capsize=3,
                           label="sampled, ± standard error over seeds")
    against_ratio.set_yscale("symlog", linthresh=10)
    against_ratio.legend(fontsize=7)
    label(against_ratio, f"Plateau of {{5, 5R}}, {numbers['ratios']['group']}", "R",
          f"steps at η = {numbers['ratios']['learning_rate']:g}")
    drawn = numbers["orders"]
    for (ratio, row), colour in zip(drawn["by_ratio"].items(), (GREEN, ORANGE, RED), strict=False):
        against_order.plot(drawn["order"], row["time"], "o-", color=colour, markersize=4,
                           label=f"R = {ratio}: slope {row['slope']:.2f}, with (ln d)² {row['corrected']:.2f}; "
                                 f"paper {row['paper']:.2f}, derived {row['derived']:.2f}")
    against_order.set_xscale("log")
    against_order.set_yscale("log")
    against_order.legend(fontsize=7)
    label(against_order, "Expected plateau against the group's order, C_B = 4", "d", "η · steps")
    for (name, row), colour in zip(numbers["margin"].items(), (BLUE, GREEN, ORANGE) * 2, strict=False):
        formula.plot(row["margin"], row["success"], color=colour, linewidth=2.5, alpha=0.5, label=name)
        formula.plot(row["margin"], row["formula"], color=BLACK, linewidth=0.8, linestyle="--")
    formula.set_xlim(left=0)
    formula.legend(fontsize=7)
    label(formula, "Exact success, and 1/d + (1 − 1/d)Δ^L (dashed)", "margin Δ", "success rate")
    return fig

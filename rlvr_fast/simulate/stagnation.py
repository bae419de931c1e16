"""Runs at a fixed rate: which rules stall below the best attainable success, and at which rates; and one that does not.

Closed-form task: T = 256, m = 48, from θ = 0.35 (J = 0.0075); the best attainable is J(0) = 0.998. Final success is the
mean over the last quarter of a run, since a stalled run cycles. The adaptive rate takes a fixed fraction of the
break-even at every step: found exactly, or measured by ``scan_step`` on held-out rollouts (``runs.adaptive_sampled``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from rlvr_fast.simulate.lines import success
from rlvr_fast.simulate.output import BLACK, BLUE, GREEN, ORANGE, PINK, RED, SKY, Numbers, Report, label, panels, table
from rlvr_fast.simulate.problems import Bandit, SignTask
from rlvr_fast.simulate.rules import Rule
from rlvr_fast.simulate.runs import adaptive_sampled, fixed_rate, fixed_rate_sampled, relative

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

TASK, THETA = SignTask(256, (48,)), 0.35
RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
SAFE_FRACTION = 0.3
RULES = (Rule("unit_norm"), Rule("grpo"), Rule("grpo", True), Rule("grpo", group_size=8), Rule("grpo", True, 8),
         Rule("reinforce"), Rule("reinforce", True), Rule("rloo"), Rule("rloo", True), Rule("dr_grpo", group_size=8),
         Rule("dr_grpo", True, 8), Rule("natural"), Rule("natural", True))
SAMPLED_RULES = (Rule("unit_norm"), Rule("grpo"), Rule("grpo", True), Rule("reinforce"), Rule("rloo"),
                 Rule("dr_grpo"), Rule("natural"))
DRAWN = {"unit_norm": (ORANGE, "-"), "grpo": (BLUE, "-"), "grpo with 1/T": (BLUE, "--"), "grpo G=8": (SKY, "-"),
         "reinforce": (RED, "-"), "reinforce with 1/T": (RED, "--"), "natural": (GREEN, "-")}


def run(*, seeds: int = 3, quick: bool = False) -> Report:
    """``seeds``: sampled runs per rule and rate, adaptive runs, and random bandits; means are reported."""
    seeds, n_steps, n_sampled = (1, 240, 20) if quick else (seeds, 4000, 300)
    n_adaptive = 8 if quick else 40
    rules, sampled_rules = (RULES[:3], SAMPLED_RULES[:2]) if quick else (RULES, SAMPLED_RULES)
    numbers = {"rates": RATES, "optimum": float(success(TASK, torch.zeros(1, dtype=torch.float64))),
               "exact": exact(rules, n_steps), "curve": curves(quick, n_steps),
               "sampled": sampled(sampled_rules, seeds, n_sampled),
               "adaptive": adaptive(seeds, n_adaptive), "bandit": bandits(seeds, n_steps // 4, n_adaptive)}
    parameters = {"length": TASK.length, "margins": TASK.margins, "theta": THETA, "rates": RATES, "n_steps": n_steps,
                  "n_sampled_steps": n_sampled, "sampled_prompts": 16, "sampled_group_size": 8,
                  "safe_fraction": SAFE_FRACTION, "n_adaptive_steps": n_adaptive, "adaptive_prompts": 32,
                  "adaptive_group_size": 32, "seeds": list(range(seeds)), "quick": quick}
    return Report("stagnation", parameters, numbers, figure(numbers), tables(numbers))


def settled(history: torch.Tensor) -> torch.Tensor:
    """Mean over the last quarter, an even number of steps."""
    n = len(history) // 8 * 2
    return history[-n:].mean(0)


def start() -> torch.Tensor:
    return torch.tensor([THETA], dtype=torch.float64)


def exact(rules: tuple[Rule, ...], n_steps: int) -> Numbers:
    rates = torch.tensor(RATES, dtype=torch.float64)
    return {str(rule): settled(fixed_rate(TASK, start(), rule, rates, n_steps)) for rule in rules}


def curves(quick: bool, n_steps: int) -> Numbers:
    """The same on a fine grid of rates, for the figure."""
    rates = torch.logspace(-3, 1, 9 if quick else 49, dtype=torch.float64)
    rules = [rule for rule in RULES if str(rule) in DRAWN]
    return {"rate": rates, "final": {str(rule): settled(fixed_rate(TASK, start(), rule, rates, n_steps))
                                     for rule in (rules[:2] if quick else rules)}}


def sampled(rules: tuple[Rule, ...], seeds: int, n_steps: int) -> Numbers:
    """16 prompts of 8 responses a step: {rule: [rate][seed]} of the exact success it settles at."""
    def settle(rule: Rule, rate: float, seed: int) -> float:
        generator = torch.Generator().manual_seed(seed)
        return float(settled(fixed_rate_sampled(TASK, start(), rule, rate, n_steps, n_prompts=16, group_size=8,
                                                generator=generator)))
    return {str(rule): [[settle(rule, rate, seed) for seed in range(seeds)] for rate in RATES] for rule in rules}


def adaptive(seeds: int, n_steps: int) -> Numbers:
    runs = [adaptive_sampled(TASK, start(), SAFE_FRACTION, n_steps, n_prompts=32, group_size=32,
                             generator=torch.Generator().manual_seed(seed)) for seed in range(seeds)]
    return {"exact": relative(TASK, start(), SAFE_FRACTION, n_steps)[0], "sampled": [history for history, _ in runs],
            "lengths": [lengths for _, lengths in runs]}


def bandits(seeds: int, n_steps: int, n_adaptive: int) -> Numbers:
    """6 contexts with 4 arms under 8 parameters, on which perfect success is possible; success against the rate."""
    rates = torch.logspace(-1, 3, 9, dtype=torch.float64)
    final: dict[str, list[torch.Tensor]] = {
        str(rule): [] for rule in (Rule("unit_norm"), Rule("grpo"), Rule("reinforce"), Rule("natural"))}
    adapted = []
    for seed in range(seeds):
        bandit = Bandit.random(6, 4, 8, torch.Generator().manual_seed(seed), solvable=True)
        zero = torch.zeros(8, dtype=torch.float64)
        for name, values in final.items():
            values.append(settled(fixed_rate(bandit, zero, Rule(name), rates, n_steps)))
        adapted.append(relative(bandit, zero, SAFE_FRACTION, 4 * n_adaptive, longest=10.0)[0][-1])
    return {"rate": rates, "final": {name: torch.stack(values) for name, values in final.items()},
            "adaptive": [float(value) for value in adapted]}


def tables(numbers: Numbers) -> list[Table]:
    columns = ["rule", *(f"η = {rate:g}" for rate in RATES)]
    optimum, adapted, bandit = numbers["optimum"], numbers["adaptive"], numbers["bandit"]
    return [table(f"Final success, exact gradients; best attainable {optimum:.4f}", columns,
                  [[name, *(f"{v:.3f}" for v in values.tolist())] for name, values in numbers["exact"].items()]),
            table("Final success, sampled gradients: mean (lowest to highest seed)", columns,
                  [[name, *(f"{sum(v) / len(v):.3f} ({min(v):.3f}–{max(v):.3f})" for v in values)]
                   for name, values in numbers["sampled"].items()]),
            table(f"Adaptive rate, {SAFE_FRACTION} of the break-even at every step",
                  ["break-even", "last success", "below the optimum by"],
                  [["exact", float(adapted["exact"][-1]), optimum - float(adapted["exact"][-1])],
                   *([f"from rollouts, seed {i}", float(h[-1]), optimum - float(h[-1])]
                     for i, h in enumerate(adapted["sampled"]))]),
            table("Bandits with perfect success in reach: mean final success",
                  ["rule", *(f"η = {rate:.2g}" for rate in bandit["rate"].tolist())],
                  [*([name, *(f"{v:.3f}" for v in runs.mean(0).tolist())] for name, runs in bandit["final"].items()),
                   ["adaptive", f"{sum(bandit['adaptive']) / len(bandit['adaptive']):.3f}"]])]


def figure(numbers: Numbers) -> Figure:
    fig, (rate, stall, run_axis, bandit) = panels(4)
    optimum = numbers["optimum"]
    for name, values in numbers["curve"]["final"].items():
        colour, line = DRAWN[name]
        rate.plot(numbers["curve"]["rate"], values, color=colour, linestyle=line, marker=".", label=name)
        stall.plot(numbers["curve"]["rate"], (optimum - values).clamp(min=1e-9), color=colour, linestyle=line,
                   marker=".", label=name)
    for name, values in numbers["sampled"].items():
        if name in DRAWN:
            rate.plot(RATES, [sum(v) / len(v) for v in values], "x", color=DRAWN[name][0], markersize=7)
    rate.plot([], [], "kx", label="sampled gradients")
    rate.axhline(optimum, color=BLACK, linestyle=":", linewidth=1, label="optimum")
    rate.set_xscale("log")
    rate.legend(fontsize=7)
    label(rate, f"Closed-form task, T = {TASK.length}, from J = 0.0075", "fixed rate η (log scale)",
          "final success rate")
    stall.set_xscale("log")
    stall.set_yscale("log")
    label(stall, "How far below it ends: left too slow, right stalled (1e-9: at most)", "fixed rate η (log scale)",
          "optimum − final success")
    adapted = numbers["adaptive"]
    run_axis.plot(adapted["exact"], color=BLACK, marker="o", markersize=3, label="break-even exact")
    for i, history in enumerate(adapted["sampled"]):
        run_axis.plot(history, color=PINK, marker=".", label="break-even from rollouts" if i == 0 else None)
    run_axis.axhline(optimum, color=BLACK, linestyle=":", linewidth=1, label="optimum")
    run_axis.legend(fontsize=7)
    label(run_axis, f"Adaptive: {SAFE_FRACTION} of the break-even at every step", "step", "success rate")
    for name, values in numbers["bandit"]["final"].items():
        colour, line = DRAWN[name]
        bandit.plot(numbers["bandit"]["rate"], values.mean(0), color=colour, linestyle=line, marker="o", markersize=3,
                    label=name)
    adapted = numbers["bandit"]["adaptive"]
    bandit.axhline(sum(adapted) / len(adapted), color=PINK, linestyle="--", label="adaptive, exact break-even")
    bandit.set_xscale("log")
    bandit.legend(fontsize=7)
    label(bandit, "Bandits with perfect success in reach", "fixed rate η (log scale)", "final success rate")
    return fig

"""Above the break-even every step loses, however well it is aligned: runs at a constant fraction of the break-even.

Every direction is the exact gradient, so alignment is perfect; only the length is wrong. On the closed-form task a step
of c break-evens takes θ to (1 − 2c)θ: success falls at every step to 0 for c > 1. A bandit is not such an instance:
steps with a break-even lose there too, but some directions have none, and the run wanders instead of collapsing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from rlvr_fast.simulate.lines import success
from rlvr_fast.simulate.output import BLACK, BLUE, GREEN, ORANGE, PINK, RED, SKY, Numbers, Report, label, panels, table
from rlvr_fast.simulate.problems import Bandit, SignTask, sample
from rlvr_fast.simulate.rules import Rule
from rlvr_fast.simulate.runs import relative, scan

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

TASK, THETA = SignTask(256, (48,)), 0.02
FRACTIONS = (0.4, 0.8, 0.95, 1.05, 1.2, 1.5)
COLOURS = (GREEN, SKY, BLUE, ORANGE, RED, PINK)


def run(*, seeds: int = 5, quick: bool = False) -> Report:
    """``seeds``: random bandits, and draws of rollouts for the verdicts along the collapse."""
    seeds, n_steps = (min(seeds, 2), 14) if quick else (seeds, 60)
    numbers = {"closed_form": closed_form(n_steps), "bandit": bandits(seeds, n_steps),
               "verdicts": verdicts(seeds, 2 if quick else 9)}
    parameters = {"length": TASK.length, "margins": TASK.margins, "theta": THETA, "fractions": FRACTIONS,
                  "n_steps": n_steps, "seeds": list(range(seeds)), "verdict_prompts": 64, "verdict_group_size": 32,
                  "quick": quick}
    return Report("collapse", parameters, numbers, figure(numbers), tables(numbers))


def closed_form(n_steps: int) -> Numbers:
    start = torch.tensor([THETA], dtype=torch.float64)
    runs = {str(fraction): relative(TASK, start, fraction, n_steps)[0] for fraction in FRACTIONS}
    return {"success": runs, "optimum": float(success(TASK, torch.zeros_like(start)))}


def bandits(seeds: int, n_steps: int) -> Numbers:
    """16 contexts that 4 parameters cannot all satisfy. ``lost``: share of the steps with a break-even that lost."""
    runs, lost, without = {}, {}, {}
    for fraction in FRACTIONS:
        histories, worse, finite, total = [], 0, 0, 0
        for seed in range(seeds):
            bandit = Bandit.random(16, 4, 4, torch.Generator().manual_seed(seed))
            history, lengths = relative(bandit, torch.zeros(4, dtype=torch.float64), fraction, n_steps)
            bounded = lengths.isfinite()
            worse += int((history.diff()[bounded] < 0).sum())
            finite += int(bounded.sum())
            total += len(lengths)
            histories.append(history)
        runs[str(fraction)] = histories
        lost[str(fraction)], without[str(fraction)] = worse / max(finite, 1), 1 - finite / max(total, 1)
    return {"success": runs, "lost": lost, "without_break_even": without}


def verdicts(seeds: int, n_steps: int) -> Numbers:
    """What ``scan_step`` says on fresh held-out rollouts before each step of the collapse at 1.2."""
    rule, rows, theta = Rule("unit_norm"), [], torch.tensor([THETA], dtype=torch.float64)
    for step in range(n_steps):
        update = 1.2 * 2 * float(theta.abs()) * rule.exact(TASK, theta)
        found = []
        for seed in range(seeds):
            batch = sample(TASK, theta, 64, 32, torch.Generator().manual_seed(1000 * step + seed))
            curve = scan(TASK, theta, update, batch, (0.5, 1.0, 2.0))
            found.append({"verdict": curve.verdict, "ess_fraction": float(curve.ess_fraction[1])})
        after = theta + update
        rows.append({"success_before": float(success(TASK, theta)), "success_after": float(success(TASK, after)),
                     "found": found})
        theta = after
    return {"steps": rows}


def tables(numbers: Numbers) -> list[Table]:
    exact = numbers["closed_form"]["success"]
    sequence = [[f"{fraction}", *(float(f"{value:.4f}") for value in exact[str(fraction)][:10].tolist())]
                for fraction in FRACTIONS]
    rows = [[f"{fraction}", numbers["bandit"]["lost"][str(fraction)],
             numbers["bandit"]["without_break_even"][str(fraction)],
             float(torch.stack([h[-1] for h in numbers["bandit"]["success"][str(fraction)]]).mean())]
            for fraction in FRACTIONS]
    said = [[str(i), row["success_before"], row["success_after"],
             *(sum(f["verdict"] == v for f in row["found"]) for v in ("safe", "near", "overshoot", "undetermined")),
             sum(f["ess_fraction"] for f in row["found"]) / len(row["found"])]
            for i, row in enumerate(numbers["verdicts"]["steps"])]
    return [table("Closed form: success before step 0, 1, 2, …, by the step in break-evens",
                  ["step", *map(str, range(10))], sequence),
            table("Random bandits", ["step", "steps with a break-even that lost", "steps without one",
                                     "last success"], rows),
            table("Verdicts before each step of 1.2 break-evens, closed form",
                  ["step", "success", "after", "safe", "near", "overshoot", "undetermined", "effective share"], said)]


def figure(numbers: Numbers) -> Figure:
    fig, (exact, odds, bandit) = panels(3)
    for fraction, colour in zip(FRACTIONS, COLOURS, strict=True):
        rates = numbers["closed_form"]["success"][str(fraction)]
        text = f"{fraction} break-evens"
        exact.plot(rates, color=colour, marker="o", markersize=3, label=text)
        odds.plot(torch.logit(rates), color=colour, marker="o", markersize=3, label=text)
        histories = numbers["bandit"]["success"][str(fraction)]
        shortest = min(map(len, histories))
        bandit.plot(torch.stack([h[:shortest] for h in histories]).mean(0), color=colour, label=text)
    exact.axhline(numbers["closed_form"]["optimum"], color=BLACK, linestyle=":", linewidth=1, label="optimum")
    exact.set_xlim(-0.5, 20.5)
    odds.set_xlim(-0.5, 20.5)
    odds.set_ylim(-40, 8)
    for axis in (exact, bandit):
        axis.set_ylim(-0.02, 1.02)
        axis.legend(fontsize=7)
    label(exact, f"Closed-form task, T = {TASK.length}, exact gradients", "step", "success rate")
    label(odds, "The same as log-odds", "step", "log-odds of success")
    label(bandit, f"Random bandits, mean of {len(histories)}", "step", "success rate")
    return fig

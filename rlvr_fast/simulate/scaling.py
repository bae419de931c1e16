"""How the break-even scales with the response length T and with the failure rate 1 − J.

Two families of closed-form tasks, J about constant within each:

* local: θ = x/√T and m = y√T. The policy is a Gaussian shift family in the limit, the gap grows like √T, the break-even
  step like T^−1/2. As a rate on the summed gradient that is T^−1, with 1/T it is T^0: the normalisation cancels T.
* fixed tokens: θ constant and m a constant number of deviations from the mean. The break-even step 2|θ| does not depend
  on T, so the rate goes like T^−1/2 and with 1/T like T^+1/2: there the normalisation overcorrects.

For 1 − J, the break-even per unit of alignment is what the bounds are about: at constant T a per-token bound says
(1 − J)/(T(G_p² + L_p)), its refinement 1/(T(2 L_p + 4 G_p²(log 1/(1 − J) + 0.35))).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from rlvr_fast.simulate.lines import break_even, derivatives, success
from rlvr_fast.simulate.output import BLACK, BLUE, GREEN, ORANGE, PINK, RED, SKY, Numbers, Report, label, panels, table
from rlvr_fast.simulate.problems import SignTask, sample
from rlvr_fast.simulate.rules import Rule
from rlvr_fast.simulate.runs import scan
from rlvr_fast.step.bounds import theorem_step_bound, token_step_bound

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

LENGTHS = (64, 128, 256, 512, 1024)
RULES = {"unit norm: step length": Rule("unit_norm"), "grpo: rate": Rule("grpo"),
         "grpo with 1/T: rate": Rule("grpo", length_norm=True), "reinforce: rate": Rule("reinforce"),
         "reinforce with 1/T: rate": Rule("reinforce", length_norm=True)}
MEASURED = "unit norm: step length, from rollouts"
THEOREM, TOKEN, REFINED = "theorem 1: step length", "per-token bound: step length", "refined bound: step length"
EXPECTED = {"local": {"unit norm: step length": -0.5, MEASURED: -0.5, "grpo: rate": -1.0, "grpo with 1/T: rate": 0.0,
                      "reinforce: rate": -1.0, "reinforce with 1/T: rate": 0.0, THEOREM: -1.5, TOKEN: -0.5,
                      REFINED: -0.5},
            "fixed tokens": {"unit norm: step length": 0.0, "grpo: rate": -0.5, "grpo with 1/T: rate": 0.5,
                             "reinforce: rate": -0.5, "reinforce with 1/T: rate": 0.5, THEOREM: -1.5, TOKEN: -0.5,
                             REFINED: -0.5}}
MARGINS = tuple(range(8, 66, 4))  # of the tasks of length 256 on the way to J = 1
NEAR_OPTIMUM = 0.005


def run(*, seeds: int = 12, quick: bool = False) -> Report:
    """``seeds``: tasks drawn from each family; the error bars are their standard errors."""
    seeds, lengths = (min(seeds, 3), LENGTHS[::2]) if quick else (seeds, LENGTHS)
    n_prompts = 16 if quick else 64
    numbers: Numbers = {"lengths": lengths, "expected_slopes": EXPECTED}
    for family in EXPECTED:
        thresholds = [by_length(family, seed, lengths, n_prompts) for seed in range(seeds)]
        values = {name: [row[name] for row in thresholds] for name in EXPECTED[family]}
        numbers[family] = {"threshold": values, "success_rate": [row["success rate"] for row in thresholds],
                           "slope": {name: slope(lengths, rows) for name, rows in values.items()}}
    numbers["failure"] = by_failure_rate()
    parameters = {"lengths": lengths, "seeds": list(range(seeds)), "n_prompts": n_prompts, "group_size": 64,
                  "failure_length": 256, "failure_margins": MARGINS, "failure_theta": NEAR_OPTIMUM, "quick": quick}
    return Report("scaling", parameters, numbers, figure(numbers), tables(numbers))


def family_member(family: str, seed: int, length: int) -> tuple[SignTask, torch.Tensor]:
    """The task and θ that ``seed`` names, at one length: margin + 1 is nearest to the continuous boundary."""
    x, y = torch.rand(2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
    if family == "local":
        theta, boundary = (0.25 + 0.5 * x) / length ** 0.5, (0.75 + y) * length ** 0.5
    else:
        theta = 0.1 + 0.2 * x
        boundary = length * math.tanh(theta) + (2 * y - 1) * length ** 0.5 / math.cosh(theta)
    margin = 2 * round((boundary - 1) / 2)  # sums of an even number of signs are even
    return SignTask(length, (margin,)), torch.tensor([theta], dtype=torch.float64)


def by_length(family: str, seed: int, lengths: tuple[int, ...], n_prompts: int) -> dict[str, list[float]]:
    """Break-evens found by search along every rule's own exact update, certified lengths, and measured break-evens."""
    result: dict[str, list[float]] = {name: [] for name in ("success rate", *EXPECTED[family])}
    for length in lengths:
        task, theta = family_member(family, seed, length)
        result["success rate"].append(float(success(task, theta)))
        for name, rule in RULES.items():
            result[name].append(break_even(task, theta, rule.exact(task, theta), longest=1e4))
        for name, bound in certified(task, theta).items():
            result[name].append(bound)
        if MEASURED in result:
            length_before = 2 * float(theta)
            update = length_before * RULES["unit norm: step length"].exact(task, theta)
            batch = sample(task, theta, n_prompts, 64, torch.Generator().manual_seed(seed))
            curve = scan(task, theta, update, batch, (0.5, 0.8, 1.0, 1.25, 1.6, 2.0))
            result[MEASURED].append(length_before * float(curve.success_break_even))
    return result


def certified(task: SignTask, theta: torch.Tensor) -> dict[str, float]:
    """The package's bounds, as lengths of a unit-norm step."""
    alignment, _ = derivatives(lambda step: task.log_odds(theta - step)[0])
    token = (task.token_norm, task.token_lipschitz)
    rate = float(success(task, theta))
    return {THEOREM: float(theorem_step_bound(alignment, task.score_norm, task.score_lipschitz)),
            TOKEN: float(token_step_bound(alignment, rate, task.length, *token)),
            REFINED: float(token_step_bound(alignment, rate, task.length, *token, refined=True))}


def by_failure_rate() -> Numbers:
    """Break-even over alignment, true and certified, at T = 256 close to the optimum of tasks ever easier."""
    theta, rows = torch.tensor([NEAR_OPTIMUM], dtype=torch.float64), []
    for margin in MARGINS:
        task = SignTask(256, (margin,))
        alignment = float(derivatives(lambda step: task.log_odds(theta - step)[0])[0])  # noqa: B023
        bounds = {name: bound / alignment for name, bound in certified(task, theta).items()}
        failure = float(torch.sigmoid(-task.log_odds(theta))[0])
        found = break_even(task, theta, -torch.ones_like(theta))
        rows.append({"failure_rate": failure, "true": found / alignment, "grpo rate": found / alignment / math.sqrt(
            failure * (1 - failure)), "reinforce rate": found / alignment / (failure * (1 - failure)), **bounds})
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    easy = [i for i, f in enumerate(columns["failure_rate"]) if f < 0.3]
    failures = [columns["failure_rate"][i] for i in easy]
    return {**columns, "slope": {name: slope(failures, [[values[i] for i in easy]])
                                 for name, values in columns.items() if name != "failure_rate"}}


def slope(x: list[float] | tuple[int, ...], rows: list[list[float]]) -> dict[str, float]:
    """Least-squares slope of log y against log x: mean over the rows and its standard error.

    With one row the error is the fit's own. Rows with a break-even that was not found are left out and counted.
    """
    log_x = torch.tensor(x, dtype=torch.float64).log()
    centred = log_x - log_x.mean()
    log_y = torch.tensor(rows, dtype=torch.float64).log()
    usable = log_y[log_y.isfinite().all(1)]
    slopes = (usable * centred).sum(1) / centred.square().sum()
    residual = usable - usable.mean(1, keepdim=True) - slopes[:, None] * centred
    within = (residual.square().sum(1) / (len(x) - 2) / centred.square().sum()).sqrt()
    error = slopes.std() / len(slopes) ** 0.5 if len(slopes) > 1 else within.mean()
    return {"mean": float(slopes.mean()), "stderr": float(error), "rows": len(slopes),
            "left_out": len(rows) - len(slopes)}


def tables(numbers: Numbers) -> list[Table]:
    result: list[Table] = []
    for family, expected in EXPECTED.items():
        rows = [[name, expected[name], s["mean"], s["stderr"], f"{s['rows']} ({s['left_out']})"]
                for name, s in numbers[family]["slope"].items()]
        result.append(table(f"Slope of log threshold against log T, family: {family}",
                            ["threshold", "theory", "slope", "standard error", "tasks (left out)"], rows))
    failure = numbers["failure"]
    bound_says = {"true": "", "grpo rate": "", "reinforce rate": "", THEOREM: "0", TOKEN: "1", REFINED: "1/log"}
    result.append(table("Slope of log(break-even / alignment) against log(1 − J), J > 0.7, T = 256",
                        ["threshold per unit of alignment", "bound says", "slope", "fit's standard error"],
                        [[name, bound_says[name], s["mean"], s["stderr"]] for name, s in failure["slope"].items()]))
    return result


def figure(numbers: Numbers) -> Figure:
    fig, (local, fixed, failure) = panels(3, height=4.6)
    styles = dict(zip((*RULES, MEASURED, TOKEN, THEOREM, REFINED),
                      ((BLACK, "-"), (BLUE, "-"), (SKY, "-"), (RED, "-"), (ORANGE, "-"), (BLACK, ":"), (GREEN, "--"),
                       (PINK, "--"), (PINK, ":")), strict=True))
    for axis, family in ((local, "local"), (fixed, "fixed tokens")):
        for name, rows in numbers[family]["threshold"].items():
            values = torch.tensor(rows, dtype=torch.float64).log10()
            values = values[values.isfinite().all(1)]
            error = values.std(0) / len(values) ** 0.5 if len(values) > 1 else None
            fit = numbers[family]["slope"][name]
            colour, line = styles[name]
            axis.errorbar(numbers["lengths"], values.mean(0), error, color=colour, linestyle=line, marker="o",
                          markersize=3, label=f"{name}: {fit['mean']:+.2f} ± {fit['stderr']:.2f} "
                                              f"(theory {EXPECTED[family][name]:+g})")
        axis.set_xscale("log", base=2)
        axis.legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.16), title="slope of the log", ncols=1,
                    title_fontsize=7)
        label(axis, f"Family: {family}", "response length T [tokens]", "log₁₀ of the threshold, mean over tasks")
    for name, text, colour, line in (
            ("true", "true step", BLACK, "-"), ("grpo rate", "true rate of grpo", BLUE, "-"),
            ("reinforce rate", "true rate of reinforce", RED, "-"), (REFINED, "refined bound", PINK, ":"),
            (TOKEN, "per-token bound", GREEN, "--"), (THEOREM, "theorem 1", PINK, "--")):
        fit = numbers["failure"]["slope"][name]
        failure.plot(numbers["failure"]["failure_rate"], numbers["failure"][name], color=colour, linestyle=line,
                     marker="o", markersize=3, label=f"{text}: {fit['mean']:+.2f} ± {fit['stderr']:.2f}")
    failure.set_xscale("log")
    failure.set_yscale("log")
    failure.legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.16), title="slope for J > 0.7",
                   title_fontsize=7)
    label(failure, f"Near the optimum, T = 256, θ = {NEAR_OPTIMUM}", "failure rate 1 − J", "break-even / alignment")
    return fig

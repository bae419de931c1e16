"""Where a step stops helping: success after one step and after many, against the step's length.

The closed-form task gives the break-even exactly (2|θ|); rollouts predict it through ``scan_step`` and, from its
derivatives, ``measure_step``; ``theorem_step_bound`` and ``token_step_bound`` certify a far shorter one. Taken as a
fraction of the break-even at every step, the threshold is sharp: below 1 a run climbs, above 1 it falls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from rlvr_fast.simulate.lines import break_even, derivatives, first_loss, gain, success
from rlvr_fast.simulate.output import BLACK, BLUE, GREEN, ORANGE, PINK, RED, SKY, Numbers, Report, label, panels, table
from rlvr_fast.simulate.problems import Bandit, SignTask, sample
from rlvr_fast.simulate.rules import Rule
from rlvr_fast.simulate.runs import fixed_rate, relative, scan
from rlvr_fast.step.bounds import theorem_step_bound, token_step_bound
from rlvr_fast.step.measure import measure_step

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

TASK, THETA = SignTask(64, (4, 8, 12)), 0.06
N_PROMPTS, GROUP_SIZE = 128, 64
MULTIPLES = tuple(0.2 * k for k in range(1, 11))  # of the true break-even


def run(*, seeds: int = 20, quick: bool = False) -> Report:
    """``seeds``: draws of rollouts for the predictions; 50 times as many random bandits for the bounds."""
    seeds, n_steps = (min(seeds, 2), 12) if quick else (seeds, 60)
    fractions = torch.linspace(*((0.2, 1.8, 6) if quick else (0.1, 2.0, 39)), dtype=torch.float64)
    numbers = {
        "one_step": one_step(), "predicted": predictions(seeds), "certified": certified(),
        "many_steps": many_steps(fractions, n_steps), "bandits": bandit_ratios(50 * seeds),
    }
    parameters = {"length": TASK.length, "margins": TASK.margins, "theta": THETA, "n_prompts": N_PROMPTS,
                  "group_size": GROUP_SIZE, "seeds": list(range(seeds)), "n_steps": n_steps,
                  "n_bandits": 50 * seeds, "quick": quick}
    return Report("threshold", parameters, numbers, figure(numbers), tables(numbers))


def one_step() -> Numbers:
    """Exact success after one step; the true break-even found by search, not by the formula it must equal."""
    theta = torch.tensor([THETA], dtype=torch.float64)
    direction = Rule("unit_norm").exact(TASK, theta)
    true = break_even(TASK, theta, direction)
    multiple = torch.cat([torch.logspace(-4, -1.05, 40), torch.linspace(0.1, 2.2, 106)]).double()
    rate = success(TASK, theta)
    slope, second = derivatives(lambda step: success(TASK, theta + step * direction))
    return {"break_even": true, "multiple": multiple, "success_before": float(rate),
            "success": rate + gain(TASK, theta, direction, multiple * true),
            "quadratic_break_even": float(-2 * slope / second) / true}


def predictions(seeds: int) -> Numbers:
    """From rollouts, in multiples of the true break-even; one draw's curve for the figure."""
    theta = torch.tensor([THETA], dtype=torch.float64)
    update = 2 * THETA * Rule("unit_norm").exact(TASK, theta)
    scanned, quadratic, ess = [], [], []
    for seed in range(seeds):
        batch = sample(TASK, theta, N_PROMPTS, GROUP_SIZE, torch.Generator().manual_seed(seed))
        curve = scan(TASK, theta, update, batch, MULTIPLES)
        before, after, reverse = (TASK.logp(theta + m * update, batch) for m in (0, 0.05, -0.05))
        step = measure_step(before, after, batch.rollouts, logp_reverse=reverse, in_sample=False)
        scanned.append(float(curve.success_break_even))
        quadratic.append(0.05 * float(step.success_break_even))
        ess.append(float(curve.ess_fraction[4]))
        if seed == 0:
            shown = {"multiple": MULTIPLES, "gain": curve.success_gain, "gain_stderr": curve.success_gain_stderr,
                     "ess_fraction": curve.ess_fraction}
    return {"scan_break_even": scanned, "quadratic_break_even": quadratic, "ess_at_break_even": ess, "curve": shown}


def certified() -> Numbers:
    """Certified lengths in multiples of the true break-even, for the prompt with the middle margin."""
    task, theta = SignTask(TASK.length, TASK.margins[1:2]), torch.tensor([THETA], dtype=torch.float64)
    direction = Rule("unit_norm").exact(task, theta)
    alignment, _ = derivatives(lambda step: task.log_odds(theta + step * direction)[0])
    rate, token = float(success(task, theta)), (task.token_norm, task.token_lipschitz)
    return {name: float(bound) / (2 * THETA) for name, bound in {
        "theorem 1": theorem_step_bound(alignment, task.score_norm, task.score_lipschitz),
        "theorem 1, tight constant": theorem_step_bound(alignment, task.score_norm, task.score_lipschitz, tight=True),
        "per token": token_step_bound(alignment, rate, task.length, *token),
        "per token, refined": token_step_bound(alignment, rate, task.length, *token, refined=True)}.items()}


def many_steps(fractions: torch.Tensor, n_steps: int) -> Numbers:
    """Success after many steps: each that fraction of its own break-even, or at that fraction of the first's rate.

    At a constant rate a run may end in a cycle around the optimum, so the mean over the last half is given.
    """
    start = torch.tensor([THETA], dtype=torch.float64)
    final = {"fraction": fractions,
             "relative": [float(relative(TASK, start, float(f), n_steps)[0][-1]) for f in fractions]}
    for name in ("unit_norm", "grpo"):
        rule = Rule(name)
        first = break_even(TASK, start, rule.exact(TASK, start))
        final[name] = fixed_rate(TASK, start, rule, first * fractions, n_steps)[n_steps // 2:].mean(0)
    return final


def bandit_ratios(n_bandits: int) -> Numbers:
    """True break-even over Theorem 1's bound, single-prompt softmax bandits along random aligned directions."""
    generator = torch.Generator().manual_seed(1)
    ratios, rates = [], []
    for _ in range(n_bandits):
        n_arms, n_parameters = (int(torch.randint(3, 9, (), generator=generator)) for _ in range(2))
        bandit = Bandit.random(1, n_arms, n_parameters, generator)
        theta, direction = torch.randn(2, n_parameters, generator=generator, dtype=torch.float64)
        theta, direction = 2 * theta, direction / direction.norm()
        alignment, _ = derivatives(lambda s: bandit.log_odds(theta + s * direction)[0])  # noqa: B023
        if alignment < 0:
            direction, alignment = -direction, -alignment
        base = bandit.log_odds(theta)[0]
        true = first_loss(lambda s: bandit.log_odds(theta + s[:, None] * direction)[:, 0] - base, 1e3)  # noqa: B023
        if true < 1e3:
            ratios.append(true / float(theorem_step_bound(alignment, bandit.score_norm, bandit.score_lipschitz)))
            rates.append(float(base.sigmoid()))
    return {"ratio": ratios, "success_rate": rates, "share_with_break_even": len(ratios) / n_bandits}


def _quantiles(values: list[float]) -> tuple[float, float, float]:
    return tuple(torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.5, 0.05, 0.95]).double()).tolist())


def tables(numbers: Numbers) -> list[Table]:
    predicted, true = numbers["predicted"], numbers["one_step"]
    rows = [["true, found by search", 1.0, "", ""],
            ["predicted from rollouts, scan_step", *_quantiles(predicted["scan_break_even"])],
            ["predicted from rollouts, quadratic of J", *_quantiles(predicted["quadratic_break_even"])],
            ["quadratic of J, exact derivatives", true["quadratic_break_even"], "", ""],
            *([name, value, "", ""] for name, value in numbers["certified"].items())]
    ratios = torch.tensor(numbers["bandits"]["ratio"])
    many = numbers["many_steps"]
    ends, fraction = torch.tensor(many["relative"]), many["fraction"]
    return [table(f"Break-even in units of the true one, {true['break_even']:.6f} (formula {2 * THETA})",
                  ["", "median", "5 %", "95 %"], rows),
            table("Success after many steps at a constant fraction of the break-even",
                  ["optimum", "lowest below 1", "highest above 1"],
                  [[float(success(TASK, torch.zeros(1, dtype=torch.float64))), float(ends[fraction < 0.99].min()),
                    float(ends[fraction > 1.01].max())]]),
            table("True break-even over Theorem 1's bound, random softmax bandits",
                  ["with a break-even", "share of all", "smallest ratio", "median ratio"],
                  [[len(ratios), numbers["bandits"]["share_with_break_even"], float(ratios.min()),
                    float(ratios.median())]])]


def figure(numbers: Numbers) -> Figure:
    fig, (one, far, many, bandits) = panels(4)
    exact, predicted = numbers["one_step"], numbers["predicted"]
    curve = predicted["curve"]
    scanned, quadratic = _quantiles(predicted["scan_break_even"]), _quantiles(predicted["quadratic_break_even"])
    for axis in (one, far):
        axis.plot(exact["multiple"], exact["success"], color=BLACK, label="exact success after one step")
        axis.axhline(exact["success_before"], color=BLACK, linestyle=":", linewidth=1, label="before the step")
        axis.axvline(1, color=BLACK, linestyle="--", linewidth=1.2, label="true break-even, 2|θ|")
        axis.axvline(scanned[0], color=BLUE, linestyle="-.", label=f"scan_step predicts {scanned[0]:.2f}")
        axis.axvline(quadratic[0], color=ORANGE, linestyle="-.", label=f"quadratic predicts {quadratic[0]:.2f}")
    one.axvspan(*scanned[1:], color=BLUE, alpha=0.12, linewidth=0)
    one.errorbar(curve["multiple"], exact["success_before"] + curve["gain"], 2 * curve["gain_stderr"], fmt="o",
                 color=BLUE, markersize=4, label="gain measured on one draw of rollouts, ± 2 standard errors")
    one.legend(fontsize=7)
    label(one, f"Closed-form task, T = {TASK.length}, θ = {THETA}", "step [true break-evens]", "success rate")
    for (name, value), colour in zip(numbers["certified"].items(), (RED, PINK, SKY, GREEN), strict=True):
        far.axvline(value, color=colour, label=f"{name}: {value:.2g}")
    far.set_xscale("log")
    far.set_xlim(left=min(numbers["certified"].values()) / 2)
    far.legend(fontsize=7, loc="lower left")
    label(far, "The same with the certified lengths", "step [true break-evens], log scale", "success rate")
    for name, colour, marker, text in (("relative", BLACK, "o", "each step that fraction of its own break-even"),
                                       ("grpo", BLUE, "s", "grpo at that fraction of the first step's rate"),
                                       ("unit_norm", ORANGE, "^", "unit norm, the same")):
        many.plot(numbers["many_steps"]["fraction"], numbers["many_steps"][name], marker=marker, markersize=3.5,
                  color=colour, label=text)
    many.axvline(1, color=RED, linestyle="--", label="break-even")
    many.legend(fontsize=7)
    label(many, "After many steps", "step [break-evens]", "final success rate")
    ratios = torch.tensor(numbers["bandits"]["ratio"]).log10()
    bandits.hist(ratios.numpy(), bins=30, color=SKY, edgecolor="white")
    bandits.axvline(float(ratios.median()), color=BLACK, linestyle="--",
                    label=f"median {10 ** float(ratios.median()):.0f}×")
    bandits.axvline(float(ratios.min()), color=RED, linestyle="--", label=f"smallest {10 ** float(ratios.min()):.0f}×")
    bandits.legend(fontsize=7)
    label(bandits, "True break-even over Theorem 1's bound, random bandits", "log₁₀ of the ratio", "bandits")
    return fig

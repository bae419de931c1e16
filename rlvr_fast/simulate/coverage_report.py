"""Tables and figure of the coverage study."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlvr_fast.simulate.output import BLACK, BLUE, GREEN, ORANGE, PINK, RED, SKY, YELLOW, Numbers, label, panels, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

COLOURS = {"hard": BLUE, "middle": BLACK, "easy": SKY, "near one": ORANGE, "almost one": RED, "far": PINK}
GAINS = {"A": (BLACK, "A: covariance with the reward"), "B": (SKY, "B: mean of r(ρ − 1)"),
         "B + βZ": (BLUE, "measure_step: B + βZ, β cross-fitted"), "two-ended": (ORANGE, "two-ended slopes")}
OUTCOMES = {"right": GREEN, "cautious": SKY, "undetermined": YELLOW, "wrong": RED}
INTERVALS = {"success_slope": "J′", "success_curvature": "J″", "success_peak": "peak", "success_gain 0.3": "gain 0.3",
             "success_gain 0.8": "gain 0.8", "success_gain 1.2": "gain 1.2", "alignment": "Δμ", "curvature": "f″",
             "log_odds_gain 0.3": "f 0.3", "log_odds_gain 1.2": "f 1.2",
             "success_log_odds_gain 0.3": "logit J 0.3", "success_log_odds_gain 1.2": "logit J 1.2"}
REASONS = ("determined", "within error", "sample gone", "scarce class", "mean ratio")


def tables(numbers: Numbers) -> list[Table]:
    cells = numbers["cells"]
    samples = {name: f"{name} ({cell['n']})" for name, cell in cells.items()}
    coverage = [[samples[name], *(f"{cell['figures'][figure]['coverage']:.2f}" for figure in INTERVALS)]
                for name, cell in cells.items()]
    bias = [[samples[name], *(f"{cell['figures'][figure]['bias']:+.2f} / {cell['figures'][figure]['spread']:.2f}"
                              for figure in INTERVALS)] for name, cell in cells.items()]
    ahead = [[samples[name], *(_band(cell["figures"][figure]) for figure in (
        "scan break-even", "quadratic break-even", "two-ended break-even 0.8")),
        f"{cell['figures']['ess_fraction 0.8']['mean']:.3f}", f"{cell['figures']['ess_fraction 0.8']['truth']:.3f}"]
        for name, cell in cells.items()]
    gains = {step: [[samples[name], *(f"{f['rms']:.2f} / {f['coverage']:.2f} / {f['wrong_sign']:.2f}" for f in (
        cell["figures"][f"{estimator} {step}"] for estimator in GAINS))] for name, cell in cells.items()]
        for step in ("0.3", "0.8", "1.2")}
    said = [[samples[name], *(" / ".join(f"{counts.get(word, 0):.2f}" for word in OUTCOMES)
                              for step in ("0.3", "0.8", "1.2") for counts in [cell["verdicts"][step]["30"]]),
             *(f"{max(cell['verdicts'][step][floor].get('wrong', 0) for step in ('0.3', '0.8', '1.2')):.2f}"
               for floor in ("0", "10", "100"))] for name, cell in cells.items()]
    why = [[samples[name], *(" / ".join(f"{cell['reasons'][step].get(word, 0):.2f}" for word in REASONS)
                             for step in ("0.3", "0.8", "1.2"))] for name, cell in cells.items()]
    first = "cell (replicates)"
    return [
        table("Coverage of the stated 95 % intervals; cells are regime, prompts x rollouts; f is the log-odds",
              [first, *INTERVALS.values()], coverage),
        table("Bias / spread, relative to the truth", [first, *INTERVALS.values()], bias),
        table("Break-even over the true one: median (5 % to 95 %); effective share at 0.8, mean and exact",
              [first, "scan_step", "quadratic", "two-ended after 0.8", "share", "exact share"], ahead),
        *(table(f"Gain of a step of {step} break-evens: rms error over the truth / coverage / significant, wrong sign",
                [first, *GAINS], rows) for step, rows in gains.items()),
        table("Verdicts right / cautious / undetermined / wrong by step; worst wrong share with other class floors",
              [first, "0.3", "0.8", "1.2", "no floor", "floor 10", "floor 100"], said),
        table(" / ".join(REASONS), [first, "0.3", "0.8", "1.2"], why)]


def _band(figure: dict[str, float]) -> str:
    return f"{figure['median']:.2f} ({figure['low']:.2f} to {figure['high']:.2f})"


def figure(numbers: Numbers) -> Figure:
    fig, (pooled, prompt, ahead, verdict, error, covered) = panels(6, height=4.4)
    cells = [cell for cell in numbers["cells"].values() if cell["n_prompts"] == 32]
    regimes = list(dict.fromkeys(cell["regime"] for cell in cells))
    for regime in regimes:
        own = [cell for cell in cells if cell["regime"] == regime]
        sizes = [cell["group_size"] for cell in own]
        rate = numbers["regimes"][regime]["success"]
        style: dict[str, Any] = {"color": COLOURS[regime], "marker": "o", "markersize": 3}
        text = f"{regime}, J = {rate:.3f}"
        pooled.plot(sizes, [cell["figures"]["success_gain 0.8"]["coverage"] for cell in own], label=text, **style)
        prompt.plot(sizes, [cell["figures"]["alignment"]["coverage"] for cell in own], label=text, **style)
        found = [cell["figures"]["scan break-even"] for cell in own]
        ahead.plot(sizes, [f["median"] for f in found], label=text, **style)
        ahead.fill_between(sizes, [f["low"] for f in found], [min(f["high"], 10) for f in found],
                           color=COLOURS[regime], alpha=0.1, linewidth=0)
    for axis in (pooled, prompt):
        axis.axhspan(0.93, 0.97, color=GREEN, alpha=0.2, linewidth=0, label="93 to 97 %")
        axis.set_ylim(0, 1.02)
    ahead.axhspan(0.85, 1.15, color=GREEN, alpha=0.2, linewidth=0, label="within 15 %")
    ahead.set_ylim(0, 2.5)
    for axis in (pooled, prompt, ahead):
        axis.set_xscale("log", base=2)
        axis.legend(fontsize=6)
    label(pooled, "Success gain at 0.8 break-evens: interval coverage", "rollouts per prompt, 32 prompts",
          "share of 95 % intervals that hold the truth")
    label(prompt, "Alignment of single prompts: interval coverage", "rollouts per prompt", "share holding the truth")
    label(ahead, "Break-even from scan_step: median (if found), 5 to 95 %", "rollouts per prompt, 32 prompts",
          "predicted / true break-even")
    _verdicts(verdict, cells, regimes)
    _estimators(error, covered, cells, regimes)
    return fig


def _verdicts(axis: Axes, cells: list[Numbers], regimes: list[str]) -> None:
    """Outcomes for the step that overshoots, one stacked bar per regime and sample size."""
    position, ticks = 0, []
    for regime in regimes:
        for cell in (c for c in cells if c["regime"] == regime):
            bottom = 0.0
            for word, colour in OUTCOMES.items():
                share = cell["verdicts"]["1.2"]["30"].get(word, 0)
                axis.bar(position, share, bottom=bottom, color=colour, label=word if not position else None)
                bottom += share
            ticks.append((position, f"{regime} {cell['group_size']}"))
            position += 1
        position += 1
    axis.set_xticks([p for p, _ in ticks], [t for _, t in ticks], rotation=90)
    axis.legend(fontsize=6, loc="lower right")
    label(axis, "Verdict on a step of 1.2 break-evens, which loses", "", "share of replicates")
    axis.tick_params(axis="x", labelsize=6)


def _estimators(error: Axes, covered: Axes, cells: list[Numbers], regimes: list[str]) -> None:
    """Error and coverage of the gain estimators at one sample size, by regime, for a losing step."""
    for offset, (name, (colour, text)) in enumerate(GAINS.items()):
        chosen = [next(c for c in cells if c["regime"] == regime and c["group_size"] == 128) for regime in regimes]
        figures = [cell["figures"][f"{name} 1.2"] for cell in chosen]
        places = [i + 0.2 * (offset - 1.5) for i in range(len(regimes))]
        error.bar(places, [f["rms"] for f in figures], 0.18, color=colour, label=text)
        covered.bar(places, [f["coverage"] for f in figures], 0.18, color=colour, label=text)
    covered.axhspan(0.93, 0.97, color=GREEN, alpha=0.3, linewidth=0)
    error.set_yscale("log")
    for axis in (error, covered):
        axis.set_xticks(range(len(regimes)), regimes)
    error.legend(fontsize=6)
    label(error, "Gain of 1.2 break-evens, 32 x 128 rollouts: error", "regime", "rms error / |true gain| (log scale)")
    label(covered, "The same: interval coverage", "regime", "share of 95 % intervals holding the truth")

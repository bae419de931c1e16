"""One figure: success against rollouts by level, the mixtures that were used, paired differences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file is all that is wanted, also where there is no display

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from curriculum import task
from curriculum.summary import MEASURES, estimate, mean_level, paired
from curriculum.training import ARMS

COLOURS = {"uniform": "#555555", "success": "#E69F00", "own gap": "#0072B2", "shared gap": "#009E73"}
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "font.size": 10,
         "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left", "legend.framealpha": 0.85,
         "legend.edgecolor": "none", "legend.fontsize": 9}


def plot(path: Path, runs: Sequence[dict]) -> None:
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(3, len(task.LEVELS), figsize=(15, 10.5), layout="constrained")
        for which, level in enumerate(task.LEVELS):
            _success(axes[0, which], runs, which)
            axes[0, which].set(title=f"{level} digit{'s' * (level > 1)}", xlabel="rollouts spent")
        axes[0, 0].set_ylabel("exact success, held-out problems\nmean over seeds ± standard error")
        axes[0, 0].legend()
        for axis, arm in zip(axes[1], ARMS, strict=True):
            _mixture(axis, [run for run in runs if run["arm"] == arm], arm)
        grid = axes[2, 0].get_gridspec()
        for axis in axes[2]:
            axis.remove()
        _gaps(figure.add_subplot(grid[2, :2]), [run for run in runs if run["arm"].endswith("gap")])
        _differences(figure.add_subplot(grid[2, 2:]), runs)
        figure.savefig(path, dpi=110)
        plt.close(figure)


def _success(axis: Axes, runs: Sequence[dict], which: int) -> None:
    for arm in ARMS:
        own = [run["records"] for run in runs if run["arm"] == arm]
        if not own:
            continue
        rollouts = [record["rollouts"] for record in own[0]]
        columns = [[records[i]["success"][which] for records in own] for i in range(len(rollouts))]
        mean = [sum(column) / len(column) for column in columns]
        error = [(sum((x - m) ** 2 for x in column) / max(len(column) - 1, 1) / len(column)) ** 0.5
                 for column, m in zip(columns, mean, strict=True)]
        axis.plot(rollouts, mean, color=COLOURS[arm], label=arm)
        low, high = ([m + sign * e for m, e in zip(mean, error, strict=True)] for sign in (-1, 1))
        axis.fill_between(rollouts, low, high, color=COLOURS[arm], alpha=0.15, linewidth=0)


def _mixture(axis: Axes, runs: Sequence[dict], arm: str) -> None:
    axis.set(title=f"Mixture: {arm}", xlabel="rollouts spent", ylim=(0, 1))
    if not runs:
        return
    records = [run["records"][1:] for run in runs]
    rollouts = [record["rollouts"] for record in records[0]]
    shares = [[sum(own[i]["mixture"][which] for own in records) / len(records) for i in range(len(rollouts))]
              for which in range(len(task.LEVELS))]
    axis.stackplot(rollouts, shares, labels=[f"{level}" for level in task.LEVELS], alpha=0.85,
                   colors=["#CDE7F0", "#8CC5DD", "#4A90B8", "#1F4E79"])
    if arm == ARMS[0]:
        axis.legend(title="digits", loc="lower left", ncols=len(task.LEVELS))


def _gaps(axis: Axes, runs: Sequence[dict]) -> None:
    """What a level's prompts each have, and what they have in common: mean over windows, then runs of the gap arms."""
    for name, offset, label in (("norm_sq", -0.1, "each prompt's own"), ("shared_norm_sq", 0.1, "shared by the level")):
        for level in task.LEVELS:
            means = []
            for run in runs:
                spectra = [record["spectrum"].get(str(level), {}).get(name) for record in run["records"][1:]]
                known = [value for value in spectra if value is not None]
                if known:
                    means.append(sum(known) / len(known))
            if means:
                found = estimate(means)
                axis.errorbar(level + offset, found.mean, yerr=found.half_width, fmt="o" if offset < 0 else "s",
                              color=COLOURS["own gap"] if offset < 0 else COLOURS["shared gap"],
                              label=label if level == task.LEVELS[0] else None)
    axis.axhline(0, color="black", linewidth=1)
    axis.set_yscale("symlog", linthresh=10)
    axis.set(title="Squared gap by level", xlabel="digits", ylabel="‖gap‖², 95 % over runs", xticks=task.LEVELS)
    axis.legend(loc="lower left")


def _differences(axis: Axes, runs: Sequence[dict]) -> None:
    """Paired differences of the mean success over levels, in points, with 95 % intervals."""
    labels = []
    for arm in ARMS[1:]:
        for against in ("uniform", "success"):
            if arm == against:
                continue
            for name, measure in MEASURES.items():
                found = paired(runs, arm, against, lambda run, measure=measure: mean_level(measure(run)))
                if found is None or found.n < 2:
                    continue
                axis.errorbar(100 * found.mean, len(labels), xerr=100 * found.half_width, fmt="o", color=COLOURS[arm],
                              markerfacecolor="white" if name == "final" else None)
                labels.append(f"{arm} − {against}\n({name})")
    axis.axvline(0, color="black", linewidth=1)
    axis.set_yticks(range(len(labels)), labels, fontsize=8)
    axis.invert_yaxis()
    axis.set(title="Paired differences", xlabel="points of success, mean over levels, 95 %")

"""What the comparison showed: paired differences between arms, seed by seed, with their error bars."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import combinations, pairwise
from pathlib import Path
from typing import NamedTuple

import torch

from curriculum import task
from curriculum.records import finite
from curriculum.training import ARMS, Settings

# Two-sided 95 % quantiles of Student's t for 1, 2, … degrees of freedom.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


class Estimate(NamedTuple):
    """A mean over seeds and the half-width of its 95 % interval."""

    mean: float
    half_width: float
    n: int

    @property
    def significant(self) -> bool:
        return abs(self.mean) > self.half_width

    def __str__(self) -> str:
        return f"{100 * self.mean:+.1f} ± {100 * self.half_width:.1f}"


def estimate(values: Sequence[float]) -> Estimate:
    """NaN half-width for a single seed."""
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return Estimate(mean, math.nan, n)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    return Estimate(mean, T95[min(n - 1, len(T95)) - 1] * deviation / math.sqrt(n), n)


def final(run: dict) -> list[float]:
    """Success of each level at the end of the budget."""
    return run["records"][-1]["success"]


def over_the_run(run: dict) -> list[float]:
    """Success of each level, mean over the budget: the area under its curve (trapezoids)."""
    records = run["records"]
    total = records[-1]["rollouts"]
    return [sum((b["rollouts"] - a["rollouts"]) * (a["success"][i] + b["success"][i]) / 2
                for a, b in pairwise(records)) / total for i in range(len(task.LEVELS))]


def mean_level(success: Sequence[float]) -> float:
    return sum(success) / len(success)


def paired(runs: Sequence[dict], arm: str, other: str, value: Callable[[dict], float]) -> Estimate | None:
    """``arm`` − ``other`` over the seeds that have both; None if there is none."""
    by_key = {(run["seed"], run["arm"]): run for run in runs}
    seeds = [seed for seed, name in by_key if name == arm and (seed, other) in by_key]
    return estimate([value(by_key[seed, arm]) - value(by_key[seed, other]) for seed in seeds]) if seeds else None


MEASURES = {"final": final, "over the run": over_the_run}


def comparisons(runs: Sequence[dict]) -> list[dict]:
    """Every pair of arms, by the mean over the levels and by level, at the end and over the run."""
    rows = []
    for other, arm in combinations(ARMS, 2):
        for name, measure in MEASURES.items():
            columns = {"all": lambda run, measure=measure: mean_level(measure(run))}
            columns |= {str(level): lambda run, i=i, measure=measure: measure(run)[i]
                        for i, level in enumerate(task.LEVELS)}
            found = {column: paired(runs, arm, other, value) for column, value in columns.items()}
            if found["all"] is not None:
                rows.append({"arm": arm, "against": other, "measure": name} | found)
    return rows


def summarise(runs: Sequence[dict]) -> list[str]:
    """A Markdown table of the arms, one of their paired differences, and what they amount to."""
    lines = ["| arm | seeds | mean, end | mean, over the run | " +
             " | ".join(f"{level} digit{'s' * (level > 1)}, end" for level in task.LEVELS) + " |",
             "|---" * (4 + len(task.LEVELS)) + "|"]
    for arm in ARMS:
        own = [run for run in runs if run["arm"] == arm]
        if own:
            columns = [estimate([mean_level(measure(run)) for run in own]) for measure in MEASURES.values()]
            columns += [estimate([final(run)[i] for run in own]) for i in range(len(task.LEVELS))]
            lines.append(f"| {arm} | {len(own)} | " + " | ".join(
                f"{100 * one.mean:.1f} ± {100 * one.half_width:.1f}" for one in columns) + " |")
    lines += ["", "| points more than | arm | seeds | mean, end | mean, over the run | " + " | ".join(
        f"{level}, end" for level in task.LEVELS) + " |", "|---" * (5 + len(task.LEVELS)) + "|"]
    rows = comparisons(runs)
    for end, whole in zip(rows[0::2], rows[1::2], strict=True):
        lines.append(f"| {end['against']} | {end['arm']} | {end['all'].n} | {end['all']} | {whole['all']} | "
                     + " | ".join(str(end[str(level)]) for level in task.LEVELS) + " |")
    sentences = [sentence(row) for row in rows if "gap" not in row["against"]]
    return [*lines, "", *sentences, "", *evidence(runs), "", *facts(runs)]


def facts(runs: Sequence[dict]) -> list[str]:
    """How often the shared-gap mixture had nothing to go by, and the own gap of the hardest level by its success."""
    mixtures = [record["mixture"] for run in runs if run["arm"] == "shared gap" for record in run["records"][2:]]
    lines = [f"- The mixture of the shared gap was the base in {sum(len(set(one)) == 1 for one in mixtures)} of "
             f"{len(mixtures)} windows."]
    hardest = [record["spectrum"][str(task.LEVELS[-1])] for run in runs for record in run["records"][1:]
               if record["spectrum"] and str(task.LEVELS[-1]) in record["spectrum"]]
    for low, high in ((0, 0.03), (0.08, 1)):
        p_values = [one["p_value"] for one in hardest if low < one["success_rate"] <= high]
        significant = sum(p is not None and p <= 0.05 for p in p_values)
        lines.append(f"- {task.LEVELS[-1]} digits, success above {low:.0%} and up to {high:.0%}: own gap significant "
                     f"in {significant} of {len(p_values)} windows.")
    return lines


def evidence(runs: Sequence[dict]) -> list[str]:
    """A Markdown table of what the spectra of the gap arms said of each level, over all windows and seeds."""
    lines = ["| digits | success | prompt's own ‖gap‖² | shared ‖gap‖² | windows | own p ≤ 5 % | shared p ≤ 5 % | "
             "prompts at the edge |", "|---" * 8 + "|"]
    for level in task.LEVELS:
        spectra = [record["spectrum"][str(level)] for run in runs for record in run["records"][1:]
                   if record["spectrum"] and str(level) in record["spectrum"]]
        if spectra:
            means = [_mean_known(spectra, name) for name in ("success_rate", "norm_sq", "shared_norm_sq")]
            shares = [sum(one[name] is not None and one[name] <= 0.05 for one in spectra) / len(spectra)
                      for name in ("p_value", "shared_p_value")]
            prompts = [sum(one["prompts"].values()) for one in spectra]
            edge = sum(one["prompts"].get("edge", 0) for one in spectra) / sum(prompts)
            lines.append(f"| {level} | {means[0]:.3f} | {means[1]:.0f} | {means[2]:.1f} | {len(spectra)} "
                         f"| {shares[0]:.0%} | {shares[1]:.0%} | {edge:.1%} |")
    return lines


def _mean_known(spectra: Sequence[dict], name: str) -> float:
    known = [one[name] for one in spectra if one[name] is not None]
    return sum(known) / len(known) if known else math.nan


def sentence(row: dict) -> str:
    difference = row["all"]
    if difference.significant:
        what = f"{'better' if difference.mean > 0 else 'worse'} than {row['against']}"
    else:
        what = f"not told from {row['against']}"
    return f"- {row['arm']}, {row['measure']}: {what} ({difference} points over {difference.n} seeds)."


def write_json(path: Path, runs: Sequence[dict], settings: Settings) -> None:
    """Every number of the figure and of the tables, with what they came from."""
    content = {"settings": asdict(settings), "seeds": sorted({run["seed"] for run in runs}),
               "versions": {"torch": torch.__version__, "python": platform.python_version()},
               "differences": [{key: value._asdict() if isinstance(value, Estimate) else value
                                for key, value in row.items()} for row in comparisons(runs)],
               "runs": list(runs)}
    path.write_text(json.dumps(finite(content), indent=None, separators=(",", ":")) + "\n")

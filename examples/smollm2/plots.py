"""Two figures: the run, step by step; and every step tried at several lengths."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file is all that is wanted, also where there is no display

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from rlvr_fast.demo.plots import STYLE
from smollm2.record import ANALYSIS, TRAINING, StepRecord

BLUE, RED, YELLOW, BLACK = "#0072B2", "#D55E00", "#E69F00", "#222222"
SECTIONS = dict(zip((*TRAINING, *ANALYSIS), ("#BBBBBB", "#888888", BLACK, "#CC79A7", YELLOW, BLUE, "#56B4E9"),
                    strict=True))
VERDICTS = {"safe": "#009E73", "near": "#F0E442", "overshoot": RED, "undetermined": "#999999"}
MOST_SCANS = 9  # panels in the figure of the scans; of a longer run the last steps


def save_plots(records: Sequence[StepRecord], folder: Path) -> None:
    """Writes run.png and scan.png."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 3, figsize=(14, 7.6), layout="constrained")
        for draw, axis in zip((_success, _gains, _alignment, _gap, _groups, _time), axes.flat, strict=True):
            draw(axis, records)
        figure.savefig(folder / "run.png", dpi=120)
        plt.close(figure)

        shown = records[-MOST_SCANS:]
        columns = min(3, len(shown))
        rows = -(-len(shown) // columns)
        figure, axes = plt.subplots(rows, columns, figsize=(4.6 * columns, 3.5 * rows + 0.5), squeeze=False,
                                    layout="constrained")
        for axis, record in zip(axes.flat, shown, strict=False):
            _scan(axis, record)
        for axis in axes.flat[len(shown):]:
            axis.axis("off")
        figure.supylabel("change of the held-out success rate", fontsize="medium")
        entries = {label: handle for axis in axes.flat
                   for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=3)
        figure.savefig(folder / "scan.png", dpi=120)
        plt.close(figure)


def _steps(axis: Axes, records: Sequence[StepRecord], title: str, unit: str) -> list[int]:
    """Title and axes of a panel with one entry per step."""
    steps = [record.step for record in records]
    axis.set(title=title, xlabel="step", ylabel=unit, xlim=(steps[0] - 0.6, steps[-1] + 0.6))
    axis.set_xticks(steps[::max(1, len(steps) // 8)])
    return steps


def _points(axis: Axes, steps: Sequence[float], values: Sequence[float], errors: Sequence[float], colour: str,
            label: str | None = None) -> None:
    axis.errorbar(steps, values, [2 * error for error in errors], fmt="o", color=colour, capsize=3, label=label)


def _headroom(axis: Axes, share: float) -> None:
    """Room for the legend above the data."""
    low, high = axis.get_ylim()
    axis.set_ylim(low, high + share * (high - low))


def _success(axis: Axes, records: Sequence[StepRecord]) -> None:
    applied = range(len(records) + 1)
    axis.plot(applied, [records[0].exact_before, *(r.exact_after for r in records)], "o-", color=BLACK,
              label="held-out prompts, exact")
    axis.plot(applied[:-1], [r.training_success for r in records], "s", color=YELLOW, label="training rollouts")
    axis.set(title="Success rate", xlabel="updates applied", ylabel="success rate", ylim=(0, 1.02), xticks=applied)
    axis.legend(loc="lower center")


def _gains(axis: Axes, records: Sequence[StepRecord]) -> None:
    steps = _steps(axis, records, "Log-odds gain, and the verdict beforehand", "gain ± two standard errors")
    for label, colour, chosen in (
        ("predicted before the step", BLUE, [r for r in records if r.scan.reach >= 1]),
        ("predicted, effective sample too small", "#888888", [r for r in records if r.scan.reach < 1]),
    ):
        if chosen:
            _points(axis, [r.step - 0.1 for r in chosen], [r.forecast.predicted_log_odds_gain for r in chosen],
                    [r.forecast.predicted_log_odds_gain_stderr for r in chosen], colour, label)
    _points(axis, [step + 0.1 for step in steps], [r.counted_gain for r in records],
            [r.counted_gain_stderr for r in records], YELLOW, "counted in fresh rollouts after it")
    axis.hlines([r.exact_gain for r in records], [step - 0.25 for step in steps], [step + 0.25 for step in steps],
                color=BLACK, linewidth=2, label="exact")
    axis.axhline(0, color="black", linewidth=0.8)
    for verdict, colour in VERDICTS.items():
        for i, record in enumerate(r for r in records if r.forecast.verdict == verdict):
            axis.axvspan(record.step - 0.48, record.step + 0.48, color=colour, alpha=0.18, linewidth=0,
                         label=None if i else f"judged {verdict}")
    _headroom(axis, 0.55)
    axis.legend(loc="upper right")


def _alignment(axis: Axes, records: Sequence[StepRecord]) -> None:
    steps = _steps(axis, records, "Alignment of the update with the gap", "⟨update, gap⟩ ± two standard errors")
    _points(axis, [step - 0.1 for step in steps], [r.forecast.alignment for r in records],
            [r.forecast.alignment_stderr for r in records], BLUE, "where the step starts")
    _points(axis, [step + 0.1 for step in steps], [r.end_alignment for r in records],
            [r.end_alignment_stderr for r in records], RED, "where it ends")
    axis.axhline(0, color="black", linewidth=0.8)
    _headroom(axis, 0.2)
    axis.legend(loc="upper right")


def _gap(axis: Axes, records: Sequence[StepRecord]) -> None:
    steps = _steps(axis, records, "Gradient gap of the training prompts", "squared norm, mean ± two standard errors")
    _points(axis, steps, [r.forecast.gap_norm_sq for r in records], [r.forecast.gap_norm_sq_stderr for r in records],
            BLUE)
    axis.axhline(0, color="black", linewidth=0.8)


def _groups(axis: Axes, records: Sequence[StepRecord]) -> None:
    steps = _steps(axis, records, "Training rollouts", "share of prompts; nats per token")
    axis.plot(steps, [r.forecast.mixed_share for r in records], "o-", color=BLUE, label="mixed groups")
    axis.plot(steps, [r.entropy for r in records], "s--", color=YELLOW, label="token entropy")
    axis.set_ylim(0, None)
    axis.legend()


def _time(axis: Axes, records: Sequence[StepRecord]) -> None:
    steps, bottom = _steps(axis, records, "Time", "seconds"), [0.0] * len(records)
    for section, colour in SECTIONS.items():
        seconds = [record.seconds[section] for record in records]
        axis.bar(steps, seconds, 0.6, bottom=bottom, color=colour, label=section)
        bottom = [low + more for low, more in zip(bottom, seconds, strict=True)]
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1, 0.5))


def _scan(axis: Axes, record: StepRecord) -> None:
    scan = record.scan
    axis.plot(scan.multiples, scan.true_gain, "-", color=BLACK, label="exact")
    _points(axis, scan.multiples, scan.gain, scan.gain_stderr, BLUE, "predicted ± two standard errors")
    if scan.reach < scan.multiples[-1]:
        start = scan.reach * 2**0.5 if scan.reach else scan.multiples[0] / 1.4
        axis.axvspan(start, scan.multiples[-1] * 1.4, color="#999999", alpha=0.25, linewidth=0,
                     label="effective sample too small")
    axis.axhline(0, color="black", linewidth=0.8)
    axis.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axis.set_xscale("log", base=2)
    axis.set_xticks(scan.multiples, [str(Fraction(multiple)) for multiple in scan.multiples])
    axis.set_xlim(scan.multiples[0] / 1.4, scan.multiples[-1] * 1.4)
    axis.set(title=f"Step {record.step}: {record.forecast.verdict}", xlabel="multiple of the proposed step")

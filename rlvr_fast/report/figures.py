"""The sections over steps: step against break-even, success, gain, gap, groups, lengths. Each None without its data."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from rlvr_fast.report.lines import (
    Panel,
    empty,
    interval_text,
    label_of,
    line_with_errors,
    once,
    plain_line,
    rows_of,
    steps_axis,
    tinted,
    two_panels,
    zero_line,
)
from rlvr_fast.report.load import Column, Series
from rlvr_fast.report.section import (
    NOTHING,
    VERDICT_COLOURS,
    VERDICT_SYMBOLS,
    Figure,
    Section,
    axis,
    colour,
    line_and_band,
    number,
    plot_text,
    step_table,
    text,
    thin,
    thinned,
)
from rlvr_fast.report.verdicts import SEVERITY, Z95, fractions, judge

SHOWN = (0.05, 16.0)  # step / break-even beyond these is drawn at the edge
TICKS = (0.0625, 0.125, 0.25, 0.5, 1, 2, 4, 8, 16)


def step_section(runs: Sequence[Series]) -> Section | None:
    """Step over break-even, with the region beyond break-even shaded."""
    figure, rows, notes = empty()
    at_edge = False
    for tint, run in tinted(runs):
        share = fractions(run)
        if share is None:
            continue
        verdicts, _, _ = judge(run)
        value, low, high = (np.clip(part, *SHOWN) for part in (share.value, share.low, share.high))
        at_edge |= bool((value != share.value)[~np.isnan(value)].any())
        name = label_of(run, "step / break-even")
        drawn = line_and_band(figure, run.step, value, low, high, name=name, tint=tint, width=1.2,
                              hover="step %{x}: %{y:.2f} of break-even<extra></extra>")
        notes += thinned(drawn, int(np.isfinite(value).sum()))
        figure.traces[-1]["mode"] = "lines"
        _verdict_markers(figure, run.step, value, verdicts)
        rows += [[text(run.name or NOTHING), str(run.step[at]), number(share.value[at]),
                  interval_text(share.low[at], share.high[at]), verdicts[at] or NOTHING]
                 for at in np.flatnonzero(~np.isnan(share.value))]
    if not rows:
        return None
    if at_edge:
        notes.append(f"Values outside {SHOWN[0]:g} to {SHOWN[1]:g} are drawn at the edge.")
    seen = np.concatenate([np.asarray(trace["y"], dtype=float) for trace in figure.traces if trace["mode"] == "lines"])
    bottom, top = min(0.2, np.nanmin(seen) / 1.25), max(4.0, np.nanmax(seen) * 1.25)
    zones = (("unsafe", 1.0, top, "red", 0.13), ("near", 0.5, 1.0, "gold", 0.12), ("safe", bottom, 0.5, "green", 0.05))
    figure.layout |= {
        "shapes": [{"type": "rect", "xref": "paper", "x0": 0, "x1": 1, "yref": "y", "y0": low, "y1": high,
                    "layer": "below", "line": {"width": 0}, "fillcolor": colour(tint, alpha)}
                   for _, low, high, tint, alpha in zones]
        + [{"type": "line", "xref": "paper", "x0": 0, "x1": 1, "yref": "y", "y0": 1, "y1": 1,
            "line": {"color": colour("red"), "width": 1.5}}],
        "annotations": [{"text": label, "xref": "paper", "x": 1.005, "xanchor": "left", "yref": "y",
                         "y": math.log10(math.sqrt(low * high)), "yanchor": "middle", "showarrow": False,
                         "font": {"color": colour("gold-ink" if tint == "gold" else tint), "size": 12.5}}
                        for label, low, high, tint, _ in zones], "margin": {"r": 58},
        "xaxis": steps_axis(runs), "yaxis": axis(
            "step / break-even", type="log", range=[math.log10(bottom), math.log10(top)], tickvals=list(TICKS),
            ticktext=[f"{tick:g}" for tick in TICKS])}
    lead = ("How far each update went towards the point where it stops helping: at 1 it is back where it started, "
            "above 1 it cost success (unsafe). By a parabola success is highest at 0.5.")
    return Section("step", "Is the step safe?", lead, figure.build(380),
                   step_table(("run", "step", "step / break-even", "95 % interval", "verdict"), rows), once(notes))


def _verdict_markers(figure: Figure, step: np.ndarray, value: np.ndarray, verdicts: list[str | None]) -> None:
    """Worst verdicts on top; of many steps the overshoots stay and the others are thinned."""
    for verdict in SEVERITY:
        at = np.array([i for i, own in enumerate(verdicts) if own == verdict and np.isfinite(value[i])], dtype=int)
        if len(at):
            at = at[thin(value[at], 400)]
            first = not any(trace.get("legendgroup") == f"verdict {verdict}" for trace in figure.traces)
            figure.traces.append({
                "type": "scatter", "mode": "markers", "x": step[at], "y": value[at], "name": verdict,
                "legendgroup": f"verdict {verdict}", "showlegend": first, "legendrank": 2000,
                "marker": {"color": colour(VERDICT_COLOURS[verdict]), "symbol": VERDICT_SYMBOLS[verdict],
                           "size": 8 if len(step) <= 200 else 5,
                           "line": {"width": 1.5, "color": colour(VERDICT_COLOURS[verdict])}},
                "hovertemplate": f"step %{{x}}: %{{y:.2f}} of break-even, {verdict}<extra></extra>"})


def success_section(runs: Sequence[Series]) -> Section | None:
    (figure, rows, notes), missing = empty(), False
    for tint, run in tinted(runs):
        sampled, exact = run.get("success"), run.get("exact_success")
        name = label_of(run, "success rate")
        if exact is not None:
            plain_line(figure, run, exact, f"{name}, exact" if sampled else name, tint, notes,
                       dash="dot" if sampled else "solid")
        if sampled is not None:
            low, high, bounded = _success_interval(run, sampled)
            missing |= bool(np.isnan(low[np.isfinite(sampled.value)]).any())
            notes += thinned(line_and_band(figure, run.step, sampled.value, low, high, name=name, tint=tint,
                                           hover="step %{x}: %{y:.1%}<extra>" + plot_text(name) + "</extra>"),
                             int(np.isfinite(sampled.value).sum()))
            if bounded:
                notes.append("Band: 95 %, from the largest error that prompts with this success rate can have, "
                             "√(p(1 − p)/prompts).")
            elif np.isfinite(low).any():
                notes.append("Band: 95 %.")
        rows += rows_of(run, [(sampled, ".3f"), (exact, ".4f")])
    if not rows:
        return None
    if missing:
        notes.append("No band where the log holds no error: log success_stderr, or analyse a rollout dump beside it.")
    values = np.concatenate([np.array(trace["y"], dtype=float) for trace in figure.traces])
    top = 1.0 if np.nanmax(values) > 0.6 else min(1.0, np.nanmax(values) * 1.3 + 0.02)
    figure.layout |= {"xaxis": steps_axis(runs), "yaxis": axis(
        "success rate", tickformat=".0%", range=[min(0, np.nanmin(values)), max(top, np.nanmax(values))])}
    return Section("success", "Success over steps", "Share of responses that the verifier accepts.", figure.build(),
                   step_table(("run", "step", "success", "exact success"), rows), once(notes))


def _success_interval(run: Series, column: Column) -> tuple[np.ndarray, np.ndarray, bool]:
    """95 % ends; without a logged error the bound √(p(1 − p)/prompts), since a prompt's mean varies by at most that."""
    error, prompts, bounded = column.stderr, run.get("n_prompts"), False
    if np.isnan(error).all() and prompts is not None:
        with np.errstate(invalid="ignore", divide="ignore"):
            error = np.sqrt(column.value * (1 - column.value) / prompts.value)
        bounded = bool(np.isfinite(error).any())
    return np.clip(column.value - Z95 * error, 0, 1), np.clip(column.value + Z95 * error, 0, 1), bounded


def gain_section(runs: Sequence[Series]) -> Section | None:
    figure, rows, notes = empty()
    for tint, run in tinted(runs):
        gain, realised = run.get("gain"), run.get("realised_gain")
        if gain is not None:
            name = label_of(run, "gain") + (", forecast" if realised else "")
            notes += line_with_errors(figure, run, gain, name, tint, "step %{x}: %{y:+.2%}<extra></extra>")
        if realised is not None:
            plain_line(figure, run, realised, label_of(run, "gain") + ", realised", tint, notes, dash="dot")
        rows += rows_of(run, [(gain, "+.4f"), (realised, "+.4f")])
    if not rows:
        return None
    figure.layout |= {"xaxis": steps_axis(runs), "yaxis": axis("change of success", tickformat="+.1%"),
                      "shapes": [zero_line()]}
    lead = "Change of the success rate by each update. Below the line the step cost success; where the band covers " \
           "it, the measurement cannot tell."
    return Section("gain", "What each step gained", lead, figure.build(),
                   step_table(("run", "step", "gain ± error", "realised gain"), rows), once(notes))


def gap_section(runs: Sequence[Series]) -> Section | None:
    squared = any(run.get("gap") is not None for run in runs)
    role, label = ("gap", "squared gap norm") if squared else ("gap_norm", "gap norm")
    figure, rows, notes = empty()
    for tint, run in tinted(runs):
        column = run.get(role)
        if column is not None:
            notes += line_with_errors(figure, run, column, label_of(run, label), tint,
                                      "step %{x}: %{y:.3g}<extra></extra>")
            rows += rows_of(run, [(column, ".4g")])
    if not rows:
        return None
    figure.layout |= {"xaxis": steps_axis(runs), "yaxis": axis(label, rangemode="tozero"), "shapes": [zero_line()]}
    lead = ("How far the log-prob gradients of correct and incorrect responses to a prompt lie apart, mean over "
            "prompts with both." + (" Sampling noise is taken off, so it can fall below 0 where there is no gap to be "
                                    "seen." if squared else ""))
    return Section("gap", "Gradient gap", lead, figure.build(),
                   step_table(("run", "step", f"{label} ± error"), rows), once(notes))


def alignment_section(runs: Sequence[Series]) -> Section | None:
    cosine = Panel("alignment", "cosine", "cosine", "+.3f", level=0)
    signal = Panel("signal_to_noise", "signal to noise", "signal to noise", ".3g", level=1)
    shown = [panel.role for panel in (cosine, signal) if panel.has_data(runs)]
    lead = [sentence for role, sentence in (
        ("alignment", "Cosine between the update and the mean gap: 1 along it, at or below 0 it does not help on "
                      "average."),
        ("signal_to_noise", "Signal to noise of the gap: below 1 a step is mostly noise, and more responses per prompt "
                            "say more.")) if role in shown]
    return two_panels("alignment", "Does the update follow the gap?", " ".join(lead), runs, cosine, signal)


def groups_section(runs: Sequence[Series]) -> Section | None:
    """Shares of mixed, solved and failed groups, told apart by colour and runs by dash; runs by colour if only mixed
    ones are known."""
    figure, rows, notes = empty()
    mixed_alone = not any(run.get(role) for run in runs for role in ("solved", "failed"))
    for at, (own, run) in enumerate(tinted(runs)):
        mixed, zero, solved, failed = map(run.get, ("mixed", "zero_std", "solved", "failed"))
        if mixed is None and zero is not None:
            mixed = Column(1 - zero.value, zero.stderr, zero.low, zero.high, zero.sources)
        for column, name, tint in ((mixed, "mixed", "blue"), (solved, "solved", "green"), (failed, "failed", "red")):
            if column is not None:
                plain_line(figure, run, column, f"{label_of(run)} {name}".strip(), own if mixed_alone else tint, notes,
                           dash="solid" if mixed_alone else ("solid", "dot", "dash", "dashdot")[at % 4])
        rows += rows_of(run, [(mixed, ".3f"), (solved, ".3f"), (failed, ".3f")])
    if not rows:
        return None
    figure.layout |= {"xaxis": steps_axis(runs), "yaxis": axis("share of groups", tickformat=".0%", range=[0, 1.02])}
    lead = "Only mixed groups, with correct and incorrect responses, have a gap; with group-normalised advantages " \
           "the others teach nothing."
    return Section("groups", "Mixed, solved and failed groups", lead, figure.build(),
                   step_table(("run", "step", "mixed", "solved", "failed"), rows), once(notes))


def length_section(runs: Sequence[Series]) -> Section | None:
    length = Panel("length", "length", "mean length", ".1f")
    bias = Panel("length_bias", "correct against incorrect", "bias index", "+.3f", level=0)
    difference = Panel("length_difference", "correct against incorrect", "correct − incorrect", "+.3f", level=0)
    effect = bias if bias.has_data(runs) else difference
    lead = "Length of the responses" + (
        ", and (wrong − right)/(wrong + right) of the mean lengths: above 0 wrong responses are longer, and 1/length "
        "in the loss punishes their tokens less." if effect is bias else
        ", and how much longer correct ones are than incorrect ones to the same prompt." if effect.has_data(runs) else
        ".")
    return two_panels("length", "Response lengths", lead, runs, length, effect)

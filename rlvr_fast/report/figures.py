"""The sections over steps: step against break-even, success, gain, gap, groups, lengths. Each None without its data."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from rlvr_fast.report.load import Column, Series
from rlvr_fast.report.section import (
    NOTHING,
    RUN_COLOURS,
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
    with_error,
)
from rlvr_fast.report.verdicts import SEVERITY, Z95, fractions, judge

SHOWN = (0.05, 16.0)  # step / break-even beyond these is drawn at the edge
TICKS = (0.0625, 0.125, 0.25, 0.5, 1, 2, 4, 8, 16)


def _empty() -> tuple[Figure, list[list[str]], list[str]]:
    """A section's figure, rows and notes before there is any."""
    return Figure(), [], []


def step_section(runs: Sequence[Series]) -> Section | None:
    """Step over break-even, with the region beyond break-even shaded."""
    figure, rows, notes = _empty()
    at_edge = False
    for tint, run in _tinted(runs):
        share = fractions(run)
        if share is None:
            continue
        verdicts, _, _ = judge(run)
        value, low, high = (np.clip(part, *SHOWN) for part in (share.value, share.low, share.high))
        at_edge |= bool((value != share.value)[~np.isnan(value)].any())
        name = _label(run, "step / break-even")
        drawn = line_and_band(figure, run.step, value, low, high, name=name, tint=tint, width=1.2,
                              hover="step %{x}: %{y:.2f} of break-even<extra></extra>")
        notes += thinned(drawn, int(np.isfinite(value).sum()))
        figure.traces[-1]["mode"] = "lines"
        _verdict_markers(figure, run.step, value, verdicts)
        rows += [[text(run.name or NOTHING), str(run.step[at]), number(share.value[at]),
                  _interval(share.low[at], share.high[at]), verdicts[at] or NOTHING]
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
        "xaxis": _steps(runs), "yaxis": axis(
            "step / break-even", type="log", range=[math.log10(bottom), math.log10(top)], tickvals=list(TICKS),
            ticktext=[f"{tick:g}" for tick in TICKS])}
    lead = ("How far each update went towards the point where it stops helping: at 1 it is back where it started, "
            "above 1 it cost success (unsafe). By a parabola success is highest at 0.5.")
    return Section("step", "Is the step safe?", lead, figure.build(380),
                   step_table(("run", "step", "step / break-even", "95 % interval", "verdict"), rows), _once(notes))


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
    (figure, rows, notes), missing = _empty(), False
    for tint, run in _tinted(runs):
        sampled, exact = run.get("success"), run.get("exact_success")
        name = _label(run, "success rate")
        if exact is not None:
            _plain_line(figure, run, exact, f"{name}, exact" if sampled else name, tint, notes,
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
        rows += _rows(run, [(sampled, ".3f"), (exact, ".4f")])
    if not rows:
        return None
    if missing:
        notes.append("No band where the log holds no error: log success_stderr, or analyse a rollout dump beside it.")
    values = np.concatenate([np.array(trace["y"], dtype=float) for trace in figure.traces])
    top = 1.0 if np.nanmax(values) > 0.6 else min(1.0, np.nanmax(values) * 1.3 + 0.02)
    figure.layout |= {"xaxis": _steps(runs), "yaxis": axis("success rate", tickformat=".0%",
                                                   range=[min(0, np.nanmin(values)), max(top, np.nanmax(values))])}
    return Section("success", "Success over steps", "Share of responses that the verifier accepts.", figure.build(),
                   step_table(("run", "step", "success", "exact success"), rows), _once(notes))


def _success_interval(run: Series, column: Column) -> tuple[np.ndarray, np.ndarray, bool]:
    """95 % ends; without a logged error the bound √(p(1 − p)/prompts), since a prompt's mean varies by at most that."""
    error, prompts, bounded = column.stderr, run.get("n_prompts"), False
    if np.isnan(error).all() and prompts is not None:
        with np.errstate(invalid="ignore", divide="ignore"):
            error = np.sqrt(column.value * (1 - column.value) / prompts.value)
        bounded = bool(np.isfinite(error).any())
    return np.clip(column.value - Z95 * error, 0, 1), np.clip(column.value + Z95 * error, 0, 1), bounded


def gain_section(runs: Sequence[Series]) -> Section | None:
    figure, rows, notes = _empty()
    for tint, run in _tinted(runs):
        gain, realised = run.get("gain"), run.get("realised_gain")
        if gain is not None:
            notes += _errors(figure, run, gain, _label(run, "gain") + (", forecast" if realised else ""), tint,
                             "step %{x}: %{y:+.2%}<extra></extra>")
        if realised is not None:
            _plain_line(figure, run, realised, _label(run, "gain") + ", realised", tint, notes, dash="dot")
        rows += _rows(run, [(gain, "+.4f"), (realised, "+.4f")])
    if not rows:
        return None
    figure.layout |= {"xaxis": _steps(runs), "yaxis": axis("change of success", tickformat="+.1%"), "shapes": [_zero()]}
    lead = "Change of the success rate by each update. Below the line the step cost success; where the band covers " \
           "it, the measurement cannot tell."
    return Section("gain", "What each step gained", lead, figure.build(),
                   step_table(("run", "step", "gain ± error", "realised gain"), rows), _once(notes))


def gap_section(runs: Sequence[Series]) -> Section | None:
    squared = any(run.get("gap") is not None for run in runs)
    role, label = ("gap", "squared gap norm") if squared else ("gap_norm", "gap norm")
    figure, rows, notes = _empty()
    for tint, run in _tinted(runs):
        column = run.get(role)
        if column is not None:
            notes += _errors(figure, run, column, _label(run, label), tint, "step %{x}: %{y:.3g}<extra></extra>")
            rows += _rows(run, [(column, ".4g")])
    if not rows:
        return None
    figure.layout |= {"xaxis": _steps(runs), "yaxis": axis(label, rangemode="tozero"), "shapes": [_zero()]}
    lead = ("How far the log-prob gradients of correct and incorrect responses to a prompt lie apart, mean over "
            "prompts with both." + (" Sampling noise is taken off, so it can fall below 0 where there is no gap to be "
                                    "seen." if squared else ""))
    return Section("gap", "Gradient gap", lead, figure.build(),
                   step_table(("run", "step", f"{label} ± error"), rows), _once(notes))


def alignment_section(runs: Sequence[Series]) -> Section | None:
    figure, rows, notes = _empty()
    first, second = (any(run.get(role) for run in runs) for role in ("alignment", "signal_to_noise"))
    both = first and second
    for tint, run in _tinted(runs):
        cosine, signal = run.get("alignment"), run.get("signal_to_noise")
        if cosine is not None:
            _plain_line(figure, run, cosine, _label(run, "cosine"), tint, notes)
        if signal is not None:
            _plain_line(figure, run, signal, _label(run, "signal to noise"), tint, notes)
            figure.traces[-1] |= {"yaxis": "y2"} | ({"showlegend": False} if both else {})
        rows += _rows(run, [(cosine, "+.3f"), (signal, ".3g")])
    if not rows:
        return None
    figure.layout |= {"xaxis": _steps(runs) | {"anchor": "y2" if second else "y"},
                      "shapes": ([_level("y", 0)] if first else []) + ([_level("y2", 1)] if second else [])}
    figure.layout |= {"yaxis": axis("cosine", domain=[0.5, 1] if both else [0, 1])} if first else {}
    figure.layout |= {"yaxis2": axis("signal to noise", domain=[0, 0.42] if both else [0, 1])} if second else {}
    lead = " ".join((
        *(["Cosine between the update and the mean gap: 1 along it, at or below 0 it does not help on average."]
          if first else []),
        *(["Signal to noise of the gap: below 1 a step is mostly noise, and more responses per prompt say more."]
          if second else [])))
    return Section("alignment", "Does the update follow the gap?", lead, figure.build(380 if both else 320),
                   step_table(("run", "step", "cosine", "signal to noise"), rows), _once(notes))


def groups_section(runs: Sequence[Series]) -> Section | None:
    """Shares of mixed, solved and failed groups, told apart by colour and runs by dash; runs by colour if only mixed
    ones are known."""
    figure, rows, notes = _empty()
    mixed_alone = not any(run.get(role) for run in runs for role in ("solved", "failed"))
    for at, (own, run) in enumerate(_tinted(runs)):
        mixed, zero, solved, failed = map(run.get, ("mixed", "zero_std", "solved", "failed"))
        if mixed is None and zero is not None:
            mixed = Column(1 - zero.value, zero.stderr, zero.low, zero.high, zero.sources)
        for column, name, tint in ((mixed, "mixed", "blue"), (solved, "solved", "green"), (failed, "failed", "red")):
            if column is not None:
                _plain_line(figure, run, column, f"{_label(run)} {name}".strip(), own if mixed_alone else tint, notes,
                            dash="solid" if mixed_alone else ("solid", "dot", "dash", "dashdot")[at % 4])
        rows += _rows(run, [(mixed, ".3f"), (solved, ".3f"), (failed, ".3f")])
    if not rows:
        return None
    figure.layout |= {"xaxis": _steps(runs), "yaxis": axis("share of groups", tickformat=".0%", range=[0, 1.02])}
    lead = "Only mixed groups, with correct and incorrect responses, have a gap; with group-normalised advantages " \
           "the others teach nothing."
    return Section("groups", "Mixed, solved and failed groups", lead, figure.build(),
                   step_table(("run", "step", "mixed", "solved", "failed"), rows), _once(notes))


def length_section(runs: Sequence[Series]) -> Section | None:
    figure, rows, notes = _empty()
    second = next((role for role in ("length_bias", "length_difference") if any(run.get(role) for run in runs)), None)
    first = any(run.get("length") is not None for run in runs)
    for tint, run in _tinted(runs):
        length, effect = run.get("length"), run.get(second) if second else None
        if length is not None:
            _plain_line(figure, run, length, _label(run, "length"), tint, notes)
        if effect is not None:
            _plain_line(figure, run, effect, _label(run, "correct against incorrect"), tint, notes)
            figure.traces[-1] |= {"yaxis": "y2"} | ({"showlegend": False} if first else {})
        rows += _rows(run, [(length, ".1f"), (effect, "+.3f")])
    if not rows:
        return None
    label = "bias index" if second == "length_bias" else "correct − incorrect"
    figure.layout |= {"xaxis": _steps(runs) | {"anchor": "y2" if second else "y"},
                      "shapes": [_zero("y2")] if second else []}
    figure.layout |= {"yaxis": axis("mean length", domain=[0.5, 1] if second else [0, 1])} if first else {}
    figure.layout |= {"yaxis2": axis(label, domain=[0, 0.42] if first else [0, 1])} if second else {}
    lead = "Length of the responses" + (
        ", and (wrong − right)/(wrong + right) of the mean lengths: above 0 wrong responses are longer, and 1/length "
        "in the loss punishes their tokens less." if second == "length_bias" else
        ", and how much longer correct ones are than incorrect ones to the same prompt." if second else ".")
    return Section("length", "Response lengths", lead, figure.build(380 if first and second else 320),
                   step_table(("run", "step", "mean length", label), rows), _once(notes))


def _tinted(runs: Sequence[Series]) -> list[tuple[str, Series]]:
    return [(RUN_COLOURS[at % len(RUN_COLOURS)], run) for at, run in enumerate(runs)]


def _steps(runs: Sequence[Series]) -> dict[str, object]:
    """The axis of steps; of a few steps with whole numbers alone."""
    ends = [step for run in runs for step in run.step[[0, -1]].tolist()]
    return axis("step") | ({"dtick": 1} if max(ends) - min(ends) <= 12 else {})


def _label(run: Series, otherwise: str = "") -> str:
    """A run in the legend; what the line shows where there is a single run without a name."""
    return f"run {run.name}" if run.name else otherwise


def _plain_line(figure: Figure, run: Series, column: Column, name: str, tint: str, notes: list[str],
                dash: str = "solid") -> None:
    nothing = np.full(len(run.step), math.nan)
    drawn = line_and_band(figure, run.step, column.value, nothing, nothing, name=name, tint=tint, dash=dash,
                          hover="step %{x}: %{y:.4g}<extra>" + plot_text(name) + "</extra>")
    notes += thinned(drawn, int(np.isfinite(column.value).sum()))


def _errors(figure: Figure, run: Series, column: Column, name: str, tint: str, hover: str) -> list[str]:
    error = Z95 * column.stderr
    drawn = line_and_band(figure, run.step, column.value, column.value - error, column.value + error, name=name,
                          tint=tint, hover=hover)
    notes = thinned(drawn, int(np.isfinite(column.value).sum()))
    return notes + (["Band: 95 %, 1.96 standard errors."] if np.isfinite(error).any() else ["No error was logged."])


def _rows(run: Series, columns: Sequence[tuple[Column | None, str]]) -> list[list[str]]:
    given = [column for column, _ in columns if column is not None]
    if not given:
        return []
    known = np.flatnonzero(np.any([~np.isnan(column.value) for column in given], axis=0))
    return [[text(run.name or NOTHING), str(run.step[at]),
             *(NOTHING if column is None else with_error(column.value[at], column.stderr[at], how)
               for column, how in columns)] for at in known]


def _interval(low: float, high: float) -> str:
    return NOTHING if math.isnan(low) and math.isnan(high) else f"{number(low)} to {number(high)}"


def _zero(y: str = "y") -> dict[str, object]:
    return _level(y, 0)


def _level(y: str, at: float) -> dict[str, object]:
    return {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "yref": y, "y0": at, "y1": at,
            "line": {"color": colour("grey"), "width": 1}}


def _once(notes: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(notes))

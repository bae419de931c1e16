"""The sections across prompts: spectrum, interference, tokens, and the table of prompts. Each None without its data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlvr_fast.report.load import Recorded, Series
from rlvr_fast.report.section import (
    NOTHING,
    Figure,
    Section,
    Table,
    axis,
    colour,
    number,
    plot_text,
    step_table,
    text,
    with_error,
)
from rlvr_fast.report.verdicts import Z95, bin_range, bin_verdict

PROMPT_ROWS = 100
LABELLED = 30  # prompts up to which a heat map names them on its axes
BIN_TINTS = {"mastered": "green", "edge": "blue", "lucky guess": "gold", "out of reach": "grey"}
Row = Mapping[str, Any]


def whom_section(runs: Sequence[Series]) -> Section | None:
    """Slope of the success rate at the end of the last measured step, by the prompts' own success rate."""
    figure, rows = Figure(), []
    measured: list[tuple[Series, Row]] = [(run, {**one, "verdict": bin_verdict(one)}) for run in runs
                                          for one in run.bins]
    for at, run in enumerate(run for run in runs if run.bins):
        own = [one for other, one in measured if other is run]
        figure.traces.append({
            "type": "scatter", "mode": "markers", "name": plot_text(f"run {run.name}" if run.name else "slope"),
            "x": [bin_range(one) for one in own], "y": [one["end_slope"] for one in own],
            "error_y": _bars([Z95 * one.get("end_slope_stderr", math.nan) for one in own]),
            "marker": {"size": 11, "symbol": ("circle", "square", "diamond", "cross")[at % 4], "color": [
                colour({"gains": "green", "loses": "red"}.get(one["verdict"], "grey")) for one in own]},
            "hovertemplate": "success %{x}: slope %{y:.3g}<extra></extra>"})
        rows += [[text(run.name or NOTHING), str(run.bins_step), bin_range(one), number(one.get("n_prompts"), ",.0f"),
                  with_error(one["end_slope"], one.get("end_slope_stderr")),
                  number(one.get("break_even")),
                  one["verdict"]] for one in own]
    if not rows:
        return None
    figure.layout |= {"xaxis": axis("success rate of the prompts", type="category"), "shapes": [{
        "type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": 0, "y1": 0,
        "line": {"color": colour("grey"), "width": 1}}], "yaxis": axis("slope at the end of the step"),
        "showlegend": sum(bool(run.bins) for run in runs) > 1}
    losing = [bin_range(one) for _, one in measured if one["verdict"] == "loses"]
    lead = "Where the last measured step ended: above 0 going on would help these prompts, below 0 the step has " \
           "passed their peak. " + (f"Past it: success {', '.join(losing)}." if losing else
                                    "No bin is past it beyond error.")
    return Section("whom", "For which prompts", lead, figure.build(320), step_table(
        ("run", "step", "success rate", "prompts", "slope ± error", "break-even", "verdict"), rows),
        ("Bars: 95 %, 1.96 standard errors.",))


def spectrum_section(recorded: Recorded) -> Section | None:
    """Bins of difficulty: measured gaps where a DifficultySpectrum was logged, else what rollouts alone tell."""
    spectrum = recorded.details.get("spectrum")
    if spectrum is not None:
        return _measured_spectrum(spectrum)
    if recorded.rollouts is None:
        return None
    bins: Sequence[Row] = recorded.rollouts["difficulty"] or recorded.rollouts["spectrum"]
    by = "difficulty" if recorded.rollouts["difficulty"] else "success rate"
    figure = Figure([{"type": "bar", "x": list(range(len(bins))), "y": [one["prompts"] for one in bins],
                      "marker": {"color": colour("blue")}, "hovertemplate": "%{y} prompts<extra></extra>"}],
                    {"xaxis": _bin_axis(by, [plot_text(one["bin"]) for one in bins]), "yaxis": axis("prompts")})
    rows = [[text(one["bin"]), f"{one['prompts']:,}", f"{one['rollouts']:,}", number(one["success"], ".3f"),
             f"{number(one['low'], '.2f')} to {number(one['high'], '.2f')}", number(one["mixed"], ".0%"),
             number(one["length_difference"], "+.1f")] for one in bins]
    lead = f"Prompts by their {by} over the run. Success alone cannot tell a learnable prompt from a lucky guess: " \
           "log a DifficultySpectrum for that."
    return Section("spectrum", "Difficulty spectrum", lead, figure.build(300), Table(
        (by, "prompts", "rollouts", "success", "95 %", "mixed groups", "correct − incorrect length"), rows,
        frozenset(range(1, 7))))


def _measured_spectrum(spectrum: Row) -> Section:
    bins: Sequence[Row] = spectrum["bins"]
    what = "shared squared gap" if spectrum["shared"] else "squared gap"
    figure = Figure([{
        "type": "bar", "x": list(range(len(bins))), "y": [one["norm_sq"] for one in bins], "name": what,
        "error_y": _bars([Z95 * _float(one["stderr"]) for one in bins]),
        "marker": {"color": [colour(BIN_TINTS.get(one["verdict"], "sky")) for one in bins]},
        "hovertemplate": "%{y:.3g}<extra></extra>"}], {
        "yaxis": axis(what), "xaxis": _bin_axis("bin of difficulty", [
            f"{plot_text(one['bin'])}<br><i>{plot_text(one['verdict'])}</i>" for one in bins])})
    rows = [[text(one["bin"]), number(_float(one["prompts"]), ",.0f"), number(_float(one["rollouts"]), ",.0f"),
             number(_float(one["success"]), ".3f"),
             f"{number(_float(one['low']), '.2f')} to {number(_float(one['high']), '.2f')}",
             with_error(_float(one["norm_sq"]), _float(one["stderr"])), number(_float(one["share"]), ".0%"),
             text(one["verdict"])] for one in bins]
    lead = ("Where the gradient comes from. Bins at the edge have a gap to learn from; a lucky guess has successes and "
            "no gap; what is mastered or out of reach has neither." + (
                " The shared gap is what prompts of a bin have in common, and what carries over to others."
                if spectrum["shared"] else ""))
    return Section("spectrum", "Difficulty spectrum", lead, figure.build(340), Table(
        ("bin", "prompts", "rollouts", "success", "95 %", f"{what} ± error", "share of the signal", "verdict"), rows,
        frozenset(range(1, 7))), ("Bars: 95 %, 1.96 standard errors.",))


def interference_section(recorded: Recorded) -> Section | None:
    found = recorded.details.get("interference")
    if found is None:
        return None
    names, cosine = found["prompts"], np.array(
        [[_float(value) for value in row] for row in found["cosine"]], dtype=float).reshape(len(found["prompts"]), -1)
    if cosine.shape != (len(names), len(names)):
        raise ValueError(f"cosine must be [{len(names)}, {len(names)}]")
    apart = ~np.eye(len(names), dtype=bool)
    compared = np.flatnonzero((np.isfinite(cosine) & apart).any(1))
    names, cosine = [names[at] for at in compared], cosine[np.ix_(compared, compared)]
    order = seriation(cosine)
    named, labels = len(names) <= LABELLED, [plot_text(names[at], 24) for at in order]
    # Prompts are placed by number: two that look alike when cut short must not fall on one row.
    at = list(range(len(names)))
    ticks = {"tickvals": at, "ticktext": labels} if named else {"showticklabels": False}
    figure = None if not at else Figure([{
        "type": "heatmap", "x": at, "y": at, "z": cosine[np.ix_(order, order)], "zmin": -1, "zmax": 1,
        "colorscale": [[0, colour("red")], [0.5, colour("surface")], [1, colour("blue")]], "hoverongaps": False,
        "xgap": 1 if named else 0, "ygap": 1 if named else 0,
        "colorbar": {"title": {"text": "cosine"}, "thickness": 12, "outlinewidth": 0},
        "text": [[f"{one} and {other}" for other in labels] for one in labels],
        "hovertemplate": "%{text}: %{z:.2f}<extra></extra>"}], {
        "xaxis": axis("prompts", showgrid=False, zeroline=False) | ticks,
        "yaxis": axis("prompts", showgrid=False, zeroline=False, autorange="reversed") | ticks}).build(460)
    opposed, comparable = (_float(found["summary"].get(name)) for name in ("frac", "frac_comparable"))
    lead = "Cosine between the gaps of two prompts: below 0 a step for one costs the other. " \
           f"{number(opposed, '.0%')} of the comparable pairs oppose each other; " \
           f"{number(comparable, '.0%')} of all pairs can be compared."
    notes = [f"Shown: {len(names)} of {found['n_prompts']:,} prompts; the others' gaps do not stand out of their noise"
             + (f", or are not among the {len(found['prompts'])} largest." if found["n_prompts"] > len(found["prompts"])
                else "."), *(["Ordered so that prompts which agree are neighbours."] if at else [])]
    rows = [[text(one["prompt"], 80), text(one["other"], 80), number(_float(one["cosine"]), ".2f"),
             number(_float(one["product"]))] for one in found["worst"]]
    return Section("interference", "Prompts that oppose each other", lead, figure,
                   Table(("prompt", "opposed to", "cosine", "product of the gaps"), rows, frozenset((2, 3)),
                         "The most opposed pairs; picked as extremes, they look worse than they are." if rows else
                         "No pair is opposed."), notes)


def seriation(cosine: np.ndarray) -> np.ndarray:
    """An order in which similar rows are neighbours: by the leading eigenvector, what is unknown counting as 0."""
    if not len(cosine):
        return np.arange(0)
    known = np.nan_to_num(np.clip(cosine, -1, 1))
    return np.argsort(np.linalg.eigh((known + known.T) / 2)[1][:, -1], kind="stable")


def tokens_section(recorded: Recorded) -> Section | None:
    found = recorded.details.get("tokens")
    if found is None or not found["rows"]:
        return None
    rows = sorted(found["rows"], key=lambda one: _float(one["score"]))
    at = list(range(len(rows)))
    score = [_float(one["score"]) for one in rows]
    figure = Figure([{
        "type": "bar", "orientation": "h", "x": score, "y": at,
        "error_x": _bars([Z95 * _float(one["stderr"]) for one in rows]),
        "marker": {"color": [colour("blue" if value > 0 else "red") for value in score]},
        "text": [plot_text(_token(one)) for one in rows], "textposition": "none",
        "hovertemplate": "%{text}: %{x:.3g}<extra></extra>"}], {
        "yaxis": {"tickvals": at, "ticktext": [plot_text(_token(one), 20) for one in rows], "automargin": True},
        "xaxis": axis("gap, mean over prompts", zeroline=True), "showlegend": False})
    lead = "Logits that move apart the most: to the right tokens that correct responses push up, to the left those " \
           f"of incorrect ones. Mean over {found['n_prompts']:,} prompts with both."
    table = Table(("token", "id", "gap ± error"), [
        [text(_token(one)), text(one.get("id", "")), with_error(_float(one["score"]), _float(one["stderr"]))]
        for one in reversed(rows)], frozenset((1, 2)))
    return Section("tokens", "Tokens that tell correct from incorrect", lead,
                   figure.build(max(260, 60 + 17 * len(rows))), table,
                   ("Bars: 95 % of each token by itself. Picked as extremes, they look larger than they are.",))


def prompts_section(recorded: Recorded) -> Section | None:
    """Each prompt: with its gap and verdict where a spectrum was logged, else its counts in the dump."""
    spectrum = recorded.details.get("spectrum")
    if spectrum is not None and spectrum["prompts"]:
        order = {"edge": 0, "lucky guess": 1, "undetermined": 2, "out of reach": 3, "mastered": 4}
        rows = sorted(spectrum["prompts"], key=lambda one: (order.get(one["verdict"], 2), -_float(one["norm_sq"], 0)))
        table = [[text(one["prompt"]), text(one["bin"]),
                  f"{_float(one['correct']):.0f} of {_float(one['rollouts']):.0f}",
                  f"{number(_float(one['low']), '.2f')} to {number(_float(one['high']), '.2f')}",
                  with_error(_float(one["norm_sq"]), _float(one["stderr"])), number(_float(one["p_adjusted"]), ".2g"),
                  text(one["verdict"])] for one in rows]
        columns: tuple[str, ...] = ("prompt", "bin", "correct", "95 %", "squared gap ± error", "p, adjusted", "verdict")
        lead, numeric, total = "Prompts at the edge first, largest gap first.", frozenset(range(2, 6)), len(table)
    elif recorded.rollouts is not None and recorded.rollouts["prompts"]:
        rows = recorded.rollouts["prompts"]
        table = [[text(one["prompt"]), f"{one['correct']:,} of {one['rollouts']:,}",
                  f"{number(one['low'], '.2f')} to {number(one['high'], '.2f')}", f"{one['groups']:,}",
                  number(one["mixed"], ".0%")] for one in rows]
        columns, numeric = ("prompt", "correct", "95 %", "groups", "mixed groups"), frozenset(range(1, 5))
        lead = "Prompts with the largest p(1 − p) first: those whose groups are most often mixed."
        total = recorded.rollouts["summary"]["prompts"]
    else:
        return None
    note = f"{PROMPT_ROWS} of {total:,} prompts." if total > PROMPT_ROWS else ""
    return Section("prompts", "Prompt by prompt", lead, None, Table(columns, table[:PROMPT_ROWS], numeric, note),
                   open_table=True)


def _token(one: Row) -> str:
    """A token with its spaces visible."""
    return str(one["token"]).replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")


def _bin_axis(title: str, labels: Sequence[str]) -> dict[str, object]:
    """Bins stand at whole numbers: two whose labels look alike must not fall together."""
    return axis(title, tickvals=list(range(len(labels))), ticktext=list(labels), showgrid=False)


def _bars(errors: Sequence[float]) -> dict[str, object]:
    return {"type": "data", "array": list(errors), "thickness": 1.5, "width": 4, "color": colour("ink")}


def _float(value: Any, default: float = math.nan) -> float:
    return default if value is None else float(value)

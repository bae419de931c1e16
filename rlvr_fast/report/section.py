"""What a section of the report is: a sentence, a figure for plotly.js, the same numbers as a table, a note."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlvr_fast.strict_json import plain

POINTS = 1000  # of a line; more cannot be told apart on a screen
ROWS = 40  # of the table of a figure over steps
NOTHING = "–"
# Roles of colours; the page holds their values for light, dark and paper (Okabe and Ito's palette, colour-blind safe).
RUN_COLOURS = ("blue", "purple", "sky", "ink", "gold", "green")
VERDICT_COLOURS = {"safe": "green", "near": "gold", "overshoot": "red", "undetermined": "grey"}
VERDICT_SYMBOLS = {"safe": "circle", "near": "diamond", "overshoot": "x", "undetermined": "circle-open"}


@dataclass(frozen=True)
class Table:
    """``columns`` and ``rows`` of texts. ``numeric``: columns that are right-aligned."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: frozenset[int] = frozenset()
    note: str = ""


@dataclass(frozen=True)
class Section:
    """One part of the page. ``figure``: data and layout for plotly.js, colours as "var(--name)"; None without one."""

    id: str
    title: str
    lead: str
    figure: Mapping[str, Any] | None = None
    table: Table | None = None
    notes: Sequence[str] = ()
    open_table: bool = False


@dataclass
class Figure:
    """Traces and layout with the defaults that all figures share."""

    traces: list[dict[str, Any]] = field(default_factory=list)
    layout: dict[str, Any] = field(default_factory=dict)

    def build(self, height: int = 340) -> dict[str, Any]:
        """Plain data: arrays as lists, NaN and infinities as None."""
        legend = sum(trace.get("showlegend", True) for trace in self.traces) > 1
        return plain({"data": self.traces, "layout": {"height": height, "showlegend": legend} | self.layout})


def axis(title: str, **more: object) -> dict[str, object]:
    return {"title": {"text": title}} | more


def colour(name: str, alpha: float | None = None) -> str:
    """A colour by its role, resolved by the page; with ``alpha`` as a transparent fill."""
    return f"var(--{name})" if alpha is None else f"var(--{name})/{alpha:g}"


def line_and_band(figure: Figure, x: np.ndarray, value: np.ndarray, low: np.ndarray, high: np.ndarray, *, name: str,
                  tint: str, hover: str, **line: object) -> int:
    """A line with a shaded interval where there is one; returns how many steps are drawn."""
    known = np.flatnonzero(np.isfinite(value))
    drawn = known[thin(value[known])]
    group, mode = plot_text(name), "lines+markers" if len(drawn) <= 60 else "lines"
    if np.isfinite(low[drawn]).any():
        band = drawn[np.isfinite(low[drawn]) & np.isfinite(high[drawn])]
        figure.traces.append({"type": "scatter", "x": np.concatenate([x[band], x[band][::-1]]), "fill": "toself",
                              "y": np.concatenate([high[band], low[band][::-1]]), "mode": "lines",
                              "line": {"width": 0}, "fillcolor": colour(tint, 0.18), "hoverinfo": "skip",
                              "showlegend": False, "legendgroup": group})
    figure.traces.append({"type": "scatter", "x": x[drawn], "y": value[drawn], "name": group,
                          "mode": mode, "marker": {"size": 5}, "legendgroup": group,
                          "line": {"color": colour(tint), "width": 2} | line, "hovertemplate": hover})
    if len(drawn) == 1 and np.isfinite(low[drawn]).all() and np.isfinite(high[drawn]).all():  # no band around a point
        figure.traces[-1]["error_y"] = {"type": "data", "array": high[drawn] - value[drawn], "color": colour(tint),
                                        "arrayminus": value[drawn] - low[drawn], "symmetric": False}
    return len(drawn)


def thin(values: np.ndarray, most: int = POINTS) -> np.ndarray:
    """Positions to draw, at most ``most``: the lowest and the highest of each stretch, the first and the last."""
    n = len(values)
    if n <= most:
        return np.arange(n)
    picked = {0, n - 1}
    for part in np.array_split(np.arange(n), (most - 2) // 2):
        picked |= {int(part[values[part].argmin()]), int(part[values[part].argmax()])}
    return np.array(sorted(picked))


def thinned(drawn: int, n: int) -> list[str]:
    """The note about a figure that leaves steps out."""
    return [] if drawn >= n else [f"Drawn: {drawn:,} of {n:,} steps, the lowest and the highest of every stretch."]


def step_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table over steps, evenly thinned, first and last row included, without columns that hold nothing."""
    shown, note = list(rows), ""
    if len(rows) > ROWS:
        shown = [rows[round(i * (len(rows) - 1) / (ROWS - 1))] for i in range(ROWS)]
        note = f"{ROWS} of {len(rows):,} rows, evenly spread."
    kept = [at for at in range(len(columns)) if any(row[at] != NOTHING for row in rows)]
    return Table([columns[at] for at in kept], [[row[at] for at in kept] for row in shown],
                 frozenset(i for i, at in enumerate(kept) if columns[at] not in ("run", "verdict")), note)


def text(value: object, most: int = 200) -> str:
    """A name on one line without control characters or lone surrogates; long ones are cut."""
    line = " ".join(str(value).encode("utf-8", "replace").decode().split())
    line = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in line) or "(empty)"
    return line if len(line) <= most else f"{line[:most - 1]}…"


def plot_text(value: object, most: int = 40) -> str:
    """A name in a figure: plotly.js reads tags and entities in texts, so these are escaped."""
    return text(value, most).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def number(value: float | None, how: str = ".3g") -> str:
    if value is None or math.isnan(value):
        return NOTHING
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    shown = f"{value:{how}}"
    return (f"{value:.0f}" if "e+" in shown and abs(value) < 1e6 else shown).replace("-", "−")


def with_error(value: float | None, error: float | None, how: str = ".3g") -> str:
    shown = number(value, how)
    return shown if error is None or math.isnan(error) or shown == NOTHING else f"{shown} ± {number(error, '.2g')}"

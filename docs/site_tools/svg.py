"""Small drawings as SVG text. Colours are classes that _static/site.css defines for light and for dark pages."""

from __future__ import annotations

import html
from collections.abc import Sequence

Point = tuple[float, float]


def document(width: float, height: float, parts: Sequence[str], description: str) -> str:
    """An <svg> element that scales with the page."""
    return (f'<svg class="drawing" viewBox="0 0 {width:g} {height:g}" role="img" '
            f'aria-label="{html.escape(description, quote=True)}" style="max-width: {width:g}px">'
            + "".join(parts) + "</svg>")


def text(at: Point, words: str, style: str = "", anchor: str = "start") -> str:
    return (f'<text x="{at[0]:.1f}" y="{at[1]:.1f}" text-anchor="{anchor}" class="{style}">'
            f"{html.escape(words)}</text>")


def line(start: Point, end: Point, style: str = "axis") -> str:
    return (f'<line x1="{start[0]:.1f}" y1="{start[1]:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}" '
            f'class="stroke {style}"/>')


def path(points: Sequence[Point], style: str) -> str:
    return f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" class="stroke {style}"/>'


def dot(at: Point, style: str, radius: float = 4) -> str:
    return f'<circle cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="{radius:g}" class="fill {style}"/>'


def box(corner: Point, size: Point, style: str) -> str:
    return (f'<rect x="{corner[0]:.1f}" y="{corner[1]:.1f}" width="{size[0]:.1f}" height="{size[1]:.1f}" rx="4" '
            f'class="fill {style}"/>')


def arrow(start: Point, end: Point, style: str) -> str:
    """A line with a head."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    length = (dx * dx + dy * dy) ** 0.5
    ux, uy = dx / length, dy / length
    left = (end[0] - 10 * ux - 5 * uy, end[1] - 10 * uy + 5 * ux)
    right = (end[0] - 10 * ux + 5 * uy, end[1] - 10 * uy - 5 * ux)
    head = " ".join(f"{x:.1f},{y:.1f}" for x, y in (end, left, right))
    return line(start, (end[0] - 8 * ux, end[1] - 8 * uy), style) + f'<polygon points="{head}" class="fill {style}"/>'


def bars(rows: Sequence[tuple[str, float, str, str]], description: str, *, mark: float | None = None,
         mark_label: str = "") -> str:
    """Horizontal bars from 0. Rows: name, value, the value as it is written, style. ``mark``: a vertical line."""
    left, width, step = 210.0, 700.0, 26.0
    largest = max([value for _, value, _, _ in rows if value > 0] + ([] if mark is None else [mark]), default=1.0)
    scale = (width - left - 80) / largest
    top = 22.0 if mark is not None else 6.0
    parts = []
    for at, (name, value, written, style) in enumerate(rows):
        y = top + at * step
        parts += [text((left - 8, y + 15), name, "label", "end"),
                  box((left, y + 2), (max(value, 0.0) * scale, step - 8), style),
                  text((left + max(value, 0.0) * scale + 6, y + 15), written, "label")]
    bottom = top + len(rows) * step
    if mark is not None:
        x = left + mark * scale
        parts += [line((x, top - 4), (x, bottom), "axis dashed"),
                  text((x, top - 8), mark_label, "label small", "middle")]
    return document(width, bottom + 6, parts, description)

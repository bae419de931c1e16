"""What every experiment leaves behind: one figure, one JSON with all its numbers and their provenance, tables."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from rlvr_fast.strict_json import rounded

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, distinguishable with any kind of colour blindness
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PINK = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")

Numbers = dict[str, Any]  # plain values and tensors under names, to any depth


@dataclass
class Report:
    """One experiment's result.

    Attributes:
        name: of the command and of the files.
        parameters: everything that determines the numbers, seeds included.
        numbers: what is plotted and tabulated, plain lists and floats under names.
        tables: for the terminal.
        figure: a matplotlib figure.
    """

    name: str
    parameters: dict[str, Any]
    numbers: Numbers
    figure: Figure
    tables: list[Table] = field(default_factory=list)

    def write(self, directory: Path) -> tuple[Path, Path]:
        """Write NAME.png and NAME.json; numbers that are not finite become the strings "nan", "inf", "-inf"."""
        directory.mkdir(parents=True, exist_ok=True)
        picture, record = directory / f"{self.name}.png", directory / f"{self.name}.json"
        self.figure.savefig(picture, dpi=120)
        content = {"experiment": self.name, "parameters": self.parameters, "versions": versions(),
                   "numbers": self.numbers}
        record.write_text(json.dumps(plain(content), allow_nan=False) + "\n")
        return picture, record

    def show(self, console: Console | None = None) -> None:
        console = console or Console()
        console.width = max(console.width, 118)  # piped output would be folded at 80
        for table in self.tables:
            console.print(table)


def versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("rlvr-fast", "torch", "numpy", "matplotlib")}
    return {"python": platform.python_version(), **packages}


def plain(value: Any) -> Any:
    """What strict JSON can hold, with 8 digits."""
    return rounded(value, 8)


def table(title: str, columns: list[str], rows: Sequence[Sequence[object]]) -> Table:
    """Numbers right-aligned with 4 digits, text as it is."""
    result = Table(title=title, title_justify="left")
    for i, name in enumerate(columns):
        result.add_column(name, justify="left" if i == 0 else "right")
    for row in rows:
        result.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row))
    return result


def panels(n: int, *, width: float = 5.2, height: float = 4.2) -> tuple[Figure, list[Axes]]:
    """A row of n axes, or two rows from 4 on; drawn without a display or pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    n_rows = 1 if n < 4 else 2
    n_columns = -(-n // n_rows)
    figure = Figure(figsize=(width * n_columns, height * n_rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(n_rows, n_columns, i + 1) for i in range(n)]
    for axis in axes:
        axis.grid(True, color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def label(axis: Axes, title: str, x: str, y: str) -> None:
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel(x, fontsize=9)
    axis.set_ylabel(y, fontsize=9)
    axis.tick_params(labelsize=8)

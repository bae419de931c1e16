"""The steps as a table that grows while the run goes on."""

from __future__ import annotations

from rich.console import Console
from rich.live import Live
from rich.table import Table as RichTable

COLUMNS = {  # heading: (key of the record, format)
    "step": ("step", "d"), "success": ("success", ".3f"), "mixed": ("rlvr/group/frac_mixed", ".2f"),
    "gap²": ("rlvr/gap/norm_sq", ".3g"), "± ": ("rlvr/gap/norm_sq_stderr", ".2g"), "verdict": ("verdict", ""),
    "break-even": ("break_even", ".2f"), "gain": ("gain", "+.4f"), "±": ("gain_stderr", ".4f"),
    "scale": ("rlvr/step/guard/scale", ".2f"), "|grad|": ("grad_norm", ".3g"), "length": ("length", ".1f"),
}


class Table:
    """A context manager; ``add`` shows one more record of steps.jsonl. Without a terminal each row is a line."""

    def __init__(self) -> None:
        self._console = Console(highlight=False)
        self._table = RichTable(*COLUMNS, box=None, pad_edge=False)
        self._live = Live(self._table, console=self._console, auto_refresh=False)

    def __enter__(self) -> Table:
        if self._console.is_terminal:
            self._live.start()
        else:
            self._line(list(COLUMNS))
        return self

    def __exit__(self, *error: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def add(self, record: dict[str, object]) -> None:
        cells = ["–" if record.get(key) is None else format(record[key], how) for key, how in COLUMNS.values()]
        self._table.add_row(*cells)
        if self._console.is_terminal:
            self._live.refresh()
        else:
            self._line(cells)

    def _line(self, cells: list[str]) -> None:
        self._console.print("".join(f"{cell:>13}" for cell in cells), soft_wrap=True)

"""Pieces of Markdown."""

from __future__ import annotations


def row(*cells: object) -> str:
    """A row of a table; bars inside a cell are escaped."""
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

"""Docstrings as this project writes them, told to autodoc: |x| is an absolute value, indented code needs no "::"."""

from __future__ import annotations

import re

from sphinx.application import Sphinx

LITERAL = re.compile(r"(``.*?``)")


def adapt(lines: list[str]) -> list[str]:
    """The same docstring as reStructuredText: bars escaped outside of literals, example code marked as such."""
    found: list[str] = []
    for at, line in enumerate(lines):
        parts = LITERAL.split(line)
        found.append("".join(part if part.startswith("``") else part.replace("|", r"\|") for part in parts))
        if not line.strip() and _starts_code(lines, at):
            found[-1:] = ["", "::", ""]
    return found


def _starts_code(lines: list[str], at: int) -> bool:
    """Whether after this empty line an indented block begins under an unindented paragraph without "::".

    Sections such as "Args:" have no empty line after their heading.
    """
    before, after = lines[at - 1] if at else "", lines[at + 1] if at + 1 < len(lines) else ""
    return bool(before.strip()) and not before[0].isspace() and not before.rstrip().endswith("::") and \
        after.startswith("    ")


def _process(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    # Napoleon takes what stands before the colon of a property's first line for its type; an empty line has none.
    lines[:] = [*([""] if what == "property" else []), *adapt(lines)]


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", _process, priority=400)  # before napoleon reads the sections

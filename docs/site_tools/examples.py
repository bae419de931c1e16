"""The code on the pages: found, run in reading order, and what it prints."""

from __future__ import annotations

import contextlib
import io
import re
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

FENCE = re.compile(r"^(?P<fence>`{3,})(?P<language>\w+)\n(?P<code>.*?)^(?P=fence)$", re.MULTILINE | re.DOTALL)
NEEDS, NOT_RUN = "# needs: ", "# not run: "  # how a block begins that other packages, or more than a page, must run


class Block(NamedTuple):
    """A fenced block. ``line``: of its first line of code in the page, from 1."""

    page: Path
    line: int
    language: str
    code: str


def blocks(page: Path, *languages: str) -> Iterator[Block]:
    """The fenced blocks of a page in these languages."""
    text = page.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        if found["language"] in languages:
            yield Block(page, text.count("\n", 0, found.start()) + 2, found["language"], found["code"])


def runnable(page: Path) -> list[Block]:
    """The Python that runs as it stands there, in order."""
    return [block for block in blocks(page, "python") if not block.code.startswith((NEEDS, NOT_RUN))]


def run(block: Block, names: dict[str, object]) -> str:
    """Run a block with the names that earlier ones left; returns what it prints. A traceback names the page's line."""
    source = "\n" * (block.line - 1) + block.code
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(source, str(block.page), "exec"), names)
    return printed.getvalue()


@cache
def outputs(page: Path) -> tuple[tuple[int, str], ...]:
    """(line, what it prints) of every block that runs, in order; in a folder of their own."""
    names: dict[str, object] = {"__name__": "page"}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        return tuple((block.line, run(block, names)) for block in runnable(page))


def printed_before(page: Path, line: int) -> str:
    """What the last block before a line of the page prints; empty without one."""
    return next((printed for at, printed in reversed(outputs(page)) if at < line), "").rstrip()

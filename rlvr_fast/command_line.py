"""What the commands share: exit codes, errors without a traceback, extras, progress on stderr and strict JSON."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.progress import Progress, ProgressColumn
from typer.core import TyperGroup

from rlvr_fast.strict_json import plain

FOUND_BAD, BAD_USAGE, INTERRUPTED = 1, 2, 130
EXIT_CODES = ("Exit codes: 0 all is well; 1 the command worked and found something bad, which its --help names; "
              "2 it could not work: options, a file that is missing, unreadable or unwritable, a missing package, too "
              "little memory; 130 interrupted.")

# Command -> the modules it needs beyond the package's own requirements, and the extra that brings them.
NEEDS: dict[str, tuple[tuple[str, ...], str]] = {
    "doctor": ((), ""),
    "analyze": ((), ""),
    "profile": ((), ""),
    "demo": (("matplotlib",), "demo"),
    "simulate": (("matplotlib",), "simulate"),
    "report": (("plotly", "jinja2"), "report"),
    "bench": (("pytest", "pytest_benchmark"), "bench"),
}


class Commands(TyperGroup):
    """Commands whose errors become one line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # the reader of our output has left, as head does: typer ends the process quietly
        except (ValueError, TypeError, OSError, ImportError) as error:
            fail(error)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            fail(f"not enough memory: {str(error).partition(chr(10))[0] or type(error).__name__}")
        except KeyboardInterrupt:
            typer.echo("rlvr-fast: interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None


def fail(error: object) -> NoReturn:
    """The message on stderr, exit code 2."""
    typer.echo(f"rlvr-fast: {error}", err=True)
    raise typer.Exit(BAD_USAGE)


def out_of_memory(error: Exception) -> bool:
    """Whether Python, torch on a GPU or torch on the CPU says so; torch has no class of its own for the last."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or \
        "can't allocate memory" in str(error)


def missing(command: str) -> tuple[str, ...]:
    """Modules that ``command`` needs and that are not installed."""
    modules, _ = NEEDS[command]
    return tuple(module for module in modules if importlib.util.find_spec(module) is None)


def pip_line(extra: str) -> str:
    return f"pip install 'rlvr-fast[{extra}]'"


def require(command: str) -> None:
    """Raise ImportError with the line for pip, before anything runs, if ``command`` lacks a module."""
    absent = missing(command)
    if absent:
        raise ImportError(f"{command} needs {' and '.join(absent)}: {pip_line(NEEDS[command][1])}")


def check_file(option: str, path: str | Path | None) -> None:
    """Raise ValueError naming ``option`` if no file can be written at ``path``; None and "-" are no paths."""
    if path in (None, "-"):
        return
    file = Path(str(path)).absolute()
    if not file.parent.is_dir() or file.is_dir():
        raise ValueError(f"{option} must name a file in an existing folder, got {path}")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ValueError(f"{option} names a file that cannot be written: {path}")


def writable_folder(path: Path) -> Path:
    """``path``, made if missing.

    Raises:
        OSError: naming it, if it cannot be made or written into. Better now than after the work.
    """
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):
        return path


def progress(*columns: ProgressColumn | str, quiet: bool = False) -> Progress:
    """A transient bar on stderr; nothing where stderr is no terminal, or if ``quiet``."""
    console = Console(stderr=True)
    return Progress(*columns, transient=True, console=console, disable=quiet or not console.is_terminal)


def print_json(content: object) -> None:
    """``content`` and nothing else on stdout; a number that is not finite is null."""
    sys.stdout.write(as_json(content))


def as_json(content: object) -> str:
    return json.dumps(plain(content), indent=1, allow_nan=False) + "\n"

"""Which files of a run hold what, and the rows in them: JSONL, trainer_state.json, details.json."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlvr_fast.analyze.files import READERS, json_lines, natural

METRICS = ("metrics.jsonl", "steps.jsonl", "metrics.jsonl.gz", "steps.jsonl.gz")
STATE, DETAILS = "trainer_state.json", "details.json"
LINES = (".jsonl", ".ndjson", ".jsonl.gz")


@dataclass(frozen=True)
class RunFiles:
    """What was found: files of steps in reading order, a rollout dump or None, details or None; other dumps, unread."""

    steps: tuple[Path, ...]
    rollouts: Path | None
    details: Path | None
    unread: tuple[Path, ...]


def find_files(run: str | Path, rollouts: str | os.PathLike[str] | None = None) -> RunFiles:
    """The files of a run that is a folder or a single file.

    Raises:
        ValueError: if nothing is there, or nothing that a report can be made of.
    """
    run = Path(run)
    if not run.exists():
        raise ValueError(f"{run} does not exist")
    folder = run if run.is_dir() else run.parent
    steps = _steps_of(folder) if run.is_dir() else () if _is_rollouts(run) else (run,)
    if not run.is_dir() and run.suffix != ".json" and not run.name.endswith(LINES) and not _is_rollouts(run):
        raise ValueError(f"{run} must be a folder, a {STATE}, or end in one of {', '.join(LINES)}")
    if not run.is_dir() and _is_rollouts(run):
        beside = [run]
    else:
        beside = sorted((path for path in folder.iterdir() if _is_rollouts(path)), key=lambda path: natural(path.name))
    dump = Path(rollouts) if rollouts is not None else (beside[0] if beside else None)
    details = folder / DETAILS
    found = RunFiles(steps, dump, details if details.is_file() else None, tuple(beside[1:] if rollouts is None else ()))
    if not steps and found.rollouts is None and found.details is None:
        raise ValueError(f"{run} holds none of {', '.join(METRICS[:2])}, {STATE}, {DETAILS}, rollouts*.jsonl; write "
                         "them with rf.RunLog or name a file")
    return found


def _steps_of(folder: Path) -> tuple[Path, ...]:
    for name in (*METRICS, STATE):
        if (folder / name).is_file():
            return (folder / name,)
    saved = [path for path in folder.glob(f"checkpoint-*/{STATE}") if path.parent.name[11:].isdigit()]
    if saved:  # the last one holds the log of all that came before it
        return (max(saved, key=lambda path: int(path.parent.name[11:])),)
    lines = (path for path in folder.iterdir() if path.name.endswith(LINES) and not _is_rollouts(path))
    return tuple(sorted(lines, key=lambda path: natural(path.name)))


def _is_rollouts(path: Path) -> bool:
    return path.name.startswith("rollouts") and (path.is_dir() or path.name.lower().endswith(tuple(READERS)))


def rows_of(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """The steps of one file. A last line that is cut off, as of a run that is being written, is left out with a note.

    Raises:
        ValueError: naming the file and the line of what cannot be read.
    """
    if path.stat().st_size == 0:
        notes.append(f"{path.name} is empty.")
        return
    if path.suffix == ".json":
        yield from _log_history(path)
        return
    cut_off = f"The last line of {path.name} is cut off and left out."
    yield from json_lines(path, cut_off=lambda: notes.append(cut_off))


def _log_history(path: Path) -> list[dict[str, Any]]:
    state = read_json(path)
    history = state.get("log_history") if isinstance(state, dict) else None
    if not isinstance(history, list) or not all(isinstance(row, dict) for row in history):
        raise ValueError(f"{path} must be a trainer_state.json: an object with a list of objects, 'log_history'")
    return history


def read_json(path: Path) -> Any:
    """Raises ValueError naming the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no JSON, or cut off ({error})") from None

"""Finished runs, one line of JSON each, so that an interrupted comparison goes on where it stopped."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from curriculum.training import Settings


class Runs:
    """The runs with given settings in a file of runs; those with others are left alone."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path.exists() else []
        known = [json.loads(line) for line in lines if line.endswith("}")]  # the last may have been cut off
        self._runs = {(run["seed"], run["arm"]): run for run in known if run["settings"] == asdict(settings)}

    def __contains__(self, key: tuple[int, str]) -> bool:
        return key in self._runs

    def add(self, run: dict) -> None:
        run = finite(run)
        with self._path.open("a") as file:
            file.write(json.dumps(run) + "\n")
        self._runs[run["seed"], run["arm"]] = run

    def of(self, seeds: Iterable[int]) -> list[dict]:
        seeds = set(seeds)
        return [run for (seed, _), run in sorted(self._runs.items()) if seed in seeds]


def finite(value: Any) -> Any:
    """With None for what is no finite number, as JSON knows none other, and strings as keys."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

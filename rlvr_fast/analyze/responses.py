"""A rollout dump as arrays with one entry per response: what the rows say, checked row by row."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlvr_fast.analyze.columns import Columns, find_columns
from rlvr_fast.analyze.files import Row, rollout_files, rows_of

MANY = 10_000  # rows between two reports of progress


@dataclass(frozen=True, eq=False)
class Responses:
    """R responses in file order; those without a reward are left out and counted.

    Attributes:
        prompt_names: the P distinct prompts as they came, in order of appearance.
        prompt: [R] int64 index into them.
        reward: [R] float64.
        step: [R] int64, 0 where the dump has no steps.
        length: [R] float64 or None, in ``length_unit`` ("tokens" or "characters").
        advantage: [R] float64 or None.
        logp, logp_after: [R] float64 or None, summed over a response's tokens.
        difficulty: [R] float64 or None.
        unscored: rows without a reward (null or NaN).
        columns: where each figure was found.
    """

    prompt_names: list[str]
    prompt: torch.Tensor
    reward: torch.Tensor
    step: torch.Tensor
    length: torch.Tensor | None
    length_unit: str
    advantage: torch.Tensor | None
    logp: torch.Tensor | None
    logp_after: torch.Tensor | None
    difficulty: torch.Tensor | None
    unscored: int
    columns: Columns


def read_responses(path: str | Path, given: Mapping[str, str | None] | None = None,
                   progress: Callable[[int], None] = lambda rows: None) -> Responses:
    """Read a file or a folder.

    Args:
        path: see ``files.rollout_files``.
        given: column names by role, overriding ``columns.KNOWN``.
        progress: called with the number of rows read, now and then.

    Raises:
        ValueError: naming file and row of what is missing or malformed; if there is no row.
    """
    collected: _Collector | None = None
    for file in rollout_files(path):
        start = collected.n_rows if collected else 0
        for number, row in enumerate(_rows(file, collected), 1):
            if collected is None:
                collected = _Collector(find_columns(list(row), given or {}, str(file)))
            collected.add(row, file, number)
            if (start + number) % MANY == 0:
                progress(start + number)
    if collected is None:
        raise ValueError(f"{path} holds no rows")
    return collected.finish()


def _rows(file: Path, collected: _Collector | None) -> Iterable[Row]:
    return rows_of(file, None if collected is None else collected.columns.names)


class _Collector:
    """Rows into growing arrays of numbers; texts are only ever measured."""

    def __init__(self, columns: Columns) -> None:
        self.columns, self.n_rows, self.unscored = columns, 0, 0
        self.prompts: dict[str, int] = {}
        self.unit = ""
        self.prompt, self.step = array("q"), array("q")
        self.numbers = {role: array("d") for role in ("reward", "length", "advantage", "logp", "logp_after",
                                                      "difficulty") if getattr(columns, role) is not None}

    def add(self, row: Row, file: Path, number: int) -> None:
        self.n_rows += 1
        try:
            reward = _number("reward", self._value(row, "reward"))
            if reward is None or math.isnan(reward):
                self.unscored += 1
                return
            if math.isinf(reward):
                raise ValueError("the reward is infinite")
            name = _name(self._value(row, "prompt"))
            values = {"reward": reward}
            for role in self.numbers:
                if role == "length":
                    values[role] = self._length(self._value(row, role))
                elif role != "reward":
                    values[role] = self._figure(role, self._value(row, role))
            step = 0 if self.columns.step is None else _whole("step", self._value(row, "step"))
            counts = {role: len(found) for role in ("logp", "logp_after")
                      if role in self.numbers and isinstance(found := row[getattr(self.columns, role)], list)}
            if len(set(counts.values())) > 1:
                raise ValueError(f"logp has {counts['logp']} tokens and logp_after {counts['logp_after']}")
        except (ValueError, OverflowError) as error:  # an integer that no float can hold
            raise ValueError(f"{file}, row {number}: {error}") from None
        self.prompt.append(self.prompts.setdefault(name, len(self.prompts)))
        self.step.append(step)
        for role, value in values.items():
            self.numbers[role].append(value)

    def finish(self) -> Responses:
        tensors = {role: _tensor(values) for role, values in self.numbers.items()}
        optional = {role: tensors.get(role) for role in ("length", "advantage", "logp", "logp_after", "difficulty")}
        return Responses(list(self.prompts), _tensor(self.prompt), tensors["reward"], _tensor(self.step),
                         length_unit=self.unit or "tokens", unscored=self.unscored, columns=self.columns, **optional)

    def _value(self, row: Row, role: str) -> object:
        name = getattr(self.columns, role)
        if name not in row:
            raise ValueError(f"no {name!r}, which the first row has; rows of one run must have the same columns")
        return row[name]

    def _length(self, value: object) -> float:
        unit = "characters" if isinstance(value, str) else "tokens"
        if self.unit not in ("", unit):
            raise ValueError(f"the length is in {unit}, in rows before it was in {self.unit}")
        self.unit = unit
        if isinstance(value, str | list):
            return float(len(value))
        return self._figure("length", value)

    @staticmethod
    def _figure(role: str, value: object) -> float:
        """A finite number, or the sum of a list of them (one per token)."""
        tokens = value if isinstance(value, list) and all(isinstance(token, int | float) for token in value) else None
        total = _number(role, value) if tokens is None else math.fsum(tokens)
        if total is None or not math.isfinite(total):
            raise ValueError(f"{role} must be a finite number{' or a list of them' if 'logp' in role else ''}, "
                             f"got {_short(value)}")
        if "logp" in role and max([total] if tokens is None else tokens, default=0) > 0:
            raise ValueError(f"{role} must be log-probs, never above 0, got {_short(value)}")
        return total


def _tensor(values: array[Any]) -> torch.Tensor:
    return torch.from_numpy(np.array(values))


def _number(role: str, value: object) -> float | None:
    """A number or a bool as float, None as None."""
    if value is None or isinstance(value, bool | int | float):
        return None if value is None else float(value)
    raise ValueError(f"{role} must be a number, got {_short(value)}")


def _whole(role: str, value: object) -> int:
    number = _number(role, value)
    if number is None or not number.is_integer() or abs(number) > 2**53:
        raise ValueError(f"{role} must be a whole number, got {_short(value)}")
    return int(number)


def _name(value: object) -> str:
    """A prompt as it came: text, number, or a list of chat messages."""
    if value is None:
        raise ValueError("the prompt is null")
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

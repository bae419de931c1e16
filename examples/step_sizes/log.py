"""The log of a run: what was measured, before any estimator made something of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from step_sizes.settings import RunSettings


@dataclass(frozen=True)
class Evidence:
    """Rollouts where they were sampled: log-ratios along an update at some multiples of it.

    Attributes:
        multiples: M of them.
        log_ratios: [M, R] float32, responses of one prompt side by side.
        correct: [R] bool.
        group_size: responses per prompt.
    """

    multiples: Sequence[float]
    log_ratios: torch.Tensor
    correct: torch.Tensor
    group_size: int


@dataclass(frozen=True)
class StepLog:
    """One step.

    Attributes:
        rate, norm: learning rate of the step and Euclidean norm of its update.
        before, after: exact success rate of the held-out problems.
        truth: the same at some multiples of the update, {multiple: success}; empty where it was not evaluated.
        start: held-out rollouts of the policy before the step; None in a run with a guard.
        end: the training batch sampled after it, which is the next step's; None in a run with a guard.
        guard: the guard's metrics for this step; empty without a guard.
    """

    step: int
    rate: float
    norm: float
    before: float
    after: float
    truth: dict[float, float]
    start: Evidence | None
    end: Evidence | None
    guard: dict[str, float]


@dataclass(frozen=True)
class RunLog:
    settings: RunSettings
    steps: Sequence[StepLog]


def write_log(path: Path, log: RunLog) -> None:
    """The file appears only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save({"settings": asdict(log.settings), "steps": [asdict(step) for step in log.steps]}, partial)
    partial.rename(path)


def read_log(path: Path) -> RunLog:
    content = torch.load(path)
    return RunLog(RunSettings(**content["settings"]), [_step(fields) for fields in content["steps"]])


def _step(fields: dict) -> StepLog:
    evidence = {name: None if fields[name] is None else Evidence(**fields[name]) for name in ("start", "end")}
    return StepLog(**fields | evidence)

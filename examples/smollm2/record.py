"""What one step leaves behind: the forecast, what came of it, and what it cost. One line of steps.jsonl."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import rlvr_fast as rf
from rlvr_fast.demo.records import Forecast, log_odds
from rlvr_fast.step.scan import crossing

TRAINING = ("sampling", "training")  # sections of the clock
ANALYSIS = ("gap", "head gap", "held-out rollouts", "scan", "end slope")  # its "truth" belongs to neither


@dataclass(frozen=True)
class Scan:
    """The update at several multiples, on held-out rollouts, before it was applied: one entry per multiple.

    Attributes:
        gain, gain_stderr: predicted change of the success rate. true_gain: the exact one.
        ess: effective share of the rollouts.
        mean_ratio: 1 if the rollouts also stand for what the updated policy would answer; less if it would say things
            that are not among them.
        reach: the largest multiple up to which the effective share suffices; 0 if there is none.
        true_break_even: where the exact success rate is back at its start; inf if beyond the scan.
    """

    multiples: tuple[float, ...]
    gain: tuple[float, ...]
    gain_stderr: tuple[float, ...]
    true_gain: tuple[float, ...]
    ess: tuple[float, ...]
    mean_ratio: tuple[float, ...]
    reach: float
    true_break_even: float
    warnings: tuple[str, ...]

    @classmethod
    def of(cls, curve: rf.StepCurve, truth: list[float]) -> Scan:
        """``truth``: the exact success rate at multiple 0 and at those of the curve."""
        true_gain = torch.tensor(truth[1:], dtype=torch.float64) - truth[0]
        reached = int((curve.ess_fraction >= curve.ess_floor).long().cumprod(0).sum())
        return cls(curve.multiples, tuple(curve.success_gain.tolist()), tuple(curve.success_gain_stderr.tolist()),
                   tuple(true_gain.tolist()), tuple(curve.ess_fraction.tolist()),
                   tuple(measure.mean_ratio.item() for measure in curve.measures),
                   curve.multiples[reached - 1] if reached else 0.0,
                   crossing(curve.multiples, true_gain).item(), curve.warnings)


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step.

    Attributes:
        forecast: known before the update was applied; gap and mixed groups of the training rollouts at level "hidden",
            everything else from the held-out rollouts.
        training_success, entropy: success rate and nats per token of the training rollouts.
        head_gap, head_gap_stderr: mean squared gap norm at level "head"; None where it was not measured.
        end_alignment, end_alignment_stderr: mean ⟨update, gap⟩ where the step ended, from rollouts sampled there. The
            forecast holds the same for its start. Positive at both ends: the step stopped short of its peak.
        counted_gain, counted_gain_stderr: log-odds gain of the held-out success rate by counting right answers in
            independent rollouts before and after; the error is the noise of sampling at fixed prompts.
        exact_before, exact_after: held-out success rate, without sampling.
        seconds: by section of the clock.
    """

    step: int
    forecast: Forecast
    scan: Scan
    training_success: float
    entropy: float
    head_gap: float | None
    head_gap_stderr: float | None
    end_alignment: float
    end_alignment_stderr: float
    counted_gain: float
    counted_gain_stderr: float
    exact_before: float
    exact_after: float
    seconds: dict[str, float]

    @classmethod
    def of(cls, step: int, learning_rate: float, rollouts: rf.Rollouts, entropy: torch.Tensor, gap: rf.Gap,
           head_gap: rf.Gap | None, before: rf.Rollouts, curve: rf.StepCurve, truth: list[float], after: rf.Rollouts,
           end: rf.StepCurve, seconds: dict[str, float]) -> StepRecord:
        return cls(step, Forecast.of(learning_rate, gap, curve), Scan.of(curve, truth),
                   rollouts.correct.double().mean().item(), entropy.mean().item(), *_gap_norm_sq(head_gap),
                   *_alignment(end), *_counted_gain(before, after), truth[0], truth[1 + curve.multiples.index(1)],
                   dict(seconds))

    @property
    def exact_gain(self) -> float:
        """Exact log-odds gain of the step."""
        return log_odds(self.exact_after) - log_odds(self.exact_before)

    @property
    def training_seconds(self) -> float:
        return sum(self.seconds[section] for section in TRAINING)

    @property
    def analysis_seconds(self) -> float:
        return sum(self.seconds[section] for section in ANALYSIS)


def _gap_norm_sq(gap: rf.Gap | None) -> tuple[float | None, float | None]:
    if gap is None:
        return None, None
    figures = gap.summary()
    return figures["rlvr/gap/norm_sq"], figures["rlvr/gap/norm_sq_stderr"]


def _alignment(curve: rf.StepCurve) -> tuple[float, float]:
    """Mean over prompts, and its standard error, from the shortest multiple."""
    per_prompt = curve.measures[0].alignment / curve.multiples[0]
    per_prompt = per_prompt[per_prompt.isfinite()]
    return per_prompt.mean().item(), (per_prompt.std() / len(per_prompt) ** 0.5).item()


def _counted_gain(before: rf.Rollouts, after: rf.Rollouts) -> tuple[float, float]:
    """Difference in log-odds of two counted success rates, and its standard error by the delta method."""
    (start, start_error), (end, end_error) = _counted(before), _counted(after)
    return log_odds(end) - log_odds(start), math.hypot(start_error, end_error)


def _counted(rollouts: rf.Rollouts) -> tuple[float, float]:
    """Success rate of equally often sampled prompts, and the standard error of its log-odds."""
    correct = rollouts.correct.double().view(rollouts.n_prompts, -1)
    rate = correct.mean().item()
    error = (correct.var(dim=1) / correct.shape[1]).sum().sqrt().item() / rollouts.n_prompts
    return rate, error / (rate * (1 - rate)) if 0 < rate < 1 else math.nan


def write_jsonl(records: Iterable[StepRecord], path: Path) -> None:
    """One JSON object per step; NaN, and a break-even beyond the scan, become null."""
    path.write_text("".join(json.dumps(_finite(asdict(record))) + "\n" for record in records), encoding="utf-8")


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

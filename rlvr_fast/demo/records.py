"""What is written down about a step: the forecast, made before the update is applied, and the outcome, after it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import rlvr_fast as rf
from rlvr_fast.strict_json import plain


@dataclass(frozen=True)
class Forecast:
    """Known before the update is applied.

    ``gap`` figures are means over the prompts of the training batch with both classes; the rest comes from rollouts
    that had no part in the update. Gains and break-even are of the success rate pooled over problems; ``alignment`` is
    the slope of the log-odds along the proposed update, mean over the problems with both classes.
    ``fraction_of_break_even`` stops at the ends of the scanned range: 1/largest multiple where break-even lies beyond
    it, 1/smallest where even that one loses.
    """

    learning_rate: float
    mixed_share: float
    gap_norm_sq: float
    gap_norm_sq_stderr: float
    alignment: float
    alignment_stderr: float
    success: float
    predicted_success_gain: float
    predicted_success_gain_stderr: float
    predicted_log_odds_gain: float
    predicted_log_odds_gain_stderr: float
    break_even: float
    fraction_of_break_even: float
    effective_share: float
    verdict: str
    reason: str = ""  # why it is "undetermined"

    @classmethod
    def of(cls, learning_rate: float, gap: rf.Gap, scan: rf.StepCurve) -> Forecast:
        """``scan`` must hold multiple 1, the step as proposed; its smallest multiple gives the starting slope."""
        gap_summary = gap.summary()
        slope = scan.measures[0].alignment / scan.multiples[0]
        slope = slope[slope.isfinite()]
        proposed = scan.multiples.index(1)
        measure = scan.measures[proposed]
        break_even = scan.success_break_even.item()
        return cls(
            learning_rate=learning_rate,
            mixed_share=gap_summary["rlvr/group/frac_mixed"],
            gap_norm_sq=gap_summary["rlvr/gap/norm_sq"],
            gap_norm_sq_stderr=gap_summary["rlvr/gap/norm_sq_stderr"],
            alignment=slope.mean().item(),
            alignment_stderr=(slope.std() / len(slope) ** 0.5).item(),
            success=measure.success_before.item(),
            predicted_success_gain=measure.success_gain.item(),
            predicted_success_gain_stderr=measure.success_gain_stderr.item(),
            predicted_log_odds_gain=measure.success_log_odds_gain.item(),
            predicted_log_odds_gain_stderr=measure.success_log_odds_gain_stderr.item(),
            break_even=break_even,
            fraction_of_break_even=1 / min(max(break_even, scan.multiples[0]), scan.multiples[-1]),
            effective_share=measure.ess_fraction.item(),
            verdict=scan.verdict,
            reason=scan.reason,
        )


@dataclass(frozen=True)
class StepRecord:
    """One step of one run; ``exact`` success rates are computed without sampling, over the held-out problems."""

    run: str
    step: int
    forecast: Forecast
    exact_before: float
    exact_after: float

    @property
    def realised_success_gain(self) -> float:
        return self.exact_after - self.exact_before

    @property
    def realised_log_odds_gain(self) -> float:
        return log_odds(self.exact_after) - log_odds(self.exact_before)

    def flat(self) -> dict[str, float | int | str]:
        return {"run": self.run, "step": self.step, **asdict(self.forecast),
                "exact_before": self.exact_before, "exact_after": self.exact_after,
                "realised_success_gain": self.realised_success_gain,
                "realised_log_odds_gain": self.realised_log_odds_gain}


def log_odds(success: float) -> float:
    """NaN where there are none: an unbiased estimate of a success rate can lie outside (0, 1)."""
    return math.log(success / (1 - success)) if 0 < success < 1 else math.nan


def write_jsonl(path: Path, records: Iterable[StepRecord]) -> None:
    """One line per step; what is not a finite number is null, as JSON knows no infinity."""
    path.write_text("".join(f"{json.dumps(plain(record.flat()))}\n" for record in records))


@dataclass(frozen=True)
class Run:
    """All steps of one run."""

    name: str
    learning_rate: float
    start: float
    records: Sequence[StepRecord]

"""What two runs showed, in plain language. Every sentence is computed from the records, also when it is bad news."""

from __future__ import annotations

from collections.abc import Sequence

from rlvr_fast.demo.records import Run, StepRecord

COLLAPSE = 0.5
"""A run has collapsed once its success rate is below this share of what it started with."""


def collapse_step(run: Run) -> int | None:
    """The first step that left the run collapsed."""
    return next((r.step for r in run.records if r.exact_after < COLLAPSE * run.start), None)


def announcements(run: Run) -> list[StepRecord]:
    """Steps that were called an overshoot, and then applied all the same."""
    return [record for record in run.records if record.forecast.verdict == "overshoot"]


def summarise(safe: Run, large: Run) -> list[str]:
    """Sentences about the two runs and about how far the forecasts held."""
    return [_safe(safe), _large(large), *_forecasts([*safe.records, *large.records])]


def _safe(run: Run) -> str:
    end, called = run.records[-1].exact_after, announcements(run)
    moved = "climbed" if end > run.start else "fell"
    return (f"Learning rate {run.learning_rate:g}: success {moved} from {run.start:.1%} to {end:.1%} in "
            f"{len(run.records)} steps. {_called(called)}.")


def _large(run: Run) -> str:
    end, called, collapsed = run.records[-1].exact_after, announcements(run), collapse_step(run)
    start = f"Learning rate {run.learning_rate:g}: success went from {run.start:.1%} to {end:.1%}"
    if collapsed is None:
        return f"{start} and never fell below half of its start: this run shows no collapse. {_called(called)}."
    start = f"{start} and was below half of its start after step {collapsed}"
    before = [record for record in called if record.step <= collapsed]
    if not before:
        return f"{start}; NO step up to then had been called an overshoot: the collapse was not announced."
    drop = run.start - run.records[collapsed].exact_after
    return (f"{start}. The first overshoot was announced before step {before[0].step} was applied, at a success rate "
            f"of {before[0].exact_before:.1%}. Up to the collapse, which cost {_points(drop)} in all, "
            f"{_called(before)}.")


def _called(steps: Sequence[StepRecord]) -> str:
    change = sum(record.realised_success_gain for record in steps)
    effect = f", applied all the same, and {'lost' if change < 0 else 'gained'} {_points(abs(change))}" if steps else ""
    return f"{_count(len(steps), 'step was', 'steps were')} called an overshoot{effect}"


def _points(share: float) -> str:
    return f"{100 * share:.1f} points"


def _forecasts(records: Sequence[StepRecord]) -> list[str]:
    called = announcements(Run("", 0.0, 0.0, records))
    cleared = [record for record in records if record.forecast.verdict in ("safe", "near")]
    lost = sum(record.realised_success_gain < 0 for record in called)
    gained = sum(record.realised_success_gain > 0 for record in cleared)
    within = sum(abs(r.realised_success_gain - r.forecast.predicted_success_gain)
                 <= 2 * r.forecast.predicted_success_gain_stderr for r in records)
    return [
        f"Of {_count(len(called), 'step', 'steps')} called an overshoot, {lost} lost success; of "
        f"{_count(len(cleared), 'step', 'steps')} called safe or near, {gained} gained; for "
        f"{_count(len(records) - len(called) - len(cleared), 'step', 'steps')} the rollouts could not tell.",
        f"The realised gain was within two standard errors of the predicted one at {within} of {len(records)} steps.",
    ]


def _count(n: int, one: str, many: str) -> str:
    return f"{n} {one if n == 1 else many}"

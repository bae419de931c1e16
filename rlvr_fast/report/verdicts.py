"""Is the step safe, since when: a verdict for every step, and the sentences at the top of the report."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from rlvr_fast.report.load import Column, Series
from rlvr_fast.report.section import text
from rlvr_fast.step.reading import VERDICT_CODES

Z95, MARGIN = 1.96, 2.0  # as in rf.StepMeter
RECENT = 10
CELLS = 160  # of the strip of verdicts
SMOOTH = 3  # steps
SEVERITY = ("undetermined", "safe", "near", "overshoot")
CODES = {code: verdict for verdict, code in VERDICT_CODES.items()}
MEANING = {
    "safe": "The last step stopped well short of its break-even.",
    "near": "The last step still helped, but more than half of its break-even was used up.",
    "overshoot": "The last step went past its break-even: it cost success.",
    "undetermined": "The measurements cannot tell whether the last step helped.",
}
NO_VERDICT = "No step was measured: see below what to log."


@dataclass(frozen=True)
class Cell:
    """Some consecutive steps of the strip, shown as the worst verdict among them."""

    first: int
    last: int
    verdict: str


@dataclass(frozen=True)
class Headline:
    """What one run says.

    ``word``: the last verdict, or "collapsed": then nothing is left to measure, which would read as undetermined.
    """

    run: str
    verdict: str
    word: str
    sentence: str
    facts: tuple[str, ...]
    cells: tuple[Cell, ...]

    @property
    def thinned(self) -> bool:
        """Whether a cell stands for more than one step."""
        return len(self.cells) == CELLS and any(cell.first != cell.last for cell in self.cells)


def fractions(series: Series) -> Column | None:
    """Step over break-even with its interval: 1 is break-even, above it the step loses. None if nothing tells."""
    even, given, rate, bound = map(series.get, ("break_even", "fraction", "learning_rate", "break_even_rate"))
    n = len(series.step)
    value, low, high = (np.full(n, math.nan) for _ in range(3))
    sources: Counter[str] = Counter()
    if given is not None:
        value, sources = given.value.copy(), Counter(given.sources)
    with np.errstate(divide="ignore", invalid="ignore"):
        if even is not None:
            measured = np.where(even.value >= 0, 1 / np.abs(even.value), math.nan)
            ends = [np.where(np.isfinite(even.stderr), even.value + sign * Z95 * even.stderr, end)
                    for sign, end in ((1, even.high), (-1, even.low))]
            known = np.isfinite(even.value) | np.isposinf(even.value)
            value = np.where(known, measured, value)
            low, high = (np.where(known & ~np.isnan(end), 1 / np.maximum(end, 0), math.nan) for end in ends)
            sources.update(even.sources)
        if rate is not None and bound is not None:
            value = np.where(np.isnan(value) & (bound.value > 0), rate.value / bound.value, value)
            sources.update(bound.sources)
    return None if np.isnan(value).all() else Column(value, np.full(n, math.nan), low, high, sources)


def judge(series: Series) -> tuple[list[str | None], list[str | None], str]:
    """Verdict and reason of each step (None where nothing was measured), and what they rest on.

    Logged verdicts come first. Without them the rule of ``rf.StepMeter`` is applied to the interval of the break-even,
    else the sign of the gain if it stands out of its error, else the point estimate alone.
    """
    logged = _logged(series)
    if any(logged):
        return logged, list(series.reason), "verdicts as logged"
    share, gain = fractions(series), series.get("gain")
    verdicts: list[str | None] = [None] * len(series.step)
    reasons: list[str | None] = [None] * len(series.step)
    basis: set[str] = set()
    for at in range(len(verdicts)):
        point, low, high = (math.nan,) * 3 if share is None else (share.value[at], share.low[at], share.high[at])
        delta, error = (math.nan, math.nan) if gain is None else (gain.value[at], gain.stderr[at])
        if not (math.isnan(low) or math.isnan(high)):
            basis.add("the interval of the break-even")
            verdicts[at] = "overshoot" if low > 1 else "near" if 1 / MARGIN <= high < 1 else \
                "safe" if high < 1 / MARGIN else "undetermined"
            reasons[at] = "within error" if verdicts[at] == "undetermined" else None
        elif not (math.isnan(delta) or math.isnan(error)):
            basis.add("the gain and its error")
            lost, won = delta + Z95 * error < 0, delta - Z95 * error > 0
            verdicts[at] = "overshoot" if lost else "undetermined" if not won else \
                "safe" if point <= 1 / MARGIN else "near"
            reasons[at] = None if lost or won else "within error"
        elif not math.isnan(point):
            basis.add("the break-even alone, without an error")
            verdicts[at] = "overshoot" if point > 1 else "near" if point > 1 / MARGIN else "safe"
            reasons[at] = "point estimate"
    return verdicts, reasons, f"verdicts by {' and '.join(sorted(basis))}" if basis else ""


def _logged(series: Series) -> list[str | None]:
    codes = series.get("verdict_code")
    return [text.lower() if text is not None and text.lower() in VERDICT_CODES else
            None if codes is None else CODES.get(codes.value[at]) for at, text in enumerate(series.verdict)]


def headline(series: Series) -> Headline:
    """The sentences at the top for one run."""
    verdicts, reasons, basis = judge(series)
    share = fractions(series)
    judged = [at for at, verdict in enumerate(verdicts) if verdict is not None]
    collapse = _collapse(series)
    if not judged:
        return Headline(series.name, "undetermined", "collapsed" if collapse else "undetermined",
                        collapse or "Nothing in this log tells whether the steps are safe.", (NO_VERDICT,), ())
    last = judged[-1]
    verdict = verdicts[last]
    assert verdict is not None  # since it was judged
    since = last
    for at in reversed(judged):
        if verdicts[at] != verdict:
            break
        since = at
    step = series.step
    length = judged.index(last) - judged.index(since) + 1
    before = verdicts[judged[judged.index(since) - 1]] if since != judged[0] else None
    facts = [f"{verdict.capitalize()} since step {step[since]}{', the first measured one' if before is None else ''} "
             f"({length:,} in a row){f'; {before} before' if before else ''}."]
    if verdict == "undetermined":
        facts.append(f"Reason: {text(reasons[last] or 'not logged')}.")
    recent = Counter(verdicts[at] for at in judged[-RECENT:])
    facts.append(f"Last {min(RECENT, len(judged))} measured steps: "
                 + ", ".join(f"{recent[name]} {name}" for name in reversed(SEVERITY) if recent[name]) + ".")
    over = [at for at in judged if verdicts[at] == "overshoot"]
    facts.append(f"{len(over):,} of {len(judged):,} measured steps overshot, the first one at step {step[over[0]]}."
                 if over else f"None of {len(judged):,} measured steps overshot.")
    if share is not None and not math.isnan(share.value[last]):
        facts.append(_how_far(float(share.value[last]), verdict))
    if last != len(step) - 1:
        facts.append(f"Steps after {step[last]} were not measured.")
    facts.append(_whom(series))
    facts.append(f"{basis.capitalize()}.")
    return Headline(series.name, verdict, "collapsed" if collapse else verdict, collapse or MEANING[verdict],
                    tuple(facts), _strip(step, verdicts, judged))


def _how_far(fraction: float, verdict: str) -> str:
    """Step over break-even in words; advice only where the measurement carries it."""
    size = "No multiple of the last step helped" if math.isinf(fraction) else \
        f"The last step was {fraction:.2g} times its break-even" if fraction > 1 else \
        f"The last step used {fraction:.0%} of its break-even"
    if verdict == "undetermined":
        return f"{size} by its best estimate, which its error does not bear out."
    if verdict == "overshoot" and 1 < fraction < math.inf:
        return f"{size}. By its parabola half a break-even gains most: scale the learning rate by about " \
               f"{0.5 / fraction:.2g}."
    return f"{size}."


def _whom(series: Series) -> str:
    """For which prompts the last reading by success rate speaks."""
    if not series.bins:
        return "For which prompts: not logged."
    by = {kind: [bin_range(one) for one in series.bins if bin_verdict(one) == kind] for kind in ("loses", "gains")}
    return (f"For which prompts: going on would help those with success {', '.join(by['gains']) or '(none)'}; those "
            f"with {', '.join(by['loses']) or '(none)'} are past their peak (step {series.bins_step}).")


def bin_verdict(one: Mapping[str, float]) -> str:
    """"gains" or "loses" if the slope at the end of the step stands out of its error."""
    error = Z95 * one.get("end_slope_stderr", math.nan)
    return "gains" if one["end_slope"] > error else "loses" if one["end_slope"] < -error else "undetermined"


def bin_range(one: Mapping[str, float]) -> str:
    return f"{one['low']:g} to {one['high']:g}"


def _collapse(series: Series) -> str:
    """Success at the end (mean of the last three steps) below half of the best three steps in a row."""
    column = series.get("exact_success") or series.get("success")
    if column is None or (known := np.isfinite(column.value)).sum() < 2 * SMOOTH:
        return ""
    smooth = np.convolve(column.value[known], np.full(SMOOTH, 1 / SMOOTH), "valid")
    best, end = smooth.max(), smooth[-1]
    step = series.step[known][smooth.argmax() + SMOOTH - 1]
    return f"Success has collapsed: {end:.1%} now, {best:.1%} around step {step}." if end < best / 2 else ""


def _strip(step: np.ndarray, verdicts: list[str | None], judged: list[int]) -> tuple[Cell, ...]:
    parts = np.array_split(np.array(judged), min(CELLS, len(judged)))
    return tuple(Cell(int(step[part[0]]), int(step[part[-1]]),
                      max((verdicts[at] for at in part), key=SEVERITY.index)) for part in parts)

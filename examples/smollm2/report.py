"""What the run shows while it goes on, and what it says at its end."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from rlvr_fast.demo.report import STYLES
from smollm2.record import StepRecord

BATCH = ("step", "success", "mixed groups", "entropy", "gap²", "seconds", "for analysis")
UPDATE = ("step", "alignment", "at its end", "predicted", "counted", "exact", "÷ b.-e.", "÷ exact", "verdict")
BATCH_LEGEND = ("Training rollouts: success rate, prompts with both classes, nats per token, mean squared norm of the "
                "gradient gap. The seconds of the step, and the share that the analysis took.")
UPDATE_LEGEND = (
    "The update, on held-out prompts: mean ⟨update, gap⟩ where it starts and where it ends; log-odds gain predicted "
    "before it was applied, counted in fresh rollouts after it, and exact from the right answers' probabilities; the "
    "step as a fraction of its break-even step, predicted and exact; the verdict beforehand. ±: one standard error; "
    "?: the effective sample is too small for it.")

MEANINGS = {"safe": "still gaining at twice its length", "near": "gaining, break-even perhaps within twice its length",
            "overshoot": "losing already", "undetermined": "not cleared, the rollouts cannot tell"}


class Report:
    """A live table, and above it one sentence per finished step."""

    def __init__(self) -> None:
        self.console = Console()
        self.records: list[StepRecord] = []
        self._phase = ""
        self._live = Live(get_renderable=self._render, console=self.console, refresh_per_second=2)

    def __enter__(self) -> Report:
        self._live.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self._phase = ""
        self._live.__exit__(*exception)

    def phase(self, name: str) -> None:
        """Show what goes on now."""
        self._phase = name

    def add(self, record: StepRecord) -> None:
        self.records.append(record)
        self.console.print(sentence(record), highlight=False)

    def _render(self) -> Group:
        return Group("", _table(BATCH, [batch_row(record) for record in self.records]), Text(BATCH_LEGEND, style="dim"),
                     "", _table(UPDATE, [update_row(record, _styled(record)) for record in self.records]),
                     Text(UPDATE_LEGEND, style="dim"), Text(self._phase and f"\nnow: {self._phase}", style="dim"))


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    for name in columns:
        table.add_column(name, justify="right")
    for cells in rows:
        table.add_row(*cells)
    return table


def batch_row(record: StepRecord) -> list[str]:
    """One cell per entry of ``BATCH``."""
    forecast, seconds = record.forecast, record.training_seconds + record.analysis_seconds
    return [str(record.step), f"{record.training_success:.2f}", f"{forecast.mixed_share:.0%}",
            f"{record.entropy:.2f}", _with_error(forecast.gap_norm_sq, forecast.gap_norm_sq_stderr, ".2f"),
            f"{seconds:.0f}", f"{record.analysis_seconds / seconds:.0%}"]


def update_row(record: StepRecord, verdict: str) -> list[str]:
    """One cell per entry of ``UPDATE``."""
    forecast, scan = record.forecast, record.scan
    return [str(record.step), _with_error(forecast.alignment, forecast.alignment_stderr),
            _with_error(record.end_alignment, record.end_alignment_stderr), _predicted(record),
            _with_error(record.counted_gain, record.counted_gain_stderr), f"{record.exact_gain:+.2f}",
            _fraction(forecast.break_even, scan.multiples[0], scan.reach),
            _fraction(scan.true_break_even, scan.multiples[0], scan.multiples[-1]), verdict]


def _predicted(record: StepRecord) -> str:
    doubt = " ?" if record.scan.reach < 1 else ""
    return _with_error(record.forecast.predicted_log_odds_gain, record.forecast.predicted_log_odds_gain_stderr) + doubt


def _with_error(value: float, stderr: float, spec: str = "+.2f") -> str:
    return "n/a" if math.isnan(value) else f"{value:{spec}} ± {stderr:.2f}"


def _fraction(break_even: float, shortest: float, longest: float) -> str:
    """The step over its break-even step, where that lies between the shortest and the longest multiple known."""
    if longest == 0:
        return "?"
    if break_even == 0:  # the shortest multiple lost already
        return f"> {1 / shortest:.2g}"
    return f"< {1 / longest:.2g}" if break_even > longest else f"{1 / break_even:.2g}"


def sentence(record: StepRecord) -> str:
    """One step in words, with rich markup."""
    text = (f"step {record.step}: judged {_styled(record)} beforehand, predicted log-odds gain {_predicted(record)}; "
            f"it came out at {record.exact_gain:+.2f}, held-out success {record.exact_before:.3f} → "
            f"{record.exact_after:.3f}")
    if record.scan.reach < 1:
        text += f"\n        (the rollouts can only speak for {record.scan.reach:g} of this step)"
    if record.head_gap is not None:
        text += (f"\n        (gap² of the lm_head weight, once: {record.head_gap:.0f} ± {record.head_gap_stderr:.0f}, "
                 f"in {record.seconds['head gap']:.2f} s)")
    return text


def _styled(record: StepRecord) -> str:
    return f"[{STYLES[record.forecast.verdict]}]{record.forecast.verdict}[/]"


def summary(records: list[StepRecord]) -> str:
    """The run in plain language, one paragraph per line; every number from the records."""
    n, first, last = len(records), records[0], records[-1]
    training, gap, analysis = (sum(values) for values in zip(
        *((record.training_seconds, record.seconds["gap"], record.analysis_seconds) for record in records),
        strict=True))
    reached = [record for record in records if record.scan.reach >= 1]
    agreed = sum(abs(record.forecast.predicted_log_odds_gain - record.exact_gain)
                 <= 2 * record.forecast.predicted_log_odds_gain_stderr
                 for record in reached)
    past_peak = sum(record.end_alignment < -2 * record.end_alignment_stderr for record in records)
    lines = [f"In {n} steps the exact success rate on held-out sums went from {first.exact_before:.3f} to "
             f"{last.exact_after:.3f}."]
    for verdict, meaning in MEANINGS.items():
        judged = [record for record in records if record.forecast.verdict == verdict]
        if judged:
            rose = sum(record.exact_gain > 0 for record in judged)
            lines.append(f"Judged {verdict} ({meaning}) before they were taken: {len(judged)}. Of these, {rose} raised "
                         f"the success rate and {len(judged) - rose} did not.")
    if reached:
        lines.append(f"Of {len(reached)} steps that the rollouts could speak for, the predicted log-odds gain was "
                     f"within two standard errors of the exact one in {agreed}.")
    lines += [
        f"Past their peak by two standard errors, seen from where they ended: {past_peak} of {n} updates.",
        f"The gap with its error took {gap / training:.1%} of the time of sampling and training. All analysis, with "
        f"its {len(first.scan.multiples)} trial steps and the held-out rollouts, took "
        f"{analysis / (analysis + training):.0%} of the steps' time.",
        "What the errors mean: those of the gap, over sampled responses; those of alignment and prediction, over "
        "held-out prompts, from rollouts that had no part in the update; those of counting, the noise of sampling at "
        "fixed prompts. None covers prompts unlike these. A prediction only knows the answers that were sampled: where "
        "few of them carry all the weight (effective share under 10 %), or the update moves the policy to answers that "
        "are not among them, it errs towards steps that are too long. One run shows that the measurements work, not "
        "how well GRPO does.",
    ]
    return "\n".join(lines)


def markdown(records: list[StepRecord]) -> str:
    """The tables and the summary as Markdown."""
    def table(columns, rows):
        lines = [columns, ["---:"] * len(columns), *rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    return "\n\n".join([
        table(BATCH, [batch_row(record) for record in records]), BATCH_LEGEND,
        table(UPDATE, [update_row(record, record.forecast.verdict) for record in records]), UPDATE_LEGEND,
        "\n".join(f"- {text}" for text in summary(records).splitlines())]) + "\n"

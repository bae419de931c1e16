"""Live output: one line per step, its left part before the update is applied and its right part after it."""

from __future__ import annotations

from typing import Protocol

from rich.console import Console
from rich.text import Text

from rlvr_fast.demo.records import Forecast, StepRecord

STYLES = {"safe": "green", "near": "yellow", "overshoot": "bold red", "undetermined": "dim"}
LEGEND = """\
success         exact, over problems that are never trained on; before the step and after it
mixed groups    prompts of the training batch with both correct and incorrect responses: the others have no gap
gap²            squared norm of the gradient gap in the space of the final hidden states, mean over those prompts
alignment       slope of the log-odds of success along the proposed update; like all that follows, from rollouts of
                held-out problems that had no part in the update, before it is applied
predicted       gain of the log-odds of success by the update; beside it, after the verdict, the gain that came
step / b.-e.    length of the update in units of its break-even, as far as the scan reaches
verdict         overshoot: past break-even, success will fall. safe, near: it will rise, with more or less room.
                undetermined: these rollouts cannot tell. Every update is applied, whatever the verdict."""
COLUMNS = "{:>4} {:>7} {:>6} {:>13} {:>15} {:>15} {:>6}  {:<12}"


class Listener(Protocol):
    """Is told what happens while it happens; ``Reporter`` is one."""

    def warm_up(self, step: int, success: float) -> None:
        """A supervised step was followed by a check."""

    def warmed_up(self, success: float) -> None:
        """GRPO starts from here."""

    def start(self, name: str, learning_rate: float) -> None:
        """A run begins."""

    def announce(self, step: int, forecast: Forecast, success: float) -> None:
        """A step was judged. The update has not been applied yet."""

    def outcome(self, record: StepRecord) -> None:
        """It has been applied."""


class Reporter:
    """Prints a run as it happens."""

    def __init__(self, console: Console):
        self.console = console
        self.console.rule("Supervised warm-up from scratch")

    def warm_up(self, step: int, success: float) -> None:
        if step % 25 == 0:
            self.console.print(f"supervised step {step:4d}   success rate {success:6.1%}", style="dim")

    def warmed_up(self, success: float) -> None:
        self.console.print(f"GRPO starts at a success rate of {success:.1%}")
        self.console.print(f"\n{LEGEND}", style="dim", soft_wrap=True)

    def start(self, name: str, learning_rate: float) -> None:
        self.console.print()
        self.console.rule(Text(f"GRPO, {name} learning rate {learning_rate:g}", style="bold"))
        self._line((COLUMNS.format("", "success", "mixed", "gap²", "alignment", "predicted", "step /", ""), "bold"),
                   ("  realised  success", "bold"))
        self._line((COLUMNS.format("step", "before", "groups", "± error", "± error", "log-odds gain", "b.-e.",
                                   "verdict"), "bold"), ("      gain    after", "bold"))

    def announce(self, step: int, forecast: Forecast, success: float) -> None:
        """The left part of the line."""
        left = COLUMNS.format(
            step, f"{success:.1%}", f"{forecast.mixed_share:.0%}",
            _with_error(forecast.gap_norm_sq, forecast.gap_norm_sq_stderr, ".3f"),
            _with_error(forecast.alignment, forecast.alignment_stderr),
            _with_error(forecast.predicted_log_odds_gain, forecast.predicted_log_odds_gain_stderr),
            f"{forecast.fraction_of_break_even:.2f}", forecast.verdict)
        self._line((left, STYLES[forecast.verdict]), end="")

    def outcome(self, record: StepRecord) -> None:
        """The right part: what the update did, by exact success rates."""
        gain = record.realised_log_odds_gain
        self._line((f"  {gain:>+8.3f} ", "green" if gain > 0 else "red"), f" {record.exact_after:>7.1%}")

    def _line(self, *parts: str | tuple[str, str], end: str = "\n") -> None:
        self.console.print(Text.assemble(*parts), end=end, soft_wrap=True)


def _with_error(value: float, stderr: float, spec: str = "+.3f") -> str:
    return f"{value:{spec}} ± {stderr:.3f}"

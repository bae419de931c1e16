"""The monitor of a training loop: fed at whatever tier the loop can afford, asked once per training step."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from rlvr_fast import _validate as check
from rlvr_fast.advantages import ESTIMATORS
from rlvr_fast.distributed import checksum
from rlvr_fast.gap import Gap
from rlvr_fast.model_gap.result import ModelGapResult
from rlvr_fast.monitor.gaps import GradientRows, PromptRows, response_keys, update_gap
from rlvr_fast.monitor.increments import Exchange, Increment, step_rows
from rlvr_fast.monitor.inputs import ResponseRows, Settings, response_rows
from rlvr_fast.monitor.metrics import metrics_of
from rlvr_fast.monitor.schedule import Schedule
from rlvr_fast.monitor.sums import window_sums
from rlvr_fast.rollouts import Rollouts
from rlvr_fast.step.measure import StepMeasure
from rlvr_fast.token_stats import TokenStats

LEVELS = ("logits", "hidden", "head", "model")


class GapMonitor:
    """Metrics of a training step, out of its micro-batches and ranks.

    A window is what lies between two ``reset()``: usually an optimizer step. ``update`` adds rows, one per response;
    ``compute`` joins those of all ranks by one all-gather and turns them into a flat dict of floats. Responses of one
    prompt may come in any order, micro-batch and rank: the result is that of one batch in one process. What cannot be
    known from what was fed is absent. ``rlvr_fast.monitor.METRICS`` lists every metric with its formula, tier and unit.

        monitor = GapMonitor(group_size=8)
        for micro_batch in ...:
            monitor.update(rewards=rewards, advantages=advantages, prompt_ids=ids, mask=mask, logp=logp)
        logger.log(monitor.compute())
        monitor.reset()

    Args:
        level: what gaps are measured with respect to: "hidden" (keeps D numbers per response of the window), "logits"
            (V numbers: 600 MB for 1,024 responses and a vocabulary of 150,000), "head" (keeps no vectors and so needs
            every prompt whole in one update), or "model" (results of ``ModelGap``, whole prompts too).
        length_norm: divide each response's gradient by its length, as 1/|o| losses do; False for token-mean losses.
        threshold: responses with reward >= threshold are the correct ones, for rewards that are not 0/1.
        group_size: responses per prompt in the whole step. Without prompt ids it makes class means possible; with them
            it catches ids that are not global.
        estimator, eps: of the advantages; as in ``rf.advantages``. Where there are no prompt ids or no rewards, groups
            and verdicts are recovered from advantages (``rf.recover_from_advantages``).
        temperature, softcap: of the softmax that sampled, for ``hidden``.
        decay: γ of the running means, reported under "<key>/ema": sums S ← γ S + S_window, numerators and denominators
            apart. None for no running means.
        every, budget: which windows are measured; see ``Schedule``. In the others ``update`` does nothing and
            ``compute`` returns {}. With a budget, figures come as often as it allows.
        group: the ranks whose rows make one window. ``compute`` is collective over it then. None: this process alone.
        backend: for ``hidden``; as in ``gradient_gap``.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """

    def __init__(self, *, level: str = "hidden", length_norm: bool = True, threshold: float | None = None,
                 group_size: int | None = None, estimator: str = "grpo", eps: float | None = None,
                 temperature: float = 1.0, softcap: float | None = None, decay: float | None = 0.9, every: int = 1,
                 budget: float | None = 0.03, group: dist.ProcessGroup | None = None, backend: str = "auto") -> None:
        if group_size is not None and (isinstance(group_size, bool) or not isinstance(group_size, int)
                                       or group_size < 2):
            raise ValueError(f"group_size must be an int >= 2 or None, got {check.describe(group_size)}")
        if decay is not None and not 0 < check.real("decay", decay) < 1:
            raise ValueError(f"decay must be in (0, 1) or None, got {decay}")
        self._settings = Settings(
            check.choice("level", level, LEVELS), check.flag("length_norm", length_norm),
            None if threshold is None else check.real("threshold", threshold), group_size,
            check.choice("estimator", estimator, ESTIMATORS), None if eps is None else check.real("eps", eps),
            check.positive("temperature", temperature), None if softcap is None else check.positive("softcap", softcap))
        self._decay, self._backend = decay, backend
        self._schedule = Schedule(every, budget)
        if group is not None and not isinstance(group, dist.ProcessGroup):
            raise TypeError(f"group must be a torch.distributed.ProcessGroup or None, got {check.describe(group)}")
        self._exchange = None if group is None else Exchange(group)
        self._increments: list[Increment] = []
        self._running: dict[str, float] = {}  # committed sums, those of past windows
        self._sums: dict[str, float] | None = None  # of this window, as compute() found them

    @property
    def level(self) -> str:
        return self._settings.level

    @property
    def length_norm(self) -> bool:
        return self._settings.length_norm

    @property
    def threshold(self) -> float | None:
        return self._settings.threshold

    # -- feeding ------------------------------------------------------------------------------------------------------

    @property
    def due(self) -> bool:
        """Whether this window is measured. Where not, a caller need not prepare anything for ``update``."""
        return self._schedule.due

    @contextmanager
    def timed(self, device: torch.device | None = None) -> Iterator[None]:
        """Count work done for the monitor outside of it (hooks, a ``gradient_gap`` of the caller's) as its overhead."""
        with self._schedule.timed(device):
            yield

    @torch.no_grad()
    def update(self, rollouts: Rollouts | None = None, *, prompt_ids: Sequence[Hashable] | torch.Tensor | None = None,
               rewards: torch.Tensor | None = None, correct: torch.Tensor | None = None,
               success_rate: torch.Tensor | None = None, advantages: torch.Tensor | None = None,
               mask: torch.Tensor | None = None, logp: torch.Tensor | None = None,
               old_logp: torch.Tensor | None = None, sum_p_sq: torch.Tensor | None = None,
               entropy: torch.Tensor | None = None, stats: TokenStats | None = None,
               hidden: torch.Tensor | None = None, weight: torch.Tensor | None = None,
               gap: Gap | ModelGapResult | None = None, step: StepMeasure | None = None,
               learning_rate: float | None = None) -> None:
        """Add a micro-batch. Every response of the window must come once.

        Does not synchronise host and device, but for a ``ModelGapResult``, which is read. Values of device tensors are
        checked in ``compute``.

        Args:
            rollouts: the responses, in place of prompt_ids, correct and mask. Their prompt ids must be global: ids that
                ``group_size=`` gave count from 0 in every batch.
            prompt_ids: [R] global ids: integers (tensor or sequence), strings, bytes or tuples.
            rewards: [R] real; NaN marks a response that could not be scored.
            correct: [R] bool or 0/1, in place of rewards.
            success_rate: [R] in [0, 1], success rate of each response's whole group, where a window holds fragments;
                NaN where it is not known.
            advantages: [R] as in the loss.
            mask: [R, T] bool or 0/1, true on response tokens; per-token tensors are [R, T] then. With rollouts they are
                [N] or in the rollouts' layout.
            logp, old_logp: log-probs of the sampled tokens now and when they were sampled.
            sum_p_sq: Σ_v p_v² (TRL: exp of log_sum_sq_probs). entropy: in nats.
            stats: TokenStats of these tokens, in place of logp, sum_p_sq and entropy.
            hidden, weight: final hidden states and lm_head, from which the gap is measured at the monitor's level.
                Needs rollouts. Costs a head pass.
            gap: or one that was measured already, at the monitor's level and length_norm: of all responses, or of the
                scored ones, in their order.
            step: a measured step (its reversed update included); learning_rate: that it was taken with.

        Raises:
            ValueError, TypeError: naming the argument; the monitor is unchanged then.
        """
        if not self.due:
            return
        device = next((x.device for x in (hidden, rollouts, rewards, correct, advantages, mask)
                       if isinstance(x, torch.Tensor | Rollouts)), None)
        with self.timed(device):
            gap = update_gap(rollouts, hidden, weight, gap, self._settings, self._backend)
            if stats is not None:
                if not isinstance(stats, TokenStats):
                    raise TypeError(f"stats must be rlvr_fast.TokenStats, got {type(stats).__name__}")
                if any(value is not None for value in (logp, sum_p_sq, entropy)):
                    raise ValueError("give stats, or logp, sum_p_sq and entropy, not both")
            elif logp is None and rollouts is not None and isinstance(gap, Gap):
                stats = gap.stats
            if stats is not None:
                logp, sum_p_sq, entropy = stats.logp, stats.sum_p_sq, stats.entropy
            steps = step_rows(step, learning_rate)
            if isinstance(gap, Gap) and rollouts is None and rewards is None and correct is None:
                correct, prompt_ids = gap.moments.responses.correct, response_keys(gap.moments.responses)
            alone = all(x is None for x in (rollouts, rewards, correct, advantages, prompt_ids, mask, logp))
            rows = ResponseRows.none() if alone and (gap is not None or step is not None) else response_rows(
                rollouts=rollouts, prompt_ids=prompt_ids, rewards=rewards, correct=correct, success_rate=success_rate,
                advantages=advantages, mask=mask, logp=logp, old_logp=old_logp, sum_p_sq=sum_p_sq, entropy=entropy,
                settings=self._settings)
            gradients, prompts = None, PromptRows.none()
            if isinstance(gap, Gap) and gap.gradients is not None:
                gradients = GradientRows.of(gap.gradients, advantages, rewards)
                gradients.check_width(part.gradients for part in self._increments)
            elif gap is not None:
                prompts = PromptRows.of(gap)
            self._increments.append(Increment(rows, gradients, prompts, steps))

    # -- asking -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def compute(self) -> dict[str, float]:
        """The window's metrics so far, and the running means with it in. Collective over ``group``; synchronises.

        May be called any number of times, and alters nothing but the schedule.

        Returns:
            Flat floats, the same on every rank; {} in a window that is not measured.

        Raises:
            ValueError: on every rank, for values that a device hid from ``update``, prompt ids that are not global, or
                ranks whose monitors differ.
        """
        if not self.due:
            return {}
        with self.timed():
            rows = Increment.join(self._increments)
            spent, seconds = self._schedule.costs()
            if self._exchange is not None:
                rows, spent, seconds = self._joined(self._exchange, rows, spent, seconds)
            self._sums = window_sums(rows, self._settings)
            found = metrics_of(self._sums)
            if self._decay is not None:
                found |= {f"{key}/ema": value for key, value in metrics_of(self._blend(self._decay)).items()}
            self._schedule.plan(spent, seconds)
            windows = self._schedule.next_due - self._schedule.window
            found |= {"rlvr/time/overhead_ms": 1e3 * spent, "rlvr/time/windows": float(windows)}
            if seconds > 0:
                found["rlvr/time/overhead_share"] = spent / (windows * seconds + spent)
        return found

    def _joined(self, exchange: Exchange, rows: Increment, spent: float, seconds: float
                ) -> tuple[Increment, float, float]:
        """Rows of all ranks, the largest cost, the shortest window: what every rank plans with."""
        own = {"configuration": int(checksum((self._settings, self._decay, self._schedule.every,
                                              self._schedule.budget)), 16),
               "spent": spent, "window_seconds": seconds, "window": self._schedule.window}
        rows, heads = exchange.gather(rows, own)
        for name, what in (("configuration", "settings"), ("window", "window, having reset() equally often,")):
            if len({head[name] for head in heads}) > 1:
                raise ValueError(f"the monitors of all ranks must have the same {what} got different ones: "
                                 + ", ".join(f"{head[name]:g} on rank {rank}" for rank, head in enumerate(heads)))
        return rows, max(head["spent"] for head in heads), min(head["window_seconds"] for head in heads)

    def _blend(self, decay: float) -> dict[str, float]:
        """γ · past sums + this window's."""
        kept = {name: (decay ** 2 if name.startswith("var_") else decay) * value
                for name, value in self._running.items()}
        return kept | {name: kept.get(name, 0.0) + value for name, value in (self._sums or {}).items()}

    def reset(self) -> None:
        """End the window: its rows go; what ``compute`` last found in it enters the running means."""
        if self._sums is not None and self._decay is not None:
            self._running = self._blend(self._decay)
        self._increments, self._sums = [], None
        self._schedule.end_window()

    # -- state --------------------------------------------------------------------------------------------------------

    def merge(self, other: GapMonitor) -> None:
        """Take over the rows and running sums of another monitor of other responses, as if this one had been fed them.

        Its schedule is not taken over. Without communication: for monitors of one process, or loaded from files.

        Raises:
            TypeError, ValueError: for something else, or a monitor with other settings.
        """
        if not isinstance(other, GapMonitor):
            raise TypeError(f"other must be a GapMonitor, got {type(other).__name__}")
        if (self._settings, self._decay) != (other._settings, other._decay):
            raise ValueError(f"other must have this monitor's settings {self._settings}, decay {self._decay}; "
                             f"got {other._settings}, decay {other._decay}")
        self._increments = [*self._increments, *other._increments]
        self._running = self._running | {name: self._running.get(name, 0.0) + value
                                         for name, value in other._running.items()}
        self._sums = None

    def state_dict(self) -> dict[str, Any]:
        """Everything but ``group``: plain values and host tensors, which ``torch.load`` reads with ``weights_only``."""
        rows = {name: value.cpu() for name, value in Increment.join(self._increments).tensors().items()}
        return {"settings": dataclasses.asdict(self._settings), "running": dict(self._running), "rows": rows,
                "schedule": self._schedule.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a ``state_dict`` of a monitor with the same settings.

        Raises:
            ValueError: if parts are missing or the settings differ; the monitor is unchanged then.
        """
        wanted = ("settings", "running", "rows", "schedule")
        if not isinstance(state, dict) or set(state) != set(wanted):
            raise ValueError(f"state must be a dict with {', '.join(wanted)}, got {check.describe(state)}")
        if state["settings"] != dataclasses.asdict(self._settings):
            raise ValueError(f"state must come from a monitor with the settings {dataclasses.asdict(self._settings)}, "
                             f"got {state['settings']}")
        rows = Increment.from_tensors(state["rows"])
        running = {name: float(value) for name, value in state["running"].items()}
        self._schedule.load_state_dict(state["schedule"])
        self._increments, self._running, self._sums = [rows], running, None

    def __repr__(self) -> str:
        rows = sum(len(part.responses.keys) for part in self._increments)
        state = "measured" if self.due else f"next measured {self._schedule.next_due}"
        return (f"GapMonitor(level={self._settings.level}, length_norm={self._settings.length_norm}, "
                f"window={self._schedule.window} ({state}), responses={rows})")

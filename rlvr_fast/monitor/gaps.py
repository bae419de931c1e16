"""The measured gaps of one update: response gradients where the level has vectors, else figures of whole prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from rlvr_fast import _validate as check
from rlvr_fast.gap import Gap, gradient_gap
from rlvr_fast.model_gap.result import ModelGapResult
from rlvr_fast.moments import ResponseGradients, Responses
from rlvr_fast.monitor.inputs import Settings, prompt_keys
from rlvr_fast.rollouts import Rollouts

PROMPT_COLUMNS = ("norm_sq", "naive", "stderr", "bias", "pooled", "energy_neg", "energy_pos", "n_neg", "n_pos",
                  "coverage", "alignment", "gain", "gain_stderr")
"""Figures of a prompt whose responses are all in one update; NaN where there is none."""


def update_gap(rollouts: Rollouts | None, hidden: torch.Tensor | None, weight: torch.Tensor | None,
               gap: Gap | ModelGapResult | None, settings: Settings, backend: str) -> Gap | ModelGapResult | None:
    """The gap of one update: measured here from hidden states and lm_head, or ``gap`` if it fits the monitor."""
    if (hidden is None) != (weight is None):
        raise ValueError("hidden and weight must be given together")
    if hidden is not None and weight is not None:
        if gap is not None:
            raise ValueError("give hidden and weight, or gap, not both")
        if rollouts is None:
            raise ValueError("hidden needs rollouts beside it, which say where the response tokens are")
        if settings.level == "model":
            raise ValueError("hidden cannot be measured at level 'model': give a ModelGapResult as gap")
        return gradient_gap(hidden, weight, rollouts, level=settings.level, length_norm=settings.length_norm,
                            temperature=settings.temperature, softcap=settings.softcap, backend=backend)
    if gap is None:
        return None
    if not isinstance(gap, Gap | ModelGapResult):
        raise TypeError(f"gap must be a Gap or a ModelGapResult, got {type(gap).__name__}")
    if (gap.level, gap.length_norm) != (settings.level, settings.length_norm):
        raise ValueError(f"gap must have the monitor's level {settings.level!r} and length_norm "
                         f"{settings.length_norm}, got {gap.level!r} and {gap.length_norm}")
    if isinstance(gap, Gap) and gap.vocabulary is not None:
        raise ValueError("gap must have whole vectors, got those of one vocabulary shard; use level 'hidden'")
    if isinstance(gap, Gap) and rollouts is not None and len(gap.moments.sq) != rollouts.n_responses:
        raise ValueError(f"gap must be of the {rollouts.n_responses} responses of rollouts, got one of "
                         f"{len(gap.moments.sq)}")
    return gap


def response_keys(responses: Responses) -> torch.Tensor:
    """[R] int64 on the responses' device, without waiting for it."""
    names = prompt_keys(list(responses.prompt_ids), responses.n_prompts)
    return names.to(responses.prompt_index.device, non_blocking=True)[responses.prompt_index]


@dataclass(frozen=True, eq=False)
class GradientRows:
    """Response gradients, a prompt's in any number of updates and ranks.

    Attributes:
        keys: [R] int64 prompt keys. correct: [R] float64. advantage: [R] float64, NaN if not given.
        vectors: [R, K] float32.
    """

    keys: torch.Tensor
    correct: torch.Tensor
    advantage: torch.Tensor
    vectors: torch.Tensor

    @classmethod
    def of(cls, gradients: ResponseGradients, advantages: torch.Tensor | None, rewards: torch.Tensor | None
           ) -> GradientRows:
        responses = gradients.responses
        correct = responses.correct.double()
        if advantages is not None and rewards is not None and len(rewards) > len(correct):
            advantages = advantages[~rewards.isnan()]  # those of the scored responses
        if advantages is None:
            advantage = torch.full_like(correct, torch.nan)
        else:
            advantage = check.tensor("advantages", advantages, shape=tuple(correct.shape)).detach().to(correct)
        return cls(response_keys(responses), correct, advantage, gradients.vectors.detach())

    def check_width(self, others: Iterable[GradientRows | None]) -> None:
        """Raise if some of ``others`` have vectors of another width."""
        widths = {other.vectors.shape[1] for other in others if other is not None} - {self.vectors.shape[1]}
        if widths:
            raise ValueError(f"gap must have vectors of {widths.pop()} coordinates, as those of this window's other "
                             f"updates, got {self.vectors.shape[1]}")

    @classmethod
    def cat(cls, parts: Sequence[GradientRows]) -> GradientRows | None:
        if not parts:
            return None
        parts[0].check_width(parts)
        return cls(*(torch.cat([getattr(part, name) for part in parts])
                     for name in ("keys", "correct", "advantage", "vectors")))

    def to(self, device: torch.device | str) -> GradientRows:
        return replace(self, **{name: value.to(device) for name, value in vars(self).items()})


@dataclass(frozen=True, eq=False)
class PromptRows:
    """Figures of whole prompts.

    Attributes:
        keys: [P] int64. cells: [P, len(PROMPT_COLUMNS)] float64.
    """

    keys: torch.Tensor
    cells: torch.Tensor

    @classmethod
    def none(cls) -> PromptRows:
        return cls(torch.zeros(0, dtype=torch.int64), torch.zeros(0, len(PROMPT_COLUMNS), dtype=torch.float64))

    @classmethod
    def of(cls, gap: Gap | ModelGapResult) -> PromptRows:
        measured = gap.measured if isinstance(gap, ModelGapResult) else gap
        own, moments = measured.estimate, measured.moments
        absent = torch.full_like(own.norm_sq, torch.nan)
        columns = {"norm_sq": own.norm_sq, "naive": own.norm_sq_naive, "stderr": own.stderr, "bias": own.bias,
                   "pooled": own.pooled.double(), "energy_neg": moments.square[:, 0],
                   "energy_pos": moments.square[:, 1], "n_neg": moments.count[:, 0], "n_pos": moments.count[:, 1]}
        if isinstance(gap, ModelGapResult):
            columns["coverage"] = torch.full_like(absent, gap.coverage.share)
            for name, column in (("alignment", gap.alignment), ("gain", gap.predicted_log_odds_gain),
                                 ("gain_stderr", gap.predicted_log_odds_gain_stderr)):
                if column is not None:
                    columns[name] = column[gap.measured_prompts]
        keys = prompt_keys(list(measured.prompt_ids), len(measured.prompt_ids))
        return cls(keys, torch.stack([columns.get(name, absent) for name in PROMPT_COLUMNS], 1))

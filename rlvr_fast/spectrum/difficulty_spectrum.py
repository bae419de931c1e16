"""The difficulty spectrum of a training set: where the gradient comes from, and which prompts can be learned from.

Success rates cannot tell a lucky guess from a prompt at the edge of competence: at the chance floor 1/d the factor
p (1 − p) looks usable, while the gap is exponentially small in the horizon [paper B; derived]. The measured gap can,
if its noise is dealt with. A prompt's own gap still holds what merely memorises its answer, though: through the
lm_head a prompt can be answered by rote. What prompts of a bin have in common, their shared gap, is what carries over
to others; it needs vectors (levels "hidden" and "logits", and ModelGap's "sketch").
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from rlvr_fast import _validate as check
from rlvr_fast.gap import Gap
from rlvr_fast.kappa import PROPORTIONAL
from rlvr_fast.model_gap.result import ModelGapResult
from rlvr_fast.rollouts import Rollouts
from rlvr_fast.spectrum.bins import cut, difficulties
from rlvr_fast.spectrum.evidence import VERDICTS, BinEvidence, PromptEvidence, Thresholds, weigh
from rlvr_fast.spectrum.groups import check_rollouts, checked_gaps, gather
from rlvr_fast.spectrum.mixture import Mixture, mixture
from rlvr_fast.spectrum.smoothness import Smoothness, smoothness
from rlvr_fast.synthetic import whole

CORRECTIONS = ("benjamini-hochberg", "holm", "none")


@dataclass(frozen=True, eq=False, repr=False)
class DifficultySpectrum:
    """P prompts in B bins of rising difficulty (of rising success rate, if binned by that). All tensors on the host.

    Attributes:
        labels: the B bins. centres: their mean difficulties, NaN for labels.
        prompt_ids: the P prompts. prompts, bins: what is known of each, and its verdict.
        estimator: whose κ the signal is weighted with. thresholds: what the verdicts are held against.
        has_vectors: whether shared gaps could be measured.
        by_success: binned by success rate: no measure of smoothness then, and the success rates of the bins, selected
            by themselves, are too extreme.
    """

    labels: tuple[Hashable, ...]
    centres: tuple[float, ...]
    prompt_ids: tuple[Hashable, ...]
    prompts: PromptEvidence
    bins: BinEvidence
    estimator: str
    thresholds: Thresholds
    has_vectors: bool
    by_success: bool

    @cached_property
    def smoothness(self) -> Smoothness | None:
        """How evenly difficulty rises; None for bins that were made by success rate."""
        if self.by_success:
            return None
        return smoothness(self.labels, self.centres, self.bins, self.thresholds.visible)

    def mixture(self, *, allocation: str | None = None, base: Mapping[Any, float] | None = None,
                floor: float = 0.1) -> Mixture:
        """Sampling probabilities π of the bins: (1 − floor) · q √(s/c) / Σ q √(s/c) + floor · q.

        q is the base, c the tokens per rollout (1 if unknown) and s the signal, shrunk by its error to
        s (1 − stderr²/s²), 0 below one standard error. This is Neyman's allocation (Neyman 1934): the measured signal
        per cost, q² s/(c π²), is the same in every bin but for the floor. With κ = p (1 − p) and equal gaps it is
        p (1 − p) per bin; weighting *losses* by 1/√(p (1 − p)) (arXiv 2602.11128, [2nd]) is the converse, an equal push
        from every prompt.

        Args:
            allocation: s = ``shared_signal`` ("shared", the default where there are vectors), ``signal`` ("own"), or
                ``second_moment`` ("noise": the least variance for losses weighted by ``importance``; feeds lucky
                guesses, which are nothing but noise) or (p (1 − p))² ("success": no gap at all, the one to beat; it
                was not beaten in docs/curriculum).
            base: bin -> share, any scale; equal shares by default. May name bins that were not measured: they keep the
                floor. Shares of what happened to be sampled would feed back on themselves.
            floor: share that is spread as the base is, whatever was measured.

        Raises:
            ValueError, TypeError: naming the argument.
        """
        return mixture(self, allocation=allocation, base=base, floor=floor)

    def summary(self) -> dict[str, float]:
        """Flat metrics for any logger: shares of the prompts by verdict, and smoothness where there is one."""
        n = len(self.prompt_ids)
        result = {f"rlvr/spectrum/frac_{verdict.replace(' ', '_')}":
                  self.prompts.verdict.count(verdict) / n if n else float("nan") for verdict in VERDICTS}
        result["rlvr/spectrum/n_prompts"] = float(n)
        if self.smoothness is not None:
            result |= {"rlvr/spectrum/difficulty_ratio": self.smoothness.difficulty_ratio,
                       "rlvr/spectrum/success_ratio": self.smoothness.success_ratio,
                       "rlvr/spectrum/holes": float(len(self.smoothness.holes))}
        return result

    def __repr__(self) -> str:
        counts = ", ".join(f"{self.prompts.verdict.count(verdict)} {verdict}" for verdict in VERDICTS)
        lines = [f"DifficultySpectrum(prompts={len(self.prompt_ids)}: {counts}; κ of {self.estimator}, "
                 f"confidence={self.thresholds.confidence:g}, {self.thresholds.correction})",
                 f"{'bin':>14} {'prompts':>7} {'rollouts':>8} {'success':>21} {'gap²':>10} {'± err':>8} {'p':>6} "
                 f"{'shared²':>10} {'± err':>8} {'p':>6} {'signal':>7} {'tokens':>7}  verdict"]
        bins = self.bins
        columns = (bins.n_prompts, bins.n, bins.success_rate, bins.low, bins.high, bins.norm_sq, bins.stderr,
                   bins.p_value, bins.shared_norm_sq, bins.shared_stderr, bins.shared_p_value,
                   bins.batch_share if self.has_vectors else bins.signal_share, bins.cost)
        form = ("{:7.0f} {:8.0f} {:6.3f} [{:.3f}, {:.3f}] {:10.3g} {:8.2g} {:6.2g} {:10.3g} {:8.2g} {:6.2g} {:7.1%} "
                "{:7.3g}")
        for label, verdict, *row in zip(self.labels, bins.verdict, *(x.tolist() for x in columns), strict=True):
            lines.append(f"{label!s:>14.14} {form.format(*row)}  {verdict}")
        return "\n".join([*lines, *([] if self.smoothness is None else [repr(self.smoothness)])])


def difficulty_spectrum(gap: Gap | ModelGapResult | Sequence[Gap | ModelGapResult],
                        difficulty: str | torch.Tensor | Sequence[Any] | Mapping[Any, float | str], *,
                        bins: int | Sequence[float] | None = None,
                        rollouts: Rollouts | Sequence[Rollouts] | None = None, estimator: str = "grpo",
                        confidence: float = 0.95, correction: str = "benjamini-hochberg", mastered: float = 0.9,
                        visible: float = 0.05, negligible: float | None = None, chance: float | None = None,
                        across_steps: bool = False, n_permutations: int = 4999, seed: int = 0) -> DifficultySpectrum:
    """Bins prompts by difficulty and tells which are mastered, at the edge, lucky guesses or out of reach.

    Every verdict rests on two pieces of evidence: the interval of the success rate, and a randomisation test for the
    gap. Synchronises with the device; meant for now and then, not for the hot path. Of a prompt with n responses, k of
    them correct, at best p = k! (n−k)!/n! can come out: 8 responses with one success never make a significant prompt
    by themselves. Then the bins have the power, and several steps together.

    Args:
        gap: what was measured, in one step or in several. The same prompt id in several steps is one prompt.
        difficulty: numbers or strings, one for each prompt of the gap (for several gaps: a list with such a sequence
            for each, or a mapping from prompt id); or "success_rate", or "length" (tokens per response).
        bins: of numbers: rising edges of intervals [a, b), the last one closed, or how many bins with equal numbers of
            prompts; None makes each distinct number a bin, up to 10, else 10 bins. Strings are bins.
        rollouts: those that the gaps were measured on, for costs and lengths. A ModelGapResult knows its own.
        estimator: grpo, grpo_population_std, dr_grpo, rloo or maxrl: whose κ weighs the gaps, with its default eps.
        confidence: of every interval, and 1 − the error rate of the tests, over prompts and over bins.
        correction: of the tests for their number: "benjamini-hochberg" (false discovery rate), "holm" (any false one)
            or "none".
        mastered: success rate that the whole interval must exceed. visible: success rate that it must stay below where
            no success was seen, to be out of reach: 0 of 73 rollouts stay below 0.05.
        negligible: squared gap norm too small to learn from, for lucky guesses; by default half the median of those at
            the edge. chance: success rate of guessing; a lucky guess's interval must then reach down to it.
        across_steps: shared gaps also from pairs of prompts in different steps, for several gaps: many more pairs and
            less noise, as if the policy had stood still. Biased by as much as the steps between changed the gaps.
            Sketches must have one seed and size.
        n_permutations: relabellings and sign flips of each test. seed: of their drawing.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    gaps = checked_gaps(gap)
    rollouts = check_rollouts(rollouts, gaps)
    check.choice("estimator", estimator, PROPORTIONAL)
    for name, value in (("confidence", confidence), ("mastered", mastered), ("visible", visible)):
        if not 0 < check.real(name, value) < 1:
            raise ValueError(f"{name} must be between 0 and 1, got {value!r}")
    check.choice("correction", correction, CORRECTIONS)
    if negligible is not None:
        check.positive("negligible", negligible)
    if chance is not None and not 0 <= check.real("chance", chance) <= 1:
        raise ValueError(f"chance must be in [0, 1], got {chance!r}")
    whole("n_permutations", n_permutations)
    whole("seed", seed, least=0)
    thresholds = Thresholds(float(confidence), correction, float(mastered), float(visible), negligible, chance)

    groups = gather(gaps, rollouts, estimator, check.flag("across_steps", across_steps))
    index, labels, centres = cut(difficulties(difficulty, groups, [len(one.prompt_ids) for one in gaps]), bins)
    prompts, evidence = weigh(groups, torch.tensor(index, dtype=torch.int64), len(labels), thresholds, n_permutations,
                              seed)
    return DifficultySpectrum(labels, tuple(centres), groups.prompt_ids, prompts, evidence, estimator, thresholds,
                              groups.products is not None, isinstance(difficulty, str) and difficulty == "success_rate")

"""The groups that a spectrum is made of: the responses to one prompt in one step, from any kind of gap."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from rlvr_fast import _validate as check
from rlvr_fast.advantages import DEFAULT_EPS
from rlvr_fast.batch_gap import vector_products
from rlvr_fast.gap import Gap
from rlvr_fast.kappa import kappa
from rlvr_fast.model_gap.result import ModelGapResult
from rlvr_fast.rollouts import Rollouts


class GroupResponses(NamedTuple):
    """The responses of one group: their Gram matrix [n, n] and their verdicts [n] bool, on the host."""

    gram: torch.Tensor
    correct: torch.Tensor


@dataclass(frozen=True, eq=False)
class Groups:
    """Q groups of P prompts, on the host, in float64 where not said otherwise.

    Attributes:
        prompt_ids: the P distinct ids, in order of first appearance.
        prompt, part: [Q] int64, the prompt and the step of each group.
        n_correct, n: [Q] correct and all responses.
        norm_sq, stderr, bias: [Q] as in GapEstimate; NaN where unknown.
        kappa: [Q] factor of the gap in the group's mean of A_i s_i.
        weight: [Q] factor of the gap in the step's gradient, the mean of A_i s_i over its responses.
        tokens: [Q] tokens of the group's responses, NaN if not known.
        responses: per group what is known of its responses, None if nothing.
        products: [Q, Q] ⟨ĝap_p, ĝap_q⟩, 0 where undefined and between steps; None without vectors.
        across_steps: groups of different steps may be paired, and have products.
    """

    prompt_ids: tuple[Hashable, ...]
    prompt: torch.Tensor
    part: torch.Tensor
    n_correct: torch.Tensor
    n: torch.Tensor
    norm_sq: torch.Tensor
    stderr: torch.Tensor
    bias: torch.Tensor
    kappa: torch.Tensor
    weight: torch.Tensor
    tokens: torch.Tensor
    responses: tuple[GroupResponses | None, ...]
    products: torch.Tensor | None
    across_steps: bool

    @property
    def n_prompts(self) -> int:
        return len(self.prompt_ids)

    def per_prompt(self, values: torch.Tensor) -> torch.Tensor:
        """Σ over the groups of each prompt: [Q] -> [P]."""
        return values.new_zeros(self.n_prompts).index_add(0, self.prompt, values)


def checked_gaps(gap: object) -> list[Gap | ModelGapResult]:
    """One gap or a sequence of them, as a list."""
    gaps: list[Gap | ModelGapResult] = []
    for one in gap if isinstance(gap, Sequence) else [gap]:
        if not isinstance(one, Gap | ModelGapResult):
            raise TypeError(f"gap must be a Gap, a ModelGapResult or a sequence of them, got {check.describe(one)}")
        gaps.append(one)
    if not gaps:
        raise ValueError("gap must hold at least one Gap or ModelGapResult, got an empty sequence")
    kinds = sorted({(one.level, one.length_norm) for one in gaps})
    if len(kinds) > 1:
        raise ValueError(f"gap must hold gaps of one level and length_norm, got {kinds}")
    return gaps


def gather(gaps: Sequence[Gap | ModelGapResult], rollouts: Sequence[Rollouts] | None, estimator: str,
           across_steps: bool) -> Groups:
    """The groups of all gaps. A prompt that occurs in several of them is one prompt with a group in each."""
    numbers: dict[Hashable, int] = {}
    prompt: list[int] = []
    part: list[int] = []
    columns: list[torch.Tensor] = []
    responses: list[GroupResponses | None] = []
    for step, gap in enumerate(gaps):
        prompt += [numbers.setdefault(identity, len(numbers)) for identity in gap.prompt_ids]
        part += [step] * len(gap.prompt_ids)
        columns.append(_columns(gap, None if rollouts is None else rollouts[step], estimator))
        responses += _responses(gap)
    n_correct, n, norm_sq, stderr, bias, factor, weight, tokens = torch.cat(columns, 1)
    return Groups(tuple(numbers), torch.tensor(prompt, dtype=torch.int64), torch.tensor(part, dtype=torch.int64),
                  n_correct, n, norm_sq, stderr, bias, factor, weight, tokens, tuple(responses),
                  _all_products(gaps, across_steps), across_steps)


def _columns(gap: Gap | ModelGapResult, rollouts: Rollouts | None, estimator: str) -> torch.Tensor:
    """[8, P] n_correct, n, norm_sq, stderr, bias, kappa, weight, tokens."""
    estimate = gap.estimate
    n_correct, n_incorrect, norm_sq, stderr, bias = (
        column.detach().double().cpu() for column in
        (estimate.n_correct, estimate.n_incorrect, estimate.norm_sq, estimate.stderr, estimate.bias))
    n = n_correct + n_incorrect
    factor = kappa(n_correct / n.clamp(min=1), n.long().clamp(min=1), estimator, eps=DEFAULT_EPS[estimator] or 0.0)
    tokens = torch.full_like(n, torch.nan)
    if rollouts is not None:
        lengths = rollouts.lengths.double().cpu()
        tokens = torch.zeros_like(n).index_add_(0, rollouts.prompt_index.cpu(), lengths)
    elif isinstance(gap, ModelGapResult):
        tokens = torch.zeros_like(n).index_add_(0, gap._prompt_index, gap._lengths)
    return torch.stack([n_correct, n, norm_sq, stderr, bias, factor, factor * n / n.sum().clamp(min=1), tokens])


def _responses(gap: Gap | ModelGapResult) -> list[GroupResponses | None]:
    """Per prompt what is known of its responses."""
    measured = gap.measured if isinstance(gap, ModelGapResult) else gap
    if measured.gradients is None and measured.summed_grams is None:
        return [None] * len(gap.prompt_ids)
    responses = measured.moments.responses
    known = (GroupResponses(gram.detach().double().cpu(), responses.correct[index].cpu())
             for gram, index in zip(measured.gram, responses.by_prompt(measured.sizes), strict=True))
    if not isinstance(gap, ModelGapResult):
        return list(known)
    return [next(known) if yes else None for yes in gap.measured_prompts.tolist()]


def _all_products(gaps: Sequence[Gap | ModelGapResult], across_steps: bool) -> torch.Tensor | None:
    """[Q, Q] as in Groups; the vectors of all steps are in one set of coordinates if they are to be paired."""
    vectors = [vector for gap in gaps if (vector := gap.vector) is not None]
    if len(vectors) < len(gaps):
        return None
    if not across_steps:
        n_groups = sum(map(len, vectors))
        return torch.block_diag(*(_products(gap) for gap in gaps)).view(n_groups, n_groups)
    widths = sorted({vector.shape[1] for vector in vectors})
    if len(widths) > 1 or any(isinstance(gap, Gap) and gap.vocabulary is not None for gap in gaps):
        raise ValueError("across_steps needs gap vectors in the same, whole coordinates in every step, got "
                         f"{'one rank of a sharded vocabulary' if len(widths) == 1 else f'widths {widths}'}")
    return vector_products(torch.cat(vectors)).cpu()


def _products(gap: Gap | ModelGapResult) -> torch.Tensor:
    """⟨ĝap_p, ĝap_q⟩ [P, P] on the host, 0 where not defined."""
    measured = gap.measured if isinstance(gap, ModelGapResult) else gap
    products = measured._vector_products.detach().cpu()
    if not isinstance(gap, ModelGapResult):
        return products
    place = gap.measured_prompts.cpu().nonzero().squeeze(1)
    spread = products.new_zeros(len(gap.prompt_ids), len(gap.prompt_ids))
    spread[place[:, None], place] = products
    return spread


def check_rollouts(rollouts: object, gaps: Sequence[Gap | ModelGapResult]) -> list[Rollouts] | None:
    """The rollouts of each gap, or None."""
    if rollouts is None:
        return None
    rollouts = [rollouts] if isinstance(rollouts, Rollouts) else rollouts
    if not isinstance(rollouts, Sequence) or len(rollouts) != len(gaps):
        raise ValueError(f"rollouts must be one Rollouts for each of {len(gaps)} gaps, got {check.describe(rollouts)}")
    for step, (own, gap) in enumerate(zip(rollouts, gaps, strict=True)):
        if not isinstance(own, Rollouts):
            raise TypeError(f"rollouts must be rlvr_fast.Rollouts, got {check.describe(own)}")
        n_correct = torch.zeros(own.n_prompts, dtype=torch.int64).index_add_(
            0, own.prompt_index.cpu(), own.correct.long().cpu())
        if own.prompt_ids != gap.prompt_ids or not torch.equal(n_correct, gap.n_correct.cpu()):
            raise ValueError(f"rollouts must be those that gap {step} was measured on, got other prompts or verdicts: "
                             f"{own!r}")
    return list(rollouts)

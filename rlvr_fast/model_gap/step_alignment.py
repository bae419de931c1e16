"""Alignment of a plain gradient step with the gaps measured on the rollouts that made it, without self-influence.

A policy gradient step is a known combination of the same responses' gradients, D = Σ_i w_i G_i. With a_j = ±1/n± its
alignment with prompt p's gap in sample is Σ_i Σ_{j∈p} w_i a_j ⟨G_i, G_j⟩. The terms i = j are squares: their noise
never cancels, and where the gap is small they are all of the sum. Leaving them out, and averaging each class over the
others,

    Δμ̂_p = Σ_{i∉p} w_i ⟨G_i, ĝap_p⟩ + Σ_{i∈p} w_i ⟨G_i, (ĝ⁺ − ĝ⁻) over the responses of p other than i⟩     [derived]

is unbiased: given the verdicts, G_i is independent of all that it is multiplied with and has mean g of its class, so
that E[Δμ̂_p | verdicts] = ⟨E[D | verdicts], g⁺ − g⁻⟩. It takes w_i to depend on no other response's tokens: weights made
of verdicts, and of response i itself, do; a divisor common to the batch (its token count, say) does to 1/R. What is
taken off, for a class of equal weights w, is its noise ± w tr Σ̂. So for D = κ (ĝ⁺ − ĝ⁻) of one prompt, which is every
GRPO-like estimator, Δμ̂_p is κ times the unbiased squared gap norm. A class of one response has no other to average: its
noise is that of the class pooled over the other prompts, as for the gap norm.

Error bars. Of a prompt: delete-one jackknife over its own responses, each class a stratum (the sum over its other
members scaled up by n/(n − 1), its mean taken over them); the other prompts' part of D is as it was sampled. Of the
mean over prompts, which share D: delete-one jackknife over prompts, each taken out of the mean and of D at once, the
rest of D scaled up by P/(P − 1).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch

from rlvr_fast import _validate as check
from rlvr_fast.estimates import class_noise
from rlvr_fast.moments import GRAM_COLUMNS, Moments


@dataclass(frozen=True, eq=False, repr=False)
class StepAlignment:
    """Alignment of D = Σ_i w_i ∇log π(o_i), made from the same rollouts, with the gap of each of P prompts.

    [P] float64, NaN where the gap is not defined or no other prompt lends a class of one its noise. First order in D.

    Attributes:
        scope: "batch": D is the sum over all responses. "prompt": over those of the prompt itself alone.
        alignment: Δμ̂, self-influence removed. alignment_in_sample: with it.
        stderr: jackknife standard error of ``alignment``, over the prompt's own responses; NaN where a class has one.
        mean_stderr: scalar, that of the mean of ``alignment``, over prompts; NaN for fewer than two.
        prompt_ids: the P prompt ids.
    """

    scope: str
    alignment: torch.Tensor
    alignment_in_sample: torch.Tensor
    stderr: torch.Tensor
    mean_stderr: torch.Tensor
    prompt_ids: tuple[Hashable, ...]

    @property
    def self_influence(self) -> torch.Tensor:
        """[P] what the in-sample figure owes to noise agreeing with itself; the same in both scopes."""
        return self.alignment_in_sample - self.alignment

    def summary(self) -> dict[str, float]:
        """Means over the prompts with a figure, and the error of the first. Synchronises with the device."""
        usable = self.alignment.isfinite()
        return {f"rlvr/model/step_{name}": float(getattr(self, name)[usable].mean())
                for name in ("alignment", "alignment_in_sample", "self_influence")} | {
                    "rlvr/model/step_alignment_stderr": float(self.mean_stderr)}

    def __repr__(self) -> str:
        mean, in_sample, _, error = self.summary().values()
        lines = [f"StepAlignment(scope={self.scope}, prompts={len(self.prompt_ids)}, mean={mean:.4g} ± {error:.2g}, "
                 f"in sample {in_sample:.4g})",
                 f"{'prompt':>12} {'alignment':>11} {'± stderr':>10} {'in sample':>11}"]
        columns = zip(self.prompt_ids, self.alignment.tolist(), self.stderr.tolist(),
                      self.alignment_in_sample.tolist(), strict=True)
        for row, (identity, own, error, naive) in enumerate(columns):
            if row == 10:
                lines.append(f"... {len(self.prompt_ids) - row} more")
                break
            lines.append(f"{identity!s:>12.12} {own:11.4g} {error:10.3g} {naive:11.4g}")
        return "\n".join(lines)


def checked_weights(weights: torch.Tensor, unmeasured: torch.Tensor) -> torch.Tensor:
    """``weights`` as [R] float64 on the host; ``unmeasured`` [R] marks responses whose gradients are not known."""
    check.tensor("weights", weights, shape=tuple(unmeasured.shape), dtypes=(*check.FLOAT_DTYPES, torch.float64))
    weights = weights.detach().double().cpu()
    if not weights.isfinite().all():
        raise ValueError(f"weights must be finite, got {check.describe(weights)} with NaN or infinite entries")
    if (weights[unmeasured] != 0).any():
        raise ValueError("weights must be 0 for the responses of prompts that were not measured, got "
                         f"{float(weights[unmeasured].abs().max())} for one")
    return weights


def align(moments: Moments, grams: Sequence[torch.Tensor], weights: torch.Tensor, vectors: torch.Tensor | None
          ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(alignment, in sample, stderr) of Σ_i w_i G_i, [P] each, and the scalar error of the first one's mean.

    Args:
        moments: of the R responses. grams: per prompt ⟨G_i, G_j⟩, rows in rollout order.
        weights: [R] float64, w_i. vectors: [R, K] G_i, to take other prompts' responses into D; None leaves them out.
    """
    responses = moments.responses
    n, square, product = moments.count, moments.square, moments.product
    noise = class_noise(square, product.diagonal(dim1=1, dim2=2), n)
    along = None if vectors is None else _along(vectors, weights)
    columns = n.new_zeros(responses.n_prompts, 4)
    for prompt, (own, gram) in enumerate(zip(responses.by_prompt([len(gram) for gram in grams]), grams, strict=True)):
        columns[prompt] = _of_prompt(gram, responses.correct[own], weights[own],
                                     None if along is None else along[own], noise[prompt])
    alignment, in_sample, stderr, itself = torch.where((n > 0).all(1)[:, None], columns, torch.nan).unbind(1)
    usable = alignment.isfinite()
    effect = None
    if vectors is not None:  # of each prompt's part of D on the sum of the others' alignments
        side = torch.where(responses.correct, 1.0, -1.0) / n[responses.prompt_index, responses.correct.long()]
        towards_gaps = _along(vectors, torch.where(usable[responses.prompt_index], side, 0.0))
        effect = responses.class_sum(weights * towards_gaps).sum(1) - torch.where(usable, itself, 0.0)
    return alignment, in_sample, stderr, _error_of_mean(alignment, usable, effect)


def _error_of_mean(alignment: torch.Tensor, usable: torch.Tensor, effect: torch.Tensor | None) -> torch.Tensor:
    """Delete-one-prompt jackknife of the mean over the usable prompts."""
    n_prompts, n = len(alignment), usable.sum()
    value = torch.where(usable, alignment, 0.0)
    left = value.sum() - value
    if effect is not None:
        left = (left - effect) * (n_prompts / max(n_prompts - 1, 1))
    left = left / (n - usable.long())
    varied = usable if effect is None else torch.ones_like(usable)
    count = varied.sum()
    deviation = torch.where(varied, left - torch.where(varied, left, 0.0).sum() / count, 0.0)
    return torch.where(n >= 2, (deviation.square().sum() * (count - 1) / count).sqrt(), torch.nan)


def _along(vectors: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """[R] float64: ⟨G_j, Σ_i w_i G_i⟩."""
    result = torch.zeros_like(weights)
    for start in range(0, vectors.shape[1], GRAM_COLUMNS):
        part = vectors[:, start:start + GRAM_COLUMNS].double()
        result += part @ (weights @ part)
    return result


def _of_prompt(gram: torch.Tensor, correct: torch.Tensor, weights: torch.Tensor, along: torch.Tensor | None,
               noise: torch.Tensor) -> torch.Tensor:
    """[4]: alignment, in sample, stderr, and the in-sample figure of the prompt's own part of D alone.

    ``along`` [n]: ⟨G_j, D⟩ with the whole of D.
    """
    n = len(gram)
    outside = torch.zeros_like(weights) if along is None else along - gram @ weights
    member = torch.stack([~correct, correct]).to(gram)  # [2, n]
    # One row for all responses, and one without each of them.
    kept = torch.cat([torch.ones(1, n).to(gram), 1 - torch.eye(n).to(gram)])  # [1 + n, n]
    classes = kept[:, None] * member  # [1 + n, 2, n]
    count = classes.sum(2)
    scale = (member.sum(1) / count.clamp(min=1)) @ member  # a class without one of its own stands for the whole
    weighted = weights * kept * scale
    means = classes / count.clamp(min=1)[..., None]
    side = means[:, 1] - means[:, 0]
    itself = (weighted @ gram * side).sum(1)
    in_sample = itself + side @ outside

    squares, others = gram.diagonal(), classes @ gram  # ‖G_i‖², ⟨G_i, S_c⟩
    spread = (squares - others / count.clamp(min=1)[..., None]) / (count - 1).clamp(min=1)[..., None]
    spread = torch.where(count[..., None] == 1, noise[:, None], spread)
    own = (weighted[:, None] * classes * spread).sum(2)
    alignment = in_sample - (own[:, 1] - own[:, 0])

    sizes = member.sum(1)
    replicates = alignment[1:]
    deviation = replicates - ((member @ replicates) / sizes.clamp(min=1)) @ member
    variance = (member @ deviation.square() * (sizes - 1) / sizes.clamp(min=1)).sum()
    variance = torch.where((sizes >= 2).all(), variance, torch.nan)
    return torch.stack([alignment[0], in_sample[0], variance.sqrt(), itself[0]])

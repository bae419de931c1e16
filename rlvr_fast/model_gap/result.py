"""What a ModelGap returns: the gap over all tracked weights, and what share of the model that is."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import ClassVar

import torch

from rlvr_fast import _validate as check
from rlvr_fast.estimates import Estimated, GapEstimate, estimate_gap
from rlvr_fast.gap import Gap
from rlvr_fast.model_gap.collected import JoinedResponses
from rlvr_fast.model_gap.interference import Interference
from rlvr_fast.model_gap.step_alignment import StepAlignment, align, checked_weights
from rlvr_fast.moments import Moments, ResponseGradients, Responses
from rlvr_fast.rollouts import Rollouts


@dataclass(frozen=True, eq=False, repr=False)
class Coverage:
    """How much of the model's gradient the gap is about.

    Attributes:
        tracked: names of the covered parameters.
        missing: name -> reason, for trainable parameters that are not.
        norm_sq: name -> squared norm of ``param.grad`` when the probe closed (of the probe's own gradient where there
            was no training backward), scalar tensors.
    """

    tracked: tuple[str, ...]
    missing: dict[str, str]
    norm_sq: dict[str, torch.Tensor]

    @property
    def share(self) -> float:
        """Share of ‖∇‖² in the tracked parameters; NaN without gradients. Synchronises."""
        total = sum((float(value) for value in self.norm_sq.values()), 0.0)
        own = sum((float(self.norm_sq[name]) for name in self.tracked if name in self.norm_sq), 0.0)
        return own / total if total > 0 else float("nan")

    def __repr__(self) -> str:
        lines = [f"Coverage(share={self.share:.4f} of ||grad||^2, parameters={len(self.tracked)}, "
                 f"missing={len(self.missing)})"]
        return "\n".join([*lines, *(f"  {name}: {reason}" for name, reason in self.missing.items())])


@dataclass(frozen=True, eq=False, repr=False)
class ModelGapResult(Estimated):
    """The gradient gap of every prompt over a model's weights. The names are those of ``Gap``.

    A prompt whose responses all have coefficient 0 in the training loss (one class only) was not measured: its class
    sizes are known, its norms are NaN, and it lends no noise to others.

    Attributes:
        method: "segmented", "ghost", "sketch" or "exact".
        source: "training", "probe" or "mixed": which backward the gradients were taken from.
        length_norm: whether each response's gradient was divided by its length.
        coefficients: [R] float64, c_i of each response in the training loss; 1 where probed.
        coverage: see Coverage.
        measured: the Gap of the measured prompts alone. With "sketch" its vectors are sketches: inner products with
            each other are unbiased, coordinates mean nothing.
        measured_prompts: [P] bool.
        estimate: GapEstimate over all P prompts.
        alignment: [P] float64 ⟨direction, g⁺ − g⁻⟩ [paper A], None without a direction. A direction made from the
            same rollouts makes it an overestimate: see ``step_alignment``.
        predicted_log_odds_gain: [P] float64, first order: logit J(θ + Δθ) − logit J(θ) = ⟨Δθ, g⁺ − g⁻⟩ + O(‖Δθ‖²)
            [derived], always without length normalisation. ``scan_step`` has no such error.
        predicted_log_odds_gain_stderr: [P] over the responses, for a direction that is not made from them; a class of
            one borrows the other prompts' variance.
    """

    method: str
    source: str
    length_norm: bool
    coefficients: torch.Tensor
    coverage: Coverage
    measured: Gap
    measured_prompts: torch.Tensor
    estimate: GapEstimate
    alignment: torch.Tensor | None
    predicted_log_odds_gain: torch.Tensor | None
    predicted_log_odds_gain_stderr: torch.Tensor | None
    prompt_ids: tuple[Hashable, ...]
    _lengths: torch.Tensor
    _prompt_index: torch.Tensor
    _parameter_grams: Callable[[], dict[str, list[torch.Tensor]]]

    level: ClassVar[str] = "model"

    @property
    def moments(self) -> Moments:
        return self.measured.moments

    @cached_property
    def gram(self) -> tuple[torch.Tensor | None, ...]:
        """Per prompt ⟨G_i, G_j⟩ [n, n] float64, rows in rollout order; None for a prompt that was not measured."""
        grams = iter(self.measured.gram)
        return tuple(next(grams) if yes else None for yes in self.measured_prompts.tolist())

    @cached_property
    def parameter_norm_sq(self) -> dict[str, torch.Tensor]:
        """Per tracked parameter the unbiased ‖g⁺ − g⁻‖² of each prompt: [P] float64. They add up to ``norm_sq``."""
        responses = self.measured.moments.responses
        return {name: _spread(estimate_gap(Moments.from_gram(responses, grams)).norm_sq, self.measured_prompts)
                for name, grams in self._parameter_grams().items()}

    @property
    def vector(self) -> torch.Tensor | None:
        """[P, K] float32 sketches of g⁺ − g⁻ for method "sketch", NaN where not defined; None for the others."""
        own = self.measured.vector
        if own is None:
            return None
        return own.new_full((len(self.prompt_ids), own.shape[1]), torch.nan).index_copy(
            0, self.measured_prompts.nonzero().squeeze(1), own)

    def interference(self) -> torch.Tensor:
        """⟨gap_p, gap_q⟩ between prompts: [P, P] float64, NaN where not defined.

        Unbiased: different prompts have independent noise, and the diagonal is ``norm_sq``. Negative entries are
        prompts that a common step serves at each other's cost: see ``conflicts``.

        Raises:
            ValueError: for methods other than "sketch", which see no two prompts together.
        """
        if self.measured.gradients is None:
            raise ValueError(f"interference needs method 'sketch', method {self.method!r} has no vectors")
        both = self.measured_prompts[:, None] & self.measured_prompts
        products = _spread(self.measured._vector_products, both).diagonal_scatter(self.norm_sq)
        return torch.where(self.defined[:, None] & self.defined, products, torch.nan)

    def conflicts(self, *, z: float = 2.0) -> Interference:
        """``interference`` made readable: cosines between prompts, and who costs whom.

        Args:
            z: a prompt whose gap norm is not z standard errors above 0 has no cosine.
        """
        significant = self.norm_sq > check.positive("z", z) * self.stderr
        return Interference(self.interference(), significant, self.prompt_ids)

    def step_alignment(self, weights: torch.Tensor | None = None, *, learning_rate: float = 1.0,
                       scope: str = "batch") -> StepAlignment:
        """Alignment of each gap with a plain gradient step on these same rollouts, self-influence removed.

        For D = Σ_i w_i ∇log π(o_i), restricted to the tracked parameters; ``rlvr_fast/model_gap/step_alignment.py`` has
        the estimator and why it is unbiased. Steps that are no such sum (Adam, clipping by a norm) are not covered:
        give ``ModelGap`` a direction from elsewhere for those.

        Args:
            weights: [R] float, w_i of every response; they may depend on verdicts and on response i, on no other
                response. By default those of the loss, −learning_rate · c_i, where the gradients came from its
                backward: the SGD step on the accumulated loss.
            learning_rate: of the default weights; divided by the number of ranks where these average gradients.
            scope: "batch": D is the sum over all responses, which takes method "sketch" (its noise comes on top of
                ``stderr``). "prompt": over the responses of each prompt itself, for any method.

        Raises:
            ValueError, TypeError: naming the argument, what came and what was expected.
        """
        gradients = self.measured.gradients if check.choice("scope", scope, ("batch", "prompt")) == "batch" else None
        if scope == "batch" and gradients is None:
            raise ValueError(f"scope must be 'prompt' for method {self.method!r}, which sees no two prompts together: "
                             "use method 'sketch' for 'batch'")
        rate = check.positive("learning_rate", learning_rate)
        if weights is None:
            if self.source != "training":
                raise ValueError("weights must be given where gradients came from a probe backward, which does not "
                                 "know the loss's coefficients")
            weights = torch.where(self._lengths > 0, -rate * self.coefficients, 0.0)
        unmeasured = ~self.measured_prompts.cpu()[self._prompt_index]
        weights = checked_weights(weights, unmeasured)
        if self.length_norm:  # G_i = ∇log π / |o_i|
            weights = weights * self._lengths
        *columns, error = align(self.moments, self.measured.gram, weights[~unmeasured].to(self.moments.sq.device),
                                None if gradients is None else gradients.vectors)
        alignment, in_sample, stderr = (_spread(column, self.measured_prompts) for column in columns)
        return StepAlignment(scope, alignment, in_sample, stderr, error, self.prompt_ids)

    def summary(self) -> dict[str, float]:
        """Flat metrics for any logger: those of ``Gap.summary``, the coverage, and the model's own. Synchronises.

        Alignment and predicted gain are means over the prompts; for ``rlvr/model/conflict_*`` see ``Interference``.
        """
        result = self.measured.summary()
        rate, n = self.success_rate, max(len(self.prompt_ids), 1)
        counts = {"mixed": self.defined, "solved": rate == 1, "failed": rate == 0, "pooled": self.pooled}
        result |= {f"rlvr/group/frac_{name}": float(mask.sum()) / n for name, mask in counts.items()}
        result["rlvr/group/p_mean"] = float(rate.mean())
        result["rlvr/gap/coverage"] = self.coverage.share
        result |= self._along_direction()
        if self.measured.gradients is not None:
            result |= self.conflicts().summary()
        return result

    def _along_direction(self) -> dict[str, float]:
        """Means over the prompts with a gap, and the error of the predicted gain's over their responses."""
        alignment, gain, error = self.alignment, self.predicted_log_odds_gain, self.predicted_log_odds_gain_stderr
        if alignment is None or gain is None or error is None:  # all three, without a direction
            return {}
        own = error[self.defined]
        return {"rlvr/model/alignment": float(alignment[self.defined].mean()),
                "rlvr/model/predicted_log_odds_gain": float(gain[self.defined].mean()),
                "rlvr/model/predicted_log_odds_gain_stderr": float(own.norm() / len(own))}  # 0/0 is NaN

    def __repr__(self) -> str:
        head = (f"ModelGapResult(method={self.method}, source={self.source}, length_norm={self.length_norm}, "
                f"coverage={self.coverage.share:.4f}, prompts={len(self.prompt_ids)}, "
                f"measured={int(self.measured_prompts.sum())})")
        lines = [head, *repr(self.measured).splitlines()[1:]]
        if along := self._along_direction():
            alignment, gain, error = along.values()
            lines.append(f"direction: alignment {alignment:.4g}, log-odds gain {gain:.4g} ± {error:.2g} (first order)")
        if self.measured.gradients is not None:
            lines.append(repr(self.conflicts()))
        return "\n".join(lines)


def build(rollouts: Rollouts | JoinedResponses, *, method: str, source: str, length_norm: bool,
          coefficients: torch.Tensor, coverage: Coverage, grams: dict[str, torch.Tensor] | None,
          sketches: dict[str, torch.Tensor] | None, dots: dict[str, torch.Tensor], direction: bool) -> ModelGapResult:
    """Scale what was collected by 1/c_i (and 1/|o_i|) and estimate the gap of the measured prompts.

    Args:
        coefficients: [R] float64 on the host; 0 marks a response that was not measured.
        grams: per parameter [R, n_max]; sketches: per parameter [R, k]: one of the two.
        dots: per parameter [R], inner products with the direction.
    """
    keep = [prompt for prompt, members in enumerate(rollouts.members)
            if len(members) and bool((coefficients[list(members)] != 0).all())]
    members = [rollouts.members[prompt] for prompt in keep]
    kept = sorted(response for prompt in members for response in prompt)
    number = {response: p for p, prompt in enumerate(members) for response in prompt}
    device = next(iter((grams or sketches or {}).values())).device
    responses = Responses(rollouts.correct[kept].to(device),
                          torch.tensor([number[i] for i in kept], dtype=torch.int64, device=device),
                          tuple(rollouts.prompt_ids[prompt] for prompt in keep))
    sizes = tuple(len(prompt) for prompt in members)
    lengths = rollouts.lengths.double().cpu()
    unscaled = 1.0 / torch.where(coefficients == 0, 1.0, coefficients)  # G_i without length normalisation
    scale = (unscaled / lengths.clamp(min=1) if length_norm else unscaled).to(device)

    def matrices(table: torch.Tensor) -> list[torch.Tensor]:
        return [table[list(own), :len(own)] * scale[list(own), None] * scale[list(own)] for own in members]

    if grams is not None:
        def parameter_grams() -> dict[str, list[torch.Tensor]]:
            return {name: matrices(table) for name, table in grams.items()}

        total = tuple(matrices(reduce(torch.add, grams.values())))
        moments = Moments.from_gram(responses, total)
        gap = Gap("model", length_norm, estimate_gap(moments), moments, sizes, summed_grams=total)
    else:
        assert sketches is not None
        scaled = {name: table[kept] * scale[kept, None].to(table.dtype) for name, table in sketches.items()}

        def parameter_grams() -> dict[str, list[torch.Tensor]]:
            return {name: list(ResponseGradients(responses, table).grams(sizes)) for name, table in scaled.items()}

        gradients = ResponseGradients(responses, torch.cat(list(scaled.values()), 1))
        moments, means = gradients.moments(), gradients.class_means()
        gap = Gap("model", length_norm, estimate_gap(moments), moments, sizes, gradients=gradients,
                  correct_mean=means[:, 1], incorrect_mean=means[:, 0])
    mask = torch.zeros(rollouts.n_prompts, dtype=torch.bool, device=device)
    mask[keep] = True
    alignment = gain = error = None
    if direction:
        along = sum(dots.values(), torch.zeros(rollouts.n_responses, dtype=torch.float64, device=device))
        alignment = _spread(_difference(responses, (along * scale)[kept])[0], mask)
        gain, error = (_spread(column, mask) for column in _difference(
            responses, (along * unscaled.to(device))[kept]))
    return ModelGapResult(method, source, length_norm, coefficients, coverage, gap, mask,
                          _over_all_prompts(gap.estimate, mask, rollouts, device), alignment, gain, error,
                          rollouts.prompt_ids, lengths, rollouts.prompt_index.cpu(), parameter_grams)


def _difference(responses: Responses, slopes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean slope [R] of the correct minus the incorrect responses and its standard error: [P] each."""
    moments = ResponseGradients(responses, slopes[:, None]).moments()
    means = responses.class_sum(slopes) / moments.count
    # The squared difference of two means is too large by just its variance.
    return means[:, 1] - means[:, 0], estimate_gap(moments).bias.sqrt()


def _over_all_prompts(estimate: GapEstimate, mask: torch.Tensor, rollouts: Rollouts | JoinedResponses,
                      device: torch.device) -> GapEstimate:
    sizes = torch.zeros(2, rollouts.n_prompts, dtype=torch.int64, device=device)
    index, correct = rollouts.prompt_index.to(device), rollouts.correct.to(device).long()
    sizes.view(-1).index_add_(0, correct * rollouts.n_prompts + index, torch.ones_like(index))
    spread = {name: _spread(getattr(estimate, name), mask) for name in estimate._fields[2:]}
    return GapEstimate(sizes[1], sizes[0], **spread)


def _spread(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The values of the measured prompts (or of pairs of them) at their places, NaN (or false) elsewhere."""
    empty = values.new_zeros(mask.shape) if values.dtype == torch.bool else values.new_full(mask.shape, torch.nan)
    return empty.masked_scatter(mask, values)

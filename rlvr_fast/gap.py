"""The gradient gap of every prompt: from hidden states and an lm_head to norms with error bars."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from rlvr_fast import _validate as check
from rlvr_fast import backends
from rlvr_fast.backends import TokenPass
from rlvr_fast.batch_gap import batch_norm_sq, batch_summary, vector_products
from rlvr_fast.distributed import checksum
from rlvr_fast.estimates import Estimated, GapEstimate, estimate_gap
from rlvr_fast.head import Head, check_values
from rlvr_fast.moments import Moments, ResponseGradients, Responses
from rlvr_fast.rollouts import Rollouts
from rlvr_fast.token_stats import TokenStats, check_pass
from rlvr_fast.vocabulary_parallel import VocabularyShard, agreement, check_shard

LEVELS = ("logits", "hidden", "head")
SUM_BYTES = 64 << 20  # [responses, V] float32 score sums held at a time, unless they are the result


@dataclass(frozen=True, eq=False, repr=False)
class Gap(Estimated):
    """The gradient gap g⁺ − g⁻ of P prompts [paper A], estimated from their responses.

    Attributes:
        level: parameters that the gradients belong to: "logits", "hidden" or "head".
        length_norm: whether each response's gradient was divided by its length.
        prompt_ids: the P prompt ids, in the order of every [P] tensor below.
        n_correct, n_incorrect: [P] int64 class sizes.
        success_rate: [P] float64 n₊ / (n₊ + n₋).
        norm_sq: [P] float64, unbiased ‖g⁺ − g⁻‖²; may be negative where there is no gap to see.
        norm_sq_naive: [P] float64, the plug-in value, biased up by the noise.
        stderr: [P] float64, jackknife standard error of ``norm_sq``. It knows the sampled responses only: where those
            of a class are all equal, their share of it is 0.
        defined: [P] bool, both classes present; norms and errors are NaN where not.
        pooled: [P] bool, a class of one response borrowed the noise of the other prompts; NaN if there was none.
        correct_mean, incorrect_mean, vector: [P, K] float32 class means and their difference for the levels that
            have vectors (K = V or D), NaN where the class is empty; None at level "head". At level "logits" of a
            sharded vocabulary these, and ``gradients``, hold this rank's columns; all other figures are whole.
        stats: the TokenStats of the same pass.
        moments: the inner products behind all of this; add and merge them across layers, shards and batches.
        sizes: number of responses of each prompt.
        gradients: the response gradients, [R, K], for the levels that have vectors; else None.
        vocabulary: the shard whose columns the vectors are; None if they are whole.
    """

    level: str
    length_norm: bool
    estimate: GapEstimate
    moments: Moments
    sizes: tuple[int, ...]
    stats: TokenStats | None = None
    gradients: ResponseGradients | None = None
    correct_mean: torch.Tensor | None = None
    incorrect_mean: torch.Tensor | None = None
    summed_grams: tuple[torch.Tensor, ...] | None = None
    summed_products: torch.Tensor | None = None
    vocabulary: VocabularyShard | None = None

    @property
    def prompt_ids(self) -> tuple[Hashable, ...]:
        return self.moments.responses.prompt_ids

    @property
    def vector(self) -> torch.Tensor | None:
        if self.correct_mean is None or self.incorrect_mean is None:
            return None
        return self.correct_mean - self.incorrect_mean

    @cached_property
    def gram(self) -> tuple[torch.Tensor, ...]:
        """Per prompt the Gram matrix of its responses' gradients, [n, n] float64, rows in rollout order."""
        if self.summed_grams is not None:
            return self.summed_grams
        assert self.gradients is not None  # every gap has one or the other
        return self.gradients.grams(self.sizes)

    @cached_property
    def _vector_products(self) -> torch.Tensor:
        """⟨gap_p, gap_q⟩: [P, P] float64."""
        if self.summed_products is not None:
            return self.summed_products
        assert self.vector is not None  # asked for by those who have vectors
        return vector_products(self.vector)

    def batch_norm_sq(self, weights: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Debiased ‖Σ_p w_p gap_p‖² over the defined prompts with its jackknife error over prompts [derived].

        Args:
            weights: [P] float, at least 0; normalised to sum 1 over the defined prompts. Uniform by default.

        Returns:
            (norm_sq, stderr), float64 scalars; NaN if no defined prompt has weight, the error also with a single one.

        Raises:
            ValueError: at level "head", which keeps no vectors.
        """
        if self.vector is None:
            raise ValueError(f"batch_norm_sq needs gap vectors, level {self.level!r} has none")
        usable = self.defined & self.norm_sq.isfinite()
        if weights is None:
            weights = usable.double()
        else:
            weights = check.tensor("weights", weights, shape=(len(self.prompt_ids),), device=usable.device).double()
            if weights.device.type == "cpu" and not (weights.isfinite() & (weights >= 0)).all():
                raise ValueError(f"weights must be finite and at least 0, got {weights.tolist()}")
            weights = torch.where(usable, weights, 0.0)
        return batch_norm_sq(self._vector_products, torch.where(usable, self.estimate.bias, 0.0), weights)

    def alignment(self, direction: torch.Tensor) -> torch.Tensor:
        """Δμ = ⟨direction, g⁺ − g⁻⟩ per prompt [paper A]: [P] float64, NaN where not defined.

        A direction made from the same rollouts (their own gradient step) makes this an overestimate.

        Args:
            direction: [K], in the coordinates of ``vector``. Where these are one rank's columns, the call is collective
                and the result whole.
        """
        if self.vector is None:
            raise ValueError(f"alignment needs gap vectors, level {self.level!r} has none")
        check.tensor("direction", direction, shape=(self.vector.shape[1],), device=self.vector.device,
                     dtypes=(*check.FLOAT_DTYPES, torch.float64))
        products = self.vector.double() @ direction.double()
        return products if self.vocabulary is None else self.vocabulary.sum(products)

    def summary(self) -> dict[str, float]:
        """Flat metrics for any logger. Synchronises with the device.

        ``rlvr/gap/norm`` is the root of the mean unbiased squared norm over the defined prompts, clipped at 0.
        """
        return batch_summary(self)

    def __repr__(self) -> str:
        head = (f"Gap(level={self.level}, length_norm={self.length_norm}, prompts={len(self.prompt_ids)}, "
                f"defined={int(self.defined.sum())})")
        lines = [head, f"{'prompt':>12} {'correct':>8} {'wrong':>6} {'norm²':>11} {'± stderr':>10} {'plug-in':>10}"]
        columns = zip(self.prompt_ids, self.n_correct.tolist(), self.n_incorrect.tolist(), self.norm_sq.tolist(),
                      self.stderr.tolist(), self.norm_sq_naive.tolist(), strict=True)
        for row, (identity, right, wrong, norm_sq, stderr, naive) in enumerate(columns):
            if row == 10:
                lines.append(f"... {len(self.prompt_ids) - row} more")
                break
            lines.append(f"{identity!s:>12.12} {right:8d} {wrong:6d} {norm_sq:11.4g} {stderr:10.3g} {naive:10.4g}")
        return "\n".join(lines)


def gradient_gap(hidden: torch.Tensor, weight: torch.Tensor, rollouts: Rollouts, *, level: str = "hidden",
                 length_norm: bool = True, bias: torch.Tensor | None = None, temperature: float = 1.0,
                 softcap: float | None = None, vocabulary: VocabularyShard | None = None, backend: str = "auto") -> Gap:
    """The gradient gap of every prompt, with error bars.

    Args:
        hidden: final hidden states at the positions that predict the response tokens: [N, D] in rollout order, or in
            the layout the rollouts were made from ([B, T, D], or [M, D] packed). float32, bfloat16 or float16.
        weight: [V, D] lm_head weight, same dtype.
        rollouts: the responses, their prompts and classes.
        level: gradients with respect to a bias on the raw head output ("logits", K = V), to a vector added to every
            hidden state ("hidden", K = D; one N·V·D product in all), or to the lm_head weight itself ("head"; one
            product more, no vectors).
        length_norm: divide each response's gradient by its length, as 1/|o| losses do. Empty responses have gradient 0.
        bias, temperature, softcap, backend: as in ``token_stats``. The temperature should be the sampling one.
        vocabulary: this rank's shard of the vocabulary, where ``weight`` and ``bias`` are its rows only. The call is
            collective then: an all-gather of 24 bytes per token, and one all-reduce of [R, D] ("hidden") or of the
            response Gram matrices ("head", and "logits" with that of the P gap vectors, whose columns stay sharded).

    Returns:
        Gap. A prompt with one class only has no gap: NaN, ``defined`` false, and it enters no batch figure.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    with agreement(vocabulary) as same:
        check.choice("level", level, LEVELS)
        check.flag("length_norm", length_norm)
        if not isinstance(rollouts, Rollouts):
            raise TypeError(f"rollouts must be rlvr_fast.Rollouts, got {type(rollouts).__name__}")
        hidden = rollouts.pack(hidden, "hidden").detach()
        head = Head.checked(hidden, weight.detach() if isinstance(weight, torch.Tensor) else weight, bias, temperature,
                            softcap, vocabulary)
        if rollouts.vocabulary_range[1] >= head.whole_vocabulary_size:
            raise ValueError(f"rollouts must hold tokens below V = {head.whole_vocabulary_size} (the rows of weight), "
                             f"got {rollouts.vocabulary_range[1]}")
        check_values(hidden)
        backends.resolve(backend, hidden.device)
        same("gradient_gap", hidden, rollouts.tokens, head, f"level {level}", f"length_norm {length_norm}",
             f"responses #{checksum((rollouts.bounds, rollouts.members))}")
    coefficients = _token_coefficients(rollouts, length_norm)
    responses = Responses(rollouts.correct, rollouts.prompt_index, rollouts.prompt_ids)
    sizes = tuple(len(prompt) for prompt in rollouts.members)
    with torch.no_grad():
        if level == "head":
            spans = [[(rollouts.bounds[i], rollouts.bounds[i + 1]) for i in prompt] for prompt in rollouts.members]
            run = backends.select("head_pass_with_gram", backend, hidden.device)
            token_pass, grams = run(hidden, head.local_ids(rollouts.tokens), head, coefficients, spans, head.merge)
            check_pass(token_pass, rollouts.tokens)
            grams = tuple(grams if vocabulary is None else vocabulary.sums(grams))
            moments = Moments.from_gram(responses, grams)
            return Gap(level, length_norm, estimate_gap(moments), moments, sizes, TokenStats.from_pass(token_pass),
                       summed_grams=grams)
        token_pass, vectors = _vectors(hidden, head, rollouts, coefficients, level, backend)
        gradients = ResponseGradients(responses, vectors)
        return gap_from_gradients(gradients, level=level, length_norm=length_norm, sizes=sizes,
                                  stats=TokenStats.from_pass(token_pass),
                                  vocabulary=vocabulary if level == "logits" else None)


def gap_from_gradients(gradients: ResponseGradients, *, level: str, length_norm: bool,
                       sizes: Sequence[int] | None = None, stats: TokenStats | None = None,
                       vocabulary: VocabularyShard | None = None) -> Gap:
    """The gap of response gradients that were added or merged by the caller (micro-batches, ranks, shards).

    Args:
        gradients: [R, K] with their responses. level, length_norm: how they were made; recorded in the result.
        sizes: number of responses of each prompt, if the host knows it; asking the device synchronises.
        stats: passed through.
        vocabulary: the shard whose coordinates these gradients are, where each rank has its own; collective then.
    """
    if vocabulary is not None:
        check_shard(vocabulary)
    if sizes is None:
        sizes = gradients.responses.prompt_index.bincount(minlength=gradients.responses.n_prompts).tolist()
    sizes = gradients.responses.check_sizes(sizes)
    means = gradients.class_means()
    grams: tuple[torch.Tensor, ...] | None = None
    products: torch.Tensor | None = None
    if vocabulary is None:
        moments = gradients.moments()
    else:
        *whole, products = vocabulary.sums([*gradients.grams(sizes), vector_products(means[:, 1] - means[:, 0])])
        grams, moments = tuple(whole), Moments.from_gram(gradients.responses, whole)
    return Gap(level, length_norm, estimate_gap(moments), moments, sizes, stats, gradients,
               correct_mean=means[:, 1], incorrect_mean=means[:, 0], summed_grams=grams, summed_products=products,
               vocabulary=vocabulary)


def _token_coefficients(rollouts: Rollouts, length_norm: bool) -> torch.Tensor:
    """[N] float32: 1/|o_i| or 1."""
    if not length_norm:
        return torch.ones(rollouts.n_tokens, device=rollouts.device)
    return (1.0 / rollouts.lengths.clamp(min=1)).float()[rollouts.response_index]


def _vectors(hidden: torch.Tensor, head: Head, rollouts: Rollouts, coefficients: torch.Tensor, level: str,
             backend: str) -> tuple[TokenPass, torch.Tensor]:
    """Response gradients [R, K]: score sums, for "hidden" taken through the lm_head a block of responses at a time."""
    run = backends.select("head_pass_with_sums", backend, hidden.device)
    through_head = backends.select("through_head", backend, hidden.device)
    n_responses, tokens = rollouts.n_responses, head.local_ids(rollouts.tokens)
    largest = head.vocabulary_size if head.shard is None else head.shard.largest  # ranks must cut the same blocks
    block = max(1, n_responses if level == "logits" else SUM_BYTES // (4 * largest))
    passes: list[TokenPass] = []
    blocks: list[torch.Tensor] = []
    for start in range(0, n_responses, block):
        stop = min(start + block, n_responses)
        rows = slice(rollouts.bounds[start], rollouts.bounds[stop])
        spans = rollouts.cu_seqlens[start:stop + 1] - rollouts.bounds[start]
        token_pass, sums = run(hidden[rows], tokens[rows], head, coefficients[rows], spans, merge=head.merge)
        passes.append(check_pass(token_pass, rollouts.tokens[rows]))
        blocks.append(sums if level == "logits" else through_head(sums, head.weight))
    if not passes:
        empty = hidden.new_empty(0, dtype=torch.float32)
        width = head.vocabulary_size if level == "logits" else head.hidden_size
        return TokenPass(*[empty] * len(TokenPass._fields)), empty.new_empty(0, width)
    vectors = torch.cat(blocks)
    return TokenPass(*map(torch.cat, zip(*passes, strict=True))), vectors if level == "logits" else head.total(vectors)

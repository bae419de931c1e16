"""Moments and response gradients: what they hold, how they add, how they merge; and the estimates made from them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from policies import within

import rlvr_fast.reference as ref
from rlvr_fast import Moments, ResponseGradients, Responses, gap_from_gradients
from rlvr_fast.estimates import estimate_gap

WIDTH = 5
TIGHT = {"rtol": 1e-12, "atol": 1e-12}  # float64 sums of float32 vectors


def responses_of(cells: list[tuple[int, bool]]) -> Responses:
    """Responses from (prompt, correct) pairs; prompts numbered by first appearance, ids "q<prompt>"."""
    numbers: dict[int, int] = {}
    index = [numbers.setdefault(prompt, len(numbers)) for prompt, _ in cells]
    return Responses(torch.tensor([c for _, c in cells], dtype=torch.bool), torch.tensor(index, dtype=torch.int64),
                     tuple(f"q{prompt}" for prompt in numbers))


def random_gradients(cells: list[tuple[int, bool]], seed: int = 0, width: int = WIDTH) -> ResponseGradients:
    vectors = torch.randn(len(cells), width, generator=torch.Generator().manual_seed(seed))
    return ResponseGradients(responses_of(cells), vectors)


def classes(gradients: ResponseGradients, prompt: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(correct, incorrect) rows of one prompt in float64."""
    own = gradients.responses.prompt_index == prompt
    right = gradients.responses.correct
    return gradients.vectors[own & right].double(), gradients.vectors[own & ~right].double()


CELLS = st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=0, max_size=16)
RAGGED = [(0, True), (1, False), (0, False), (2, True), (1, True), (0, True), (1, False), (2, True), (0, False),
          (3, False), (1, True), (0, True), (1, True), (4, True), (4, False), (4, False)]


# -- what they hold ---------------------------------------------------------------------------------------------------


def test_moments_are_the_inner_products():
    gradients = random_gradients(RAGGED)
    moments = gradients.moments()
    for i, (prompt, _) in enumerate(RAGGED):
        plus, minus = classes(gradients, gradients.responses.prompt_ids.index(f"q{prompt}"))
        own = gradients.vectors[i].double()
        assert within(moments.sq[i], own @ own, **TIGHT)
        assert within(moments.dot_class[i], torch.stack([own @ ref.class_sum(minus), own @ ref.class_sum(plus)]),
                      **TIGHT)
    for prompt in range(gradients.responses.n_prompts):
        plus, minus = classes(gradients, prompt)
        sums = torch.stack([ref.class_sum(minus), ref.class_sum(plus)])
        assert moments.count[prompt].tolist() == [len(minus), len(plus)]
        assert within(moments.square[prompt], torch.stack([ref.class_square(minus), ref.class_square(plus)]), **TIGHT)
        assert within(moments.product[prompt], sums @ sums.T, **TIGHT)


def test_moments_of_wide_gradients_take_every_coordinate():
    """More coordinates than are taken to float64 at a time, with the last ones the largest."""
    width = 2 * 8192 + 3
    gradients = random_gradients(RAGGED[:5], width=width)
    gradients.vectors[:, -3:] *= 100
    moments, grams = gradients.moments(), gradients.grams([2, 2, 1])
    vectors = gradients.vectors.double()
    assert within(moments.sq, vectors.square().sum(1), rtol=1e-12)
    index = [0, 2]  # the responses to q0
    assert within(grams[0], vectors[index] @ vectors[index].T, rtol=1e-12)


def test_class_means_are_nan_only_where_a_class_is_empty():
    gradients = random_gradients(RAGGED)
    means = gradients.class_means()
    for prompt in range(5):
        plus, minus = classes(gradients, prompt)
        for which, rows in enumerate((minus, plus)):
            if len(rows):
                assert within(means[prompt, which], rows.mean(0), rtol=1e-5, atol=1e-6)  # a float32 mean
            else:
                assert means[prompt, which].isnan().all()


def test_moments_from_grams_are_the_moments():
    gradients = random_gradients(RAGGED)
    sizes = gradients.responses.prompt_index.bincount().tolist()
    from_gram = Moments.from_gram(gradients.responses, gradients.grams(sizes))
    assert within(from_gram.sq, gradients.moments().sq, **TIGHT)
    assert within(from_gram.dot_class, gradients.moments().dot_class, **TIGHT)


@pytest.mark.parametrize("cells", [[], [(0, True)], [(0, True), (0, True)]])
def test_batches_without_a_gap(cells):
    gradients = random_gradients(cells)
    gap = gap_from_gradients(gradients, level="hidden", length_norm=True)
    assert gap.norm_sq.shape == (gradients.responses.n_prompts,)
    assert gap.norm_sq.isnan().all()
    assert not gap.defined.any()
    assert "responses=" in repr(gradients)
    assert "prompts=" in repr(gap.moments)


# -- adding and merging -----------------------------------------------------------------------------------------------


def test_adding_gradients_joins_tokens_of_the_same_responses():
    one, two = random_gradients(RAGGED, 1), random_gradients(RAGGED, 2)
    assert torch.equal((one + two).vectors, one.vectors + two.vectors)


@pytest.mark.parametrize("cuts", [(2,), (1, 3), (1, 2, 3, 4)])
def test_adding_moments_joins_coordinates(cuts):
    whole = random_gradients(RAGGED)
    shards = [ResponseGradients(whole.responses, part).moments() for part in whole.vectors.tensor_split(cuts, 1)]
    total = shards[0]
    for shard in shards[1:]:
        total = total + shard
    assert within(total.sq, whole.moments().sq, **TIGHT)
    assert within(total.dot_class, whole.moments().dot_class, **TIGHT)
    for name in ("norm_sq", "norm_sq_naive", "stderr"):
        one, other = getattr(estimate_gap(total), name), getattr(estimate_gap(whole.moments()), name)
        assert torch.equal(one.isnan(), other.isnan())
        assert within(one.nan_to_num(), other.nan_to_num(), rtol=1e-9, atol=1e-9)


@given(CELLS.filter(len), st.data())
def test_merging_any_split_of_the_responses_gives_the_whole(cells, data):
    """Micro-batches may cut through prompts and reorder responses: estimates agree prompt by prompt, NaN for NaN."""
    whole = random_gradients(cells)
    owner = data.draw(st.lists(st.integers(0, 2), min_size=len(cells), max_size=len(cells)))
    piles = [[i for i, own in enumerate(owner) if own == pile] for pile in range(3)]
    parts = [ResponseGradients(responses_of([cells[i] for i in pile]), whole.vectors[pile]) for pile in piles if pile]
    merged = ResponseGradients.merge(parts)
    one, other = estimate_gap(whole.moments()), estimate_gap(merged.moments())
    order = [merged.responses.prompt_ids.index(identity) for identity in whole.responses.prompt_ids]
    assert len(merged.responses.prompt_ids) == len(whole.responses.prompt_ids)
    for name in one._fields:
        left, right = getattr(one, name).double(), getattr(other, name)[order].double()
        assert torch.equal(left.isnan(), right.isnan()), name
        assert within(left.nan_to_num(), right.nan_to_num(), rtol=1e-9, atol=1e-9), name


def test_merging_moments_joins_different_prompts():
    whole = random_gradients(RAGGED)
    keep = [torch.tensor([prompt in group for prompt, _ in RAGGED]) for group in ((0, 2), (1, 3, 4))]
    parts = [ResponseGradients(responses_of([cell for cell, own in zip(RAGGED, mask.tolist(), strict=True) if own]),
                               whole.vectors[mask]).moments() for mask in keep]
    merged = Moments.merge(parts)
    assert merged.responses.prompt_ids == ("q0", "q2", "q1", "q3", "q4")
    order = [merged.responses.prompt_ids.index(identity) for identity in whole.responses.prompt_ids]
    assert within(merged.square[order], whole.moments().square, **TIGHT)
    assert within(merged.product[order], whole.moments().product, **TIGHT)


def test_what_cannot_be_joined_is_refused():
    gradients = random_gradients(RAGGED)
    other = random_gradients([(prompt, not right) for prompt, right in RAGGED])
    with pytest.raises(ValueError, match="same responses"):
        gradients + other
    with pytest.raises(ValueError, match="same responses"):
        gradients + random_gradients(RAGGED, width=WIDTH + 1)
    with pytest.raises(ValueError, match="same responses"):
        gradients.moments() + other.moments()
    with pytest.raises(ValueError, match="prompt occurs in two"):
        Moments.merge([gradients.moments(), gradients.moments()])
    with pytest.raises(ValueError, match="parts must hold at least one"):
        Moments.merge([])
    with pytest.raises(ValueError, match="parts must hold at least one"):
        ResponseGradients.merge([])
    with pytest.raises(ValueError, match="one width"):
        ResponseGradients.merge([gradients, random_gradients(RAGGED, width=WIDTH + 1)])
    with pytest.raises(ValueError, match="sizes must count"):
        gradients.grams([1, 2])
    with pytest.raises(TypeError):
        gradients + 1
    with pytest.raises(TypeError):
        gradients.moments() + 1


# -- estimates --------------------------------------------------------------------------------------------------------


@given(CELLS, st.integers(0, 99))
def test_estimates_match_the_reference(cells, seed):
    gradients = random_gradients(cells, seed)
    estimate = estimate_gap(gradients.moments())
    n_prompts = gradients.responses.n_prompts
    split = [classes(gradients, prompt) for prompt in range(n_prompts)]
    pooled = [ref.pooled_noise([pair[which] for pair in split]) for which in (0, 1)]
    for prompt, (plus, minus) in enumerate(split):
        assert (estimate.n_correct[prompt], estimate.n_incorrect[prompt]) == (len(plus), len(minus))
        both = len(plus) > 0 and len(minus) > 0
        assert estimate.defined[prompt] == both
        assert estimate.pooled[prompt] == (both and 1 in (len(plus), len(minus)))
        if not both:
            for name in ("norm_sq", "norm_sq_naive", "stderr", "bias"):
                assert getattr(estimate, name)[prompt].isnan(), name
            continue
        naive = ref.gap_norm_sq_naive(plus, minus)
        noise = [pool if len(rows) == 1 else ref.class_noise(rows)
                 for pool, rows in zip(pooled, (plus, minus), strict=True)]
        unbiased = ref.gap_norm_sq_given_noise(plus, minus, *noise)
        assert within(estimate.norm_sq_naive[prompt], naive, rtol=1e-10, atol=1e-10)
        if not unbiased.isfinite():  # nobody to borrow the noise from
            assert estimate.norm_sq[prompt].isnan()
            assert estimate.stderr[prompt].isnan()
            continue
        assert within(estimate.norm_sq[prompt], unbiased, rtol=1e-10, atol=1e-10)
        assert within(estimate.bias[prompt], naive - unbiased, rtol=1e-10, atol=1e-10)
        if not estimate.pooled[prompt]:
            assert within(estimate.norm_sq[prompt], ref.gap_norm_sq(plus, minus), rtol=1e-10, atol=1e-10)
            assert within(estimate.stderr[prompt], ref.gap_stderr(plus, minus), rtol=1e-9, atol=1e-9)
        elif len(plus) == len(minus) == 1:
            bound = sum(4 * unbiased.clamp(min=0) * share + 2 * share**2 for share in noise)
            assert within(estimate.stderr[prompt], bound.sqrt(), rtol=1e-9, atol=1e-9)


@given(st.permutations(range(len(RAGGED))))
def test_order_of_the_responses_does_not_matter(order):
    gradients = random_gradients(RAGGED)
    shuffled = ResponseGradients(responses_of([RAGGED[i] for i in order]), gradients.vectors[list(order)])
    one, other = estimate_gap(gradients.moments()), estimate_gap(shuffled.moments())
    prompts = [shuffled.responses.prompt_ids.index(identity) for identity in gradients.responses.prompt_ids]
    for name in one._fields:
        left, right = getattr(one, name).double(), getattr(other, name)[prompts].double()
        assert within(left.nan_to_num(-1.0), right.nan_to_num(-1.0), rtol=1e-9, atol=1e-9), name


def many_prompts(n_prompts: int, n_plus: int, n_minus: int, shift: float, generator: torch.Generator):
    """The same problem sampled over and over: K = 3 normal gradients, noise 1 per coordinate, means ``shift`` apart."""
    n = n_plus + n_minus
    correct = torch.arange(n).lt(n_plus).repeat(n_prompts)
    vectors = torch.randn(n_prompts * n, 3, generator=generator)
    vectors[:, 0] += shift * correct
    responses = Responses(correct, torch.arange(n_prompts).repeat_interleave(n), tuple(range(n_prompts)))
    return estimate_gap(ResponseGradients(responses, vectors).moments())


SAMPLED = [(4, 4, 0.0), (6, 6, 0.0), (3, 5, 0.5), (6, 2, 2.0), (2, 2, 1.0)]


@pytest.mark.parametrize(("n_plus", "n_minus", "shift"), SAMPLED)
def test_estimates_over_many_draws(n_plus, n_minus, shift, generator):
    """What 20,000 draws of a normal problem (tr Σ = tr Σ² = 3) must average to; 8 % is 4 standard errors of the widest.

    The linear part of the variance, 4 gapᵀΣgap (1/n₊ + 1/n₋), is estimated without bias. The rest of it,
    2 trΣ²/(n(n-1)) per class and 4 trΣ²/(n₊n₋), is not: the jackknife of a degenerate U-statistic gives
    2 (n-1)/(n-2) times the former (once it for n = 2, where replicates keep their noise) and twice the latter.
    """
    estimate = many_prompts(20000, n_plus, n_minus, shift, generator)
    noise, linear, cross = 3.0, 4 * shift**2 * (1 / n_plus + 1 / n_minus), 4 * 3 / (n_plus * n_minus)
    own = [2 * 3 / (n * (n - 1)) for n in (n_plus, n_minus)]
    factors = [2 * (n - 1) / (n - 2) if n > 2 else 1.0 for n in (n_plus, n_minus)]
    variance = linear + sum(own) + cross
    jackknife = linear + sum(f * v for f, v in zip(factors, own, strict=True)) + 2 * cross
    assert abs(estimate.norm_sq.mean() - shift**2) <= 4 * (variance / 20000) ** 0.5
    assert abs(estimate.bias.mean() - noise * (1 / n_plus + 1 / n_minus)) <= 0.02 * noise
    assert estimate.norm_sq.var() == pytest.approx(variance, rel=0.08)
    assert estimate.stderr.square().mean() == pytest.approx(jackknife, rel=0.08)


@pytest.mark.parametrize("shift", [0.0, 1.0, 3.0])
def test_error_of_a_single_response_is_an_upper_bound(shift, generator):
    """4 gap² tr Σ + 2 (tr Σ)² bounds the share of one normal response whatever the shape of Σ; here Σ = 1 and K = 3,
    so that the truth, 4 gap² + 6, is well below it. The noise comes from the other prompts' correct responses."""
    cells = [(True, False, False, False), (True, True, False, False)]
    correct = torch.tensor(cells).repeat(4000, 1).flatten()
    vectors = torch.randn(32000, 3, generator=generator)
    vectors[:, 0] += shift * correct
    responses = Responses(correct, torch.arange(8000).repeat_interleave(4), tuple(range(8000)))
    estimate = estimate_gap(ResponseGradients(responses, vectors).moments())
    single = estimate.norm_sq[estimate.pooled]
    assert len(single) == 4000
    assert abs(single.mean() - shift**2) <= 4 * (single.var() / 4000).sqrt()
    assert estimate.stderr[estimate.pooled].square().mean() >= single.var()


def test_pooled_noise_comes_from_the_same_class_of_other_prompts():
    """Correct responses are spread ten times as wide as incorrect ones: borrowing across classes would show."""
    cells = [(0, True), (0, False), (0, False)] + [(1, True)] * 4 + [(1, False)] * 4
    gradients = random_gradients(cells)
    gradients.vectors[gradients.responses.correct] *= 10
    estimate = estimate_gap(gradients.moments())
    (plus, minus), (rich_plus, _) = classes(gradients, 0), classes(gradients, 1)
    expected = ref.gap_norm_sq_given_noise(plus, minus, ref.class_noise(rich_plus), ref.class_noise(minus))
    assert within(estimate.norm_sq[0], expected, rtol=1e-10)
    assert estimate.pooled.tolist() == [True, False]

"""The tests behind the verdicts: against enumeration, their size where there is no gap, their power where there is."""

import pytest
import torch

from rlvr_fast import reference_spectrum as reference
from rlvr_fast.spectrum.significance import adjust, p_value, relabel, shared_p_value, studentised_gap_sq


def normal(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("n", "n_correct"), [(5, 1), (5, 4), (6, 3), (8, 2), (2, 1)])
def test_the_statistic_is_that_of_the_reference(n, n_correct, generator):
    vectors = normal(generator, n, 4) + 100  # far from 0: the common part must drop out
    labels = torch.stack([torch.randperm(n, generator=generator) < n_correct for _ in range(5)])
    found = studentised_gap_sq(vectors @ vectors.T, labels.double())
    wanted = [reference.studentised_gap_sq(vectors, correct) for correct in labels]
    assert torch.allclose(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-7, atol=1e-9)  # 1e4 · 2^-52 lost


@pytest.mark.parametrize(("n", "n_correct"), [(5, 1), (6, 3), (8, 3), (2, 1)])
def test_all_labellings_are_enumerated_where_they_are_few(n, n_correct, generator):
    vectors, correct = normal(generator, n, 3), torch.arange(n) < n_correct
    found = relabel(vectors @ vectors.T, correct, 500, generator)
    assert found.exact
    assert found.p_value == pytest.approx(reference.permutation_p_value(vectors, correct))


def test_random_labellings_agree_with_all_of_them(generator):
    vectors, correct = normal(generator, 12, 3), torch.arange(12) < 5
    vectors[:5] += 0.3
    some, every = (relabel(vectors @ vectors.T, correct, n, generator) for n in (700, 800))  # 792 labellings
    assert (some.exact, every.exact) == (False, True)
    p = every.p_value
    assert abs(some.p_value - p) < 4 * (p * (1 - p) / 700) ** 0.5 + 1 / 701


def test_null_draws_are_standardised(generator):
    vectors = normal(generator, 8, 3)
    found = relabel(vectors @ vectors.T, torch.arange(8) < 3, 500, generator)
    draws = found.draws(4000, generator)
    assert abs(found.null.mean()) < 1e-12
    assert found.null.std(correction=0).item() == pytest.approx(1)
    assert abs(draws.mean()) < 0.07  # four standard errors
    assert set(draws.tolist()) <= set(found.null.tolist())


def test_equal_gradients_show_nothing():
    found = relabel(torch.ones(6, 6, dtype=torch.float64), torch.arange(6) < 3, 100, torch.Generator())
    assert found.p_value == 1
    assert (found.observed, found.null.abs().max()) == (0, 0)


def test_classes_without_any_spread_are_as_significant_as_can_be():
    vectors = torch.eye(2, dtype=torch.float64)[[0, 0, 0, 1, 1, 1, 1]]
    assert relabel(vectors @ vectors.T, torch.arange(7) < 3, 100, torch.Generator()).p_value == pytest.approx(1 / 35)


@pytest.mark.parametrize("spread", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("n", "rate"), [(8, 0.5), (32, 0.1), (32, 0.5)])
def test_without_a_gap_few_are_significant(n, rate, spread, generator):
    """Size at 5 %, where the correct responses scatter half, as much and twice as much as the incorrect ones.

    500 prompts: the standard error at 5 % is 1 %. Exact at equal spread, 3 errors allowed. Where a few correct ones
    (three of 32) scatter more it is not: 14 % there, 4 % to 7 % in the other cases.
    """
    significant = 0
    for _ in range(500):
        correct = torch.rand(n, generator=generator) < rate
        if 0 < correct.sum() < n:
            vectors = normal(generator, n, 10) * torch.where(correct, spread, 1.0)[:, None]
            significant += relabel(vectors @ vectors.T, correct, 199, generator).p_value <= 0.05
    assert significant / 500 <= (0.18 if (n, rate, spread) == (32, 0.1, 2.0) else 0.08)


def test_what_the_divisor_is_for(generator):
    """The same prompts without it: a quarter of them significant although there is no gap."""
    with_it = without = 0
    for _ in range(300):
        correct = torch.arange(64) < 6
        vectors = normal(generator, 64, 20) * torch.where(correct, 2.0, 1.0)[:, None]
        gram = vectors @ vectors.T
        labels = torch.stack([correct, *(torch.randperm(64, generator=generator) < 6 for _ in range(99))]).double()
        difference = labels / 6 - (1 - labels) / 58
        plug_in = ((difference @ gram) * difference).sum(1)
        without += p_value(float(plug_in[0]), plug_in[1:]) <= 0.05
        with_it += relabel(gram, correct, 99, generator).p_value <= 0.05
    assert with_it / 300 < 0.12
    assert without / 300 > 0.5


def test_sign_flips_are_those_of_the_reference(generator):
    gaps = normal(generator, 6, 3) + 0.4
    products, owner = gaps @ gaps.T, torch.arange(6)
    wanted = reference.sign_flip_p_value(gaps)
    assert shared_p_value(products, owner, 500, generator) == pytest.approx(wanted)
    assert abs(shared_p_value(products, owner, 31, generator) - wanted) < 0.35  # 31 random ones of 32
    some = [shared_p_value(products, owner, 31, generator) for _ in range(60)]
    assert sum(some) / 60 == pytest.approx(wanted + (1 - wanted) / 32, abs=4 * (wanted * (1 - wanted) / 31 / 60) ** 0.5)


def test_rows_of_one_prompt_flip_together(generator):
    """A prompt that was measured twice is no pair: its two gaps agree whatever others do."""
    gap = normal(generator, 3)
    gaps = torch.stack([gap, gap])
    assert torch.isnan(torch.tensor(shared_p_value(gaps @ gaps.T, torch.tensor([0, 0]), 99, generator)))
    gaps = torch.stack([gap, gap, gap, gap])
    assert shared_p_value(gaps @ gaps.T, torch.tensor([0, 0, 1, 1]), 99, generator) == 0.5


def test_unrelated_gaps_are_rarely_shared_and_related_ones_mostly(generator):
    null = related = 0
    for _ in range(300):
        gaps = normal(generator, 12, 8)
        null += shared_p_value(gaps @ gaps.T, torch.arange(12), 199, generator) <= 0.05
        gaps = gaps + 0.5
        related += shared_p_value(gaps @ gaps.T, torch.arange(12), 199, generator) <= 0.05
    assert null / 300 <= 0.09  # 5 % and three standard errors
    assert related / 300 >= 0.9


@pytest.mark.parametrize("level", [0.01, 0.05, 0.2])
def test_adjusted_p_values_reject_what_the_procedures_do(level, generator):
    for _ in range(50):
        p = torch.rand(12, generator=generator, dtype=torch.float64) ** 3
        listed = p.tolist()
        for correction, procedure in (("holm", reference.holm), ("benjamini-hochberg", reference.benjamini_hochberg)):
            rejected = (adjust(p, correction) <= level).nonzero().squeeze(1).tolist()
            assert set(rejected) == procedure(listed, level)


def test_p_values_that_do_not_exist_are_not_counted():
    p = torch.tensor([0.02, torch.nan, 0.04], dtype=torch.float64)
    assert adjust(p, "none").nan_to_num(-1).tolist() == pytest.approx([0.02, -1, 0.04])
    assert adjust(p, "holm").nan_to_num(-1).tolist() == pytest.approx([0.04, -1, 0.04])
    assert adjust(p, "benjamini-hochberg").nan_to_num(-1).tolist() == pytest.approx([0.04, -1, 0.04])
    nothing = torch.full((2,), torch.nan, dtype=torch.float64)
    assert adjust(nothing, "holm").isnan().all()
    assert adjust(p[:0], "benjamini-hochberg").numel() == 0

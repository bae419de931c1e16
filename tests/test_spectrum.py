"""The difficulty spectrum: binning, evidence, verdicts, shares and mixtures, on prompts whose truth is known."""

import math

import pytest
import torch

import rlvr_fast as rf
from rlvr_fast import reference_spectrum as reference
from rlvr_fast.gap import gap_from_gradients
from rlvr_fast.spectrum import DifficultySpectrum, difficulty_spectrum
from rlvr_fast.spectrum.evidence import VERDICTS, wilson

Z95 = 1.959963984540054


def gap_of(correct, vectors, *, ids=None) -> rf.Gap:
    """A Gap of P prompts with G responses each: correct [P, G] bool, vectors [P, G, K]."""
    n_prompts, size = correct.shape
    responses = rf.Responses(correct.flatten(), torch.arange(n_prompts).repeat_interleave(size),
                             tuple(range(n_prompts) if ids is None else ids))
    return gap_from_gradients(rf.ResponseGradients(responses, vectors.flatten(0, 1).float()), level="hidden",
                              length_norm=True)


def prompts(generator, success, gap, *, size=32, width=8, unrelated=False) -> tuple[torch.Tensor, torch.Tensor]:
    """(correct [P, G], vectors [P, G, K]) of P prompts with given success rates and gap norms, noise tr Σ = width.

    The gaps point in one direction, or each in its own.
    """
    success, gap = (torch.as_tensor(x, dtype=torch.float64) for x in (success, gap))
    correct = torch.rand(len(success), size, generator=generator, dtype=torch.float64) < success[:, None]
    direction = torch.zeros(len(success), width, dtype=torch.float64)
    direction[:, 0] = 1
    if unrelated:
        direction = torch.nn.functional.normalize(torch.randn(len(success), width, generator=generator).double(), dim=1)
    noise = torch.randn(len(success), size, width, generator=generator, dtype=torch.float64)
    return correct, noise + (correct * gap[:, None])[..., None] * direction[:, None]


# -- binning ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def four(generator) -> rf.Gap:
    return gap_of(*prompts(generator, [0.5, 0.5, 0.5, 0.5], [2.0] * 4))


def test_few_numbers_are_bins_of_their_own_in_ascending_order(four):
    found = difficulty_spectrum(four, [3, 1, 3, 2])
    assert (found.labels, found.centres) == ((1, 2, 3), (1.0, 2.0, 3.0))
    assert found.prompts.bin.tolist() == [2, 0, 2, 1]
    assert found.bins.n_prompts.tolist() == [1, 1, 2]
    assert found.bins.n.tolist() == [32, 32, 64]


def test_labels_are_bins_in_order_of_appearance(four):
    found = difficulty_spectrum(four, ["word", "sum", "word", "sum"])
    assert found.labels == ("word", "sum")
    assert all(math.isnan(centre) for centre in found.centres)
    assert math.isnan(found.smoothness.difficulty_ratio)


def test_edges_close_on_the_left_and_the_last_on_both_sides(four):
    found = difficulty_spectrum(four, torch.tensor([0.0, 1.0, 2.0, 5.0]), bins=[0, 1, 2, 3, 5])
    assert found.labels == ("0 to 1", "1 to 2", "2 to 3", "3 to 5")
    assert found.prompts.bin.tolist() == [0, 1, 2, 3]
    found = difficulty_spectrum(four, [0.0, 1.0, 5.0, 5.0], bins=[0, 2, 3, 5])  # nothing from 2 to 3
    assert found.labels == ("0 to 2", "3 to 5")
    assert found.prompts.bin.tolist() == [0, 0, 1, 1]
    assert found.centres == (0.5, 5.0)


def test_many_numbers_are_cut_at_quantiles(generator):
    gap = gap_of(*prompts(generator, torch.full((40,), 0.5), torch.zeros(40)))
    order = torch.randperm(40, generator=generator)
    found = difficulty_spectrum(gap, order, n_permutations=9)
    assert found.bins.n_prompts.tolist() == [4] * 10
    assert found.prompts.bin.tolist() == (order // 4).tolist()
    assert difficulty_spectrum(gap, order, bins=5, n_permutations=9).bins.n_prompts.tolist() == [8] * 5
    same = difficulty_spectrum(gap, torch.full((40,), 7.0), bins=3, n_permutations=9)
    assert same.labels == ("7 to 7",)


def test_bins_by_success_rate_and_by_length(generator):
    correct = torch.tensor([[True, True, False, False], [False] * 4, [True, False, True, False]])
    rollouts = rf.Rollouts.from_packed(torch.zeros(24, dtype=torch.int64), torch.tensor(
        [0, 1, 2, 3, 4, 7, 10, 13, 16, 18, 20, 22, 24]), correct.flatten().float(), group_size=4)
    gap = gap_of(correct, torch.randn(3, 4, 2, generator=generator))
    by_success = difficulty_spectrum(gap, "success_rate")
    assert by_success.labels == (0.0, 0.5)
    assert by_success.prompts.bin.tolist() == [1, 0, 1]
    assert by_success.smoothness is None
    assert by_success.bins.tokens.isnan().all()
    by_length = difficulty_spectrum(gap, "length", rollouts=rollouts)
    assert by_length.labels == (1.0, 2.0, 3.0)
    assert by_length.prompts.bin.tolist() == [0, 2, 1]
    assert by_length.bins.cost.tolist() == [1, 2, 3]
    assert by_length.bins.tokens.tolist() == [4, 8, 12]


# -- evidence ---------------------------------------------------------------------------------------------------------


def test_intervals_of_success_are_those_of_the_reference(generator):
    gap = gap_of(*prompts(generator, torch.rand(12, generator=generator), torch.ones(12)))
    found = difficulty_spectrum(gap, [0] * 7 + [1] * 4 + [2], n_permutations=9)
    for p in range(12):
        wanted = reference.wilson_interval(found.prompts.n_correct[p].item(), 32, Z95)
        assert (found.prompts.low[p].item(), found.prompts.high[p].item()) == pytest.approx(wanted, abs=1e-12)
    for which, own in enumerate((range(7), range(7, 11), [11])):
        k = [found.prompts.n_correct[p].item() for p in own]
        effective = 32 * len(k) / reference.design_effect(k, [32] * len(k))
        wanted = reference.wilson_interval(sum(k) / (32 * len(k)) * effective, effective, Z95)
        assert (found.bins.low[which].item(), found.bins.high[which].item()) == pytest.approx(wanted, abs=1e-12)
        assert effective < 32 * len(k) or len(k) == 1  # prompts differ, and the interval knows


def test_prompts_that_agree_too_well_are_not_more_rollouts_than_there_are(generator):
    correct = torch.arange(8).expand(4, 8) < 4  # 4 of 8 in each, no spread at all
    found = difficulty_spectrum(gap_of(correct, torch.randn(4, 8, 2, generator=generator)), [1] * 4).bins
    assert (found.low.item(), found.high.item()) == pytest.approx(reference.wilson_interval(16, 32, Z95))


def test_wilson_reaches_the_ends_and_no_further():
    low, high = wilson(*torch.tensor([[0.0, 10.0, 0.0], [10.0, 10.0, 0.0]], dtype=torch.float64), Z95)
    assert (low[0], high[1]) == (0, 1)
    assert 0 < high[0] < 0.3
    assert (low[2], high[2]) == (0, 1)


def test_norms_and_p_values_are_those_of_the_gap(generator):
    correct, vectors = prompts(generator, torch.full((6,), 0.5), torch.tensor([0.0, 0, 0, 3, 3, 3]), size=8)
    correct[0] = True
    gap = gap_of(correct, vectors)
    found = difficulty_spectrum(gap, ["a"] * 6)
    assert torch.equal(found.prompts.norm_sq.isnan(), ~gap.defined)
    assert torch.allclose(found.prompts.norm_sq, gap.norm_sq, equal_nan=True)
    assert torch.allclose(found.prompts.stderr[1:], gap.stderr[1:])
    assert found.bins.norm_sq.item() == pytest.approx(gap.norm_sq[1:].mean().item())
    assert found.bins.stderr.item() == pytest.approx(gap.norm_sq[1:].std().item() / math.sqrt(5))
    assert found.prompts.p_value[0].isnan()
    for p in range(1, 6):
        wanted = reference.permutation_p_value(vectors[p].float().double(), correct[p])
        assert found.prompts.p_value[p].item() == pytest.approx(wanted)


def test_shares_and_shared_gaps_are_those_of_the_reference(generator):
    correct, vectors = prompts(generator, [0.5, 0.3, 0.7, 0.5, 0.4, 0.6], [1.0, 2, 3, 1, 0, 0], size=16)
    gap = gap_of(correct, vectors)
    found = difficulty_spectrum(gap, [0, 0, 0, 1, 1, 1], estimator="rloo", n_permutations=9).bins
    kappa = rf.kappa(gap.success_rate, 16, "rloo")
    weights, energy = kappa / 6, (kappa / 6).square() * gap.norm_sq
    for which, own in enumerate(([0, 1, 2], [3, 4, 5])):
        share = reference.batch_share(gap.vector, weights, gap.estimate.bias, own)
        assert found.batch_share[which].item() == pytest.approx(share)
        assert found.signal_share[which].item() == pytest.approx((energy[own].sum() / energy.sum()).item())
        assert found.signal[which].item() == pytest.approx((kappa.square() * gap.norm_sq)[own].mean().item())
        for factors, mean, error in ((torch.ones(6), found.shared_norm_sq, found.shared_stderr),
                                     (kappa, found.shared_signal, found.shared_signal_stderr)):
            def of(left, own=own, factors=factors):
                chosen = [own[i] for i in left]
                return reference.shared_norm_sq(gap.vector[chosen], factors[chosen])
            assert mean[which].item() == pytest.approx(of(range(3)), rel=1e-6)
            assert error[which].item() == pytest.approx(reference.jackknife(of, 3), rel=1e-6)
        noise = sum(reference.noise(gap.gradients.vectors.double().view(6, 16, -1)[p][side])
                    * (int(side.sum()) - 1) for p in own for side in (correct[p], ~correct[p])) / (3 * 14)
        assert found.noise[which].item() == pytest.approx(noise)
    assert found.batch_share.sum().item() == pytest.approx(1)


def test_large_groups_weigh_more_in_the_batch_gradient(generator):
    """(1/R) Σ A_i s_i: a group's κ gap counts by its share of the responses."""
    correct = torch.arange(32) % 2 == 0
    index = torch.tensor([0] * 8 + [1] * 24)
    vectors = torch.randn(32, 4, generator=generator) + correct[:, None]
    gap = gap_from_gradients(rf.ResponseGradients(rf.Responses(correct, index, (0, 1)), vectors), level="hidden",
                             length_norm=True)
    found = difficulty_spectrum(gap, [1, 2], estimator="dr_grpo", n_permutations=9).bins
    weights = 0.25 * torch.tensor([0.25, 0.75], dtype=torch.float64)
    for which in range(2):
        wanted = reference.batch_share(gap.vector, weights, gap.estimate.bias, [which])
        assert found.batch_share[which].item() == pytest.approx(wanted)
    energy = weights.square() * gap.norm_sq
    assert torch.allclose(found.signal_share, energy / energy.sum())


def test_a_group_of_one_class_counts_as_no_signal(generator):
    correct, vectors = prompts(generator, [0.5, 0.5], [2.0, 2.0])
    failed = torch.zeros(2, 32, dtype=torch.bool)
    gap = gap_of(torch.cat([correct, failed]), torch.cat([vectors, vectors]))
    one, half = (difficulty_spectrum(gap, levels, n_permutations=9).bins for levels in ([0, 0, 1, 1], [0, 0, 0, 0]))
    assert half.signal[0].item() == pytest.approx(one.signal[0].item() / 2)
    assert half.norm_sq[0].item() == pytest.approx(one.norm_sq[0].item())  # the mean gap is over those that have one
    assert half.shared_signal[0].item() == pytest.approx(one.shared_signal[0].item() / 6)  # 2 of 12 pairs
    assert one.signal[1] == 0
    assert one.norm_sq[1].isnan()
    assert one.noise[1] > 0


def test_a_gap_that_prompts_share_is_told_from_one_of_their_own(generator):
    """Each prompt has a large gap in both bins; only in the first do they point the same way."""
    shared = prompts(generator, torch.full((12,), 0.4), torch.full((12,), 3.0), width=32)
    alone = prompts(generator, torch.full((12,), 0.4), torch.full((12,), 3.0), width=32, unrelated=True)
    gap = gap_of(*(torch.cat(pair) for pair in zip(shared, alone, strict=True)))
    found = difficulty_spectrum(gap, ["shared"] * 12 + ["alone"] * 12)
    assert set(found.prompts.verdict) == {"edge"}
    assert found.bins.verdict == ("edge", "lucky guess")
    assert (found.bins.p_value < 0.001).all()
    assert found.bins.shared_p_value[0] < 0.001
    assert found.bins.shared_p_value[1] > 0.05
    assert abs(found.bins.shared_norm_sq[0] - 9) < 4 * found.bins.shared_stderr[0]
    assert abs(found.bins.shared_norm_sq[1]) < 4 * found.bins.shared_stderr[1]


# -- verdicts ---------------------------------------------------------------------------------------------------------


def test_every_verdict_is_reached_by_prompts_and_by_bins(generator):
    """One bin per verdict; the last has a gap that 8 rollouts cannot tell from noise."""
    rates, gaps = [0.99, 0.5, 0.1, 0.0, 0.4], [4.0, 4.0, 0.0, 0.0, 0.9]
    parts = [prompts(generator, [rate] * 12, [gap] * 12, size=128) for rate, gap in zip(rates, gaps, strict=True)]
    correct, vectors = (torch.cat(pair) for pair in zip(*parts, strict=True))
    level = torch.arange(5).repeat_interleave(12)
    found = difficulty_spectrum(gap_of(correct, vectors), level, n_permutations=999)
    verdicts = [[found.prompts.verdict[p] for p in range(60) if level[p] == which] for which in range(5)]
    for which, wanted in enumerate(("mastered", "edge", "lucky guess", "out of reach")):
        assert verdicts[which].count(wanted) >= 10
        assert found.bins.verdict[which] == wanted
    few = difficulty_spectrum(gap_of(correct[:, :8], vectors[:, :8]), level)
    assert [few.prompts.verdict[p] for p in range(36, 60)].count("undetermined") >= 22
    assert set(found.prompts.verdict) | set(few.prompts.verdict) == set(VERDICTS)
    summary = found.summary()
    assert sum(summary[f"rlvr/spectrum/frac_{word.replace(' ', '_')}"] for word in VERDICTS) == pytest.approx(1)


@pytest.mark.parametrize("correction", ["benjamini-hochberg", "holm", "none"])
def test_lucky_guesses_are_not_called_learnable(correction, generator):
    """Size and power over 400 prompts of 64 rollouts, J = 0.15 for all, in batches of 40 of which 20 have no gap.

    At least 95 % of those without one must not be called learnable (uncorrected: 3 standard errors more), and 80 % of
    those with one must be, whose gap is 2.5 standard deviations of a response's gradient in each of 8 directions.
    """
    false = right = 0
    for _ in range(10):
        gap = torch.cat([torch.zeros(20), torch.full((20,), 2.5)])
        found = difficulty_spectrum(gap_of(*prompts(generator, torch.full((40,), 0.15), gap, size=64)),
                                    ["lucky"] * 20 + ["learnable"] * 20, correction=correction, n_permutations=999)
        false += found.prompts.verdict[:20].count("edge")
        right += found.prompts.verdict[20:].count("edge")
    assert false / 200 <= 0.05 + (0.046 if correction == "none" else 0.0)
    assert right / 200 >= 0.8


def test_lucky_guesses_among_nothing_else(generator):
    """No prompt with a gap at all: with Holm a false one in at most 5 % of 40 batches, 3 standard errors allowed."""
    batches = 0
    for _ in range(40):
        gap = gap_of(*prompts(generator, torch.full((20,), 0.2), torch.zeros(20), size=32))
        found = difficulty_spectrum(gap, ["lucky"] * 20, correction="holm", n_permutations=999)
        batches += "edge" in found.prompts.verdict
        assert found.bins.verdict[0] in ("undetermined", "edge")  # nothing to be negligible against
    assert batches <= 40 * (0.05 + 3 * (0.05 * 0.95 / 40) ** 0.5)


def test_what_counts_as_negligible_can_be_said(generator):
    gap = gap_of(*prompts(generator, torch.full((10,), 0.2), torch.zeros(10), size=128))
    assert "lucky guess" not in difficulty_spectrum(gap, [1] * 10, n_permutations=99).prompts.verdict
    found = difficulty_spectrum(gap, [1] * 10, negligible=4.0, n_permutations=99)
    assert found.prompts.verdict.count("lucky guess") >= 8
    tight = difficulty_spectrum(gap, [1] * 10, negligible=0.05, n_permutations=99).prompts
    assert (tight.norm_sq < 0.05).any()
    assert (tight.norm_sq + tight.stderr > 0.05).all()
    assert "lucky guess" not in tight.verdict  # small as measured, but not with its error
    at_chance = difficulty_spectrum(gap, [1] * 10, negligible=4.0, chance=0.2, n_permutations=99)
    assert at_chance.prompts.verdict.count("lucky guess") >= 6
    better = difficulty_spectrum(gap, [1] * 10, negligible=4.0, chance=0.01, n_permutations=99)
    assert "lucky guess" not in better.prompts.verdict


def test_steps_together_find_what_one_does_not(generator):
    """Groups of 8 with p = 1/8: no single one can be significant, eight steps of the same prompts are."""
    steps = []
    for _ in range(8):
        correct = torch.zeros(6, 8, dtype=torch.bool)
        correct[:, 0] = True
        _, vectors = prompts(generator, [1.0] * 6, [0.0] * 6, size=8)
        vectors[:3, 0, 0] += 4
        steps.append(gap_of(correct, vectors, ids="abcdef"))
    one = difficulty_spectrum(steps[0], dict(zip("abcdef", "xxxyyy", strict=True)))
    assert (one.prompts.p_value >= 1 / 8 - 1e-12).all()
    all_steps = difficulty_spectrum(steps, [["x"] * 3 + ["y"] * 3] * 8)
    assert all_steps.prompt_ids == tuple("abcdef")
    assert all_steps.prompts.n.tolist() == [64] * 6
    assert all_steps.bins.n_groups.tolist() == [24, 24]
    assert all_steps.prompts.verdict[:3] == ("edge",) * 3
    assert "edge" not in all_steps.prompts.verdict[3:]
    assert all_steps.prompts.norm_sq.isnan().all()  # one correct response each: no noise, no norm, and yet a test


def test_steps_do_not_pair_prompts_of_different_steps(generator):
    """Two steps of other prompts: pairs are within each; their mean is weighted by their number."""
    first, second = (gap_of(*prompts(generator, [0.5] * n, [2.0] * n), ids=range(start, start + n))
                     for n, start in ((3, 0), (4, 3)))
    both = difficulty_spectrum([first, second], [[1] * 3, [1] * 4], n_permutations=9).bins
    parts = [difficulty_spectrum(gap, [1] * len(gap.prompt_ids), n_permutations=9).bins for gap in (first, second)]
    mean = (6 * parts[0].shared_norm_sq + 12 * parts[1].shared_norm_sq) / 18
    assert both.shared_norm_sq.item() == pytest.approx(mean.item())
    assert both.batch_share.item() == pytest.approx(1)


def test_prompts_of_different_steps_are_paired_on_request(generator):
    steps = [gap_of(*prompts(generator, [0.5] * n, [2.0] * n), ids=range(start, start + n))
             for n, start in ((3, 0), (4, 3))]
    apart, paired = (difficulty_spectrum(steps, [[1] * 3, [1] * 4], n_permutations=99, across_steps=across).bins
                     for across in (False, True))
    vectors = torch.cat([step.vector for step in steps])
    assert paired.shared_norm_sq.item() == pytest.approx(reference.shared_norm_sq(vectors, torch.ones(7)), rel=1e-6)
    assert apart.shared_norm_sq.item() != pytest.approx(paired.shared_norm_sq.item(), rel=1e-3)
    levels = [[1, 2, 2], [1, 1, 2, 2]]
    apart, paired = (difficulty_spectrum(steps, levels, n_permutations=99, across_steps=across).bins
                     for across in (False, True))
    assert torch.equal(apart.batch_share, paired.batch_share)  # a step has its own batch gradient
    alone = [gap_of(*prompts(generator, [0.5], [2.0]), ids=[name]) for name in "ab"]
    for across in (False, True):
        bins = difficulty_spectrum(alone, {"a": 1, "b": 1}, n_permutations=99, across_steps=across).bins
        assert bins.shared_norm_sq.isnan().item() != across
        assert bins.shared_p_value.isnan().item() != across
    narrow = gap_of(*prompts(generator, [0.5] * 3, [2.0] * 3, width=5))
    with pytest.raises(ValueError, match=r"across_steps needs gap vectors .* got widths \[5, 8\]"):
        difficulty_spectrum([steps[0], narrow], [[1] * 3, [1] * 3], across_steps=True)


def test_a_prompt_in_two_steps_is_averaged_and_is_no_pair_of_its_own(generator):
    first, second = (gap_of(*prompts(generator, [0.5] * 2, [2.0] * 2), ids="ab") for _ in range(2))
    found = difficulty_spectrum([first, second], {"a": 1, "b": 1}, n_permutations=99)
    assert torch.allclose(found.prompts.norm_sq, (first.norm_sq + second.norm_sq) / 2)
    assert torch.allclose(found.prompts.stderr, (first.stderr.square() + second.stderr.square()).sqrt() / 2)
    assert (found.bins.n_prompts.item(), found.bins.n_groups.item()) == (2, 4)
    products = [float(gap.vector[0].double() @ gap.vector[1].double()) for gap in (first, second)]
    assert found.bins.shared_norm_sq.item() == pytest.approx(sum(products) / 2)
    paired = difficulty_spectrum([first, second], {"a": 1, "b": 1}, n_permutations=99, across_steps=True).bins
    products += [float(first.vector[p].double() @ second.vector[1 - p].double()) for p in range(2)]
    assert paired.shared_norm_sq.item() == pytest.approx(sum(products) / 4)


# -- smoothness and mixture -------------------------------------------------------------------------------------------


def test_a_hole_is_where_a_visible_bin_is_followed_by_an_invisible_one(generator):
    rates = [0.9, 0.6, 0.4, 0.0, 0.0]
    gap = gap_of(*prompts(generator, torch.tensor(rates).repeat_interleave(8), torch.full((40,), 3.0), size=64))
    found = difficulty_spectrum(gap, torch.tensor([1, 2, 3, 9, 90]).repeat_interleave(8), n_permutations=999)
    smoothness = found.smoothness
    assert smoothness.difficulty_ratio == 3  # 9/3; 90/9 is past what is visible
    assert smoothness.success_ratio == math.inf
    assert smoothness.holes == ((3, 9),)
    assert smoothness.frontier == 3
    even = difficulty_spectrum(gap, torch.tensor([1, 2, 3, 4, 5]).repeat_interleave(8), bins=[1, 2, 4, 5],
                               n_permutations=99).smoothness
    assert even.difficulty_ratio == pytest.approx(2.5)  # 2.5/1; the last bin comes after one with success 0.33
    assert even.success_ratio > 1.5


@pytest.mark.parametrize("allocation", ["shared", "own", "noise", "success"])
def test_the_mixture_is_that_of_the_reference(allocation, generator):
    rates, gaps = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([3.0, 1.5, 0.0])
    correct, vectors = prompts(generator, rates.repeat_interleave(8), gaps.repeat_interleave(8), size=16)
    lengths = torch.tensor([2, 3, 5]).repeat_interleave(8 * 16)
    rollouts = rf.Rollouts.from_packed(torch.zeros(int(lengths.sum()), dtype=torch.int64), torch.cat(
        [torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]), correct.flatten().float(), group_size=16)
    found = difficulty_spectrum(gap_of(correct, vectors), ["a"] * 8 + ["b"] * 8 + ["c"] * 8, rollouts=rollouts,
                                n_permutations=9)
    base = {"c": 2, "d": 1, "a": 1, "b": 1}  # d was not measured
    mixture = found.mixture(allocation=allocation, base=base, floor=0.2)
    bins = found.bins
    signal, stderr = {"shared": (bins.shared_signal, bins.shared_signal_stderr),
                      "own": (bins.signal, bins.signal_stderr),
                      "noise": (bins.second_moment, torch.zeros(3)),
                      "success": ((bins.success_rate * (1 - bins.success_rate)) ** 2, torch.zeros(3))}[allocation]
    (s_a, s_b, s_c), (e_a, e_b, e_c) = signal.tolist(), stderr.tolist()
    wanted = reference.mixture([s_c, 0, s_a, s_b], [e_c, 0, e_a, e_b], [5, 1, 2, 3], [0.4, 0.2, 0.2, 0.2], 0.2)
    assert mixture.labels == ("c", "d", "a", "b")
    assert mixture.probability.tolist() == pytest.approx(wanted)
    assert mixture.probability.sum().item() == pytest.approx(1)
    assert mixture.as_dict()["d"] == pytest.approx(0.2 * 0.2)
    assert torch.allclose(mixture.importance * mixture.probability, torch.tensor([0.4, 0.2, 0.2, 0.2]).double())
    if allocation in ("shared", "own"):
        assert mixture.as_dict()["a"] > mixture.as_dict()["b"]


def test_the_mixture_equalises_signal_per_cost():
    from rlvr_fast.spectrum.mixture import allocate
    score, cost = torch.tensor([4.0, 1.0, 0.25]), torch.tensor([1.0, 2.0, 8.0])
    base = torch.tensor([0.5, 0.25, 0.25])
    found = allocate(score, cost, base, 0.0)
    level = base.square() * score / (cost * found.square())
    assert torch.allclose(level, level[0].expand(3))
    worse = [float((base.square() * score / other).sum() * (cost * other).sum())
             for other in (base, torch.tensor([0.4, 0.3, 0.3]), torch.tensor([0.8, 0.1, 0.1]))]
    assert all(float((base.square() * score / found).sum() * (cost * found).sum()) < value for value in worse)


def test_signal_within_its_error_gets_the_floor_alone(generator):
    correct, vectors = prompts(generator, [0.5] * 16, [3.0] * 8 + [0.0] * 8)
    found = difficulty_spectrum(gap_of(correct, vectors), [1] * 8 + [2] * 8, n_permutations=9)
    if found.bins.shared_signal[1] < found.bins.shared_signal_stderr[1]:
        assert found.mixture(floor=0.1).as_dict()[2] == pytest.approx(0.05)
    nothing = difficulty_spectrum(gap_of(torch.zeros(4, 8, dtype=torch.bool), vectors[:4, :8]), [1, 1, 2, 2])
    assert nothing.mixture(base={1: 3, 2: 1}).probability.tolist() == [0.75, 0.25]  # nothing known: the base


# -- edges ------------------------------------------------------------------------------------------------------------


def test_no_prompts(generator):
    gap = gap_of(torch.zeros(0, 4, dtype=torch.bool), torch.zeros(0, 4, 3))
    found = difficulty_spectrum(gap, [])
    assert (found.labels, found.prompts.verdict, found.bins.verdict) == ((), (), ())
    assert math.isnan(found.summary()["rlvr/spectrum/frac_edge"])
    assert found.mixture(base={"a": 1}).as_dict() == {"a": 1.0}
    with pytest.raises(ValueError, match="base must name the bins"):
        found.mixture()
    assert difficulty_spectrum(gap, "success_rate").smoothness is None
    assert "prompts=0" in repr(found)


@pytest.mark.parametrize("solved", [True, False])
def test_no_prompt_with_a_gap(solved, generator):
    gap = gap_of(torch.full((6, 100), solved), torch.randn(6, 100, 3, generator=generator))
    found = difficulty_spectrum(gap, [1, 1, 1, 2, 2, 2])
    wanted = "mastered" if solved else "out of reach"
    assert set(found.prompts.verdict) == set(found.bins.verdict) == {wanted}
    assert found.bins.norm_sq.isnan().all()
    assert found.bins.signal.tolist() == [0, 0]
    assert found.bins.p_value.isnan().all()
    assert found.mixture().probability.tolist() == [0.5, 0.5]
    few = difficulty_spectrum(gap_of(torch.full((6, 8), solved), torch.randn(6, 8, 3, generator=generator)), [1] * 6)
    assert set(few.prompts.verdict) == {"undetermined"}


def test_one_prompt_of_one_bin(generator):
    correct, vectors = prompts(generator, [0.5], [4.0], size=16)
    found = difficulty_spectrum(gap_of(correct, vectors), ["only"])
    assert found.prompts.verdict == ("edge",)
    assert found.bins.p_value[0] < 0.05
    assert found.bins.shared_p_value.isnan().all()
    assert found.bins.verdict == ("undetermined",)  # one prompt shares nothing with others
    assert found.mixture().as_dict() == {"only": 1.0}
    assert found.mixture(allocation="own").as_dict() == {"only": 1.0}


def test_a_gap_without_vectors_is_judged_by_its_prompts_own_gaps(generator):
    torch.manual_seed(0)
    correct, _ = prompts(generator, [0.5] * 6, [1.0] * 6, size=8)
    lengths = torch.full((48,), 2)
    rollouts = rf.Rollouts.from_packed(torch.randint(7, (96,), generator=generator), torch.cat(
        [torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]), correct.flatten().float(), group_size=8)
    gap = rf.gradient_gap(torch.randn(96, 4, generator=generator), torch.randn(7, 4, generator=generator), rollouts,
                          level="head")
    found = difficulty_spectrum(gap, [1] * 6, rollouts=rollouts)
    assert not found.has_vectors
    assert found.bins.shared_norm_sq.isnan().all()
    assert found.bins.batch_share.isnan().all()
    assert torch.equal(found.bins.p_adjusted, found.bins.p_value)
    assert found.mixture().labels == (1,)
    with pytest.raises(ValueError, match="allocation 'shared' needs gap vectors"):
        found.mixture(allocation="shared")


@pytest.mark.parametrize("method", ["sketch", "segmented"])
def test_the_gap_of_a_model(method, generator):
    """Prompts with coefficient 0 in the loss are not measured, and known all the same to have failed."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(9, 6), torch.nn.Linear(6, 6), torch.nn.Tanh())
    model.lm_head = torch.nn.Linear(6, 9, bias=False)
    ids = torch.randint(9, (32, 3), generator=generator)
    correct = torch.arange(32) % 3 == 0
    correct[8:16] = False
    mask = torch.tensor([[False, True, True]]).expand(32, -1)
    rollouts = rf.Rollouts.from_padded(ids, mask, correct.float(), group_size=8)
    weights = rf.loss_weights(rollouts, rf.advantages(rollouts, "grpo"), "grpo")
    with rf.ModelGap(model, rollouts, method) as probe:
        logits = model(ids)
        logp = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        (-(weights * logp.reshape(-1)).sum()).backward()
    gap = probe.gap()
    found = difficulty_spectrum(gap, "length", n_permutations=99)
    assert found.has_vectors == (method == "sketch")
    assert found.bins.cost.tolist() == [2]
    assert found.prompts.n_correct.tolist() == [3, 0, 3, 3] or found.prompts.n_correct[1] == 0
    assert torch.equal(found.prompts.p_value.isnan(), ~gap.defined)
    assert torch.allclose(found.prompts.norm_sq, gap.norm_sq, equal_nan=True)
    if method == "sketch":
        wanted = difficulty_spectrum(gap.measured, [1, 1, 1], n_permutations=99).bins.shared_norm_sq
        assert found.bins.shared_norm_sq.item() == pytest.approx(wanted.item())


def test_the_same_seed_gives_the_same_spectrum(generator):
    gap = gap_of(*prompts(generator, [0.4] * 6, [0.5] * 6))
    first, again, other = (difficulty_spectrum(gap, [1] * 6, n_permutations=99, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.prompts.p_value, again.prompts.p_value)
    assert not torch.equal(first.prompts.p_value, other.prompts.p_value)


def test_it_prints_as_a_table(four):
    lines = repr(difficulty_spectrum(four, [1, 1, 2, 2])).splitlines()
    assert lines[0].startswith("DifficultySpectrum(prompts=4: ")
    assert len(lines) == 5
    assert lines[-1].startswith("Smoothness(R=2, ")
    assert repr(difficulty_spectrum(four, [1, 1, 2, 2]).mixture(allocation="own")).startswith("Mixture(1: ")


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "kind", "message"), [
    ({"gap": "no"}, TypeError, "gap must be a Gap"),
    ({"gap": []}, ValueError, "gap must hold at least one"),
    ({"difficulty": [1, 2, 3]}, ValueError, "difficulty must have one value for each of 4 prompts"),
    ({"difficulty": [1, "a", 3, 4]}, TypeError, "difficulty must be all numbers or all strings"),
    ({"difficulty": [1, math.nan, 3, 4]}, ValueError, "difficulty must be finite numbers"),
    ({"difficulty": 3.0}, ValueError, "difficulty must have one value"),
    ({"difficulty": {0: 1}}, ValueError, "difficulty must have a value for every prompt id, got none for 3 of 4"),
    ({"difficulty": "hardness"}, ValueError, "difficulty must be one of success_rate, length"),
    ({"difficulty": "length"}, ValueError, "give the gap's rollouts as rollouts="),
    ({"bins": [1, 2]}, ValueError, "bins must span the difficulties 1 to 4"),
    ({"bins": [2, 1]}, ValueError, "bins must be two or more rising edges"),
    ({"bins": 0}, ValueError, "bins must be at least 1"),
    ({"bins": 2.5}, TypeError, "bins must be an int"),
    ({"difficulty": ["a"] * 4, "bins": 3}, ValueError, "bins must be None for difficulties that are labels"),
    ({"estimator": "reinforce"}, ValueError, "estimator must be one of grpo"),
    ({"correction": "bonferroni"}, ValueError, "correction must be one of benjamini-hochberg"),
    ({"confidence": 1.0}, ValueError, "confidence must be between 0 and 1"),
    ({"mastered": 0}, ValueError, "mastered must be between 0 and 1"),
    ({"visible": 2}, ValueError, "visible must be between 0 and 1"),
    ({"negligible": 0.0}, ValueError, "negligible must be positive"),
    ({"chance": -0.1}, ValueError, r"chance must be in \[0, 1\]"),
    ({"across_steps": 1}, TypeError, "across_steps must be a bool"),
    ({"n_permutations": 0}, ValueError, "n_permutations must be at least 1"),
    ({"seed": -1}, ValueError, "seed must be at least 0"),
    ({"rollouts": 3}, ValueError, "rollouts must be one Rollouts for each of 1 gaps"),
    ({"rollouts": [3]}, TypeError, "rollouts must be rlvr_fast.Rollouts"),
])
def test_bad_arguments_are_named(four, arguments, kind, message):
    arguments = {"gap": four, "difficulty": [1, 2, 3, 4]} | arguments
    with pytest.raises(kind, match=message):
        difficulty_spectrum(arguments.pop("gap"), arguments.pop("difficulty"), **arguments)


def test_rollouts_of_another_batch_are_refused(four):
    other = rf.Rollouts.from_packed(torch.zeros(128, dtype=torch.int64), torch.arange(129), torch.zeros(128),
                                    group_size=32)
    with pytest.raises(ValueError, match="rollouts must be those that gap 0 was measured on"):
        difficulty_spectrum(four, [1, 2, 3, 4], rollouts=other)


def test_steps_that_number_their_prompts_anew_are_found_out(four):
    with pytest.raises(ValueError, match="difficulty must be the same wherever a prompt occurs, got 1 and 5"):
        difficulty_spectrum([four, four], [[1, 2, 3, 4], [5, 6, 7, 8]])
    with pytest.raises(ValueError, match="one sequence for each of 2 gaps"):
        difficulty_spectrum([four, four], [1, 2, 3, 4])


@pytest.mark.parametrize(("arguments", "kind", "message"), [
    ({"allocation": "greedy"}, ValueError, "allocation must be one of shared, own, noise, success"),
    ({"floor": 1.5}, ValueError, r"floor must be in \[0, 1\]"),
    ({"base": [1, 2]}, TypeError, "base must be a mapping"),
    ({"base": {1: 1.0}}, ValueError, "base must have a share for every bin of the spectrum, got none for 2"),
    ({"base": {1: 1.0, 2: -1.0}}, ValueError, "base must be at least 0"),
    ({"base": {1: 0, 2: 0}}, ValueError, "base must have a share above 0"),
])
def test_bad_mixtures_are_named(four, arguments, kind, message):
    found: DifficultySpectrum = difficulty_spectrum(four, [1, 1, 2, 2])
    with pytest.raises(kind, match=message):
        found.mixture(**arguments)


def test_numbers_in_one_step_and_labels_in_another_are_refused(four):
    generator = torch.Generator().manual_seed(3)
    other = gap_of(*prompts(generator, [0.4] * 2, [0.5] * 2), ids=("x", "y"))
    for difficulty in ([[1, 2, 3, 4], ["easy", "hard"]], [["a", "b", "c", "d"], [1, 2]]):
        with pytest.raises(TypeError, match="difficulty must be all numbers or all strings"):
            difficulty_spectrum([four, other], difficulty)

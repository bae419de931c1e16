"""The passes over shards of a vocabulary and their merge, against the float64 specification of the whole."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import BF16, EPS, FP16, Case, assert_pass
from policies import HeadProblem, reference_pass, within, worst
from vocabulary_shards import local_ids, merge_error, shard_passes, splits_of

from rlvr_fast import backends
from rlvr_fast.backends import TokenPass
from rlvr_fast.head import Head
from rlvr_fast.merge_passes import merge_passes

CPU = torch.device("cpu")
MERGED = (
    HeadProblem(1, 3, 2),
    HeadProblem(2, 5, 9),
    HeadProblem(33, 5, 19, bias="random", temperature=0.7),
    HeadProblem(67, 24, 18, FP16, temperature=2.0, softcap=5.0),
    HeadProblem(101, 37, 5, BF16, bias="random", softcap=30.0, spread=10.0),
    HeadProblem(131, 40, 6, bias="masked", temperature=0.3, softcap=3.0),
    HeadProblem(257, 16, 3, BF16, bias="masked", spread=8.0),
    HeadProblem(33, 5, 0),
)


# -- one shard --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", [p for p in MERGED if p.n_tokens], ids=str)
def test_a_token_of_another_shard_is_held_out_nowhere(head_pass, problem):
    """The contract of TokenPass for id -1, next to present tokens in the same call."""
    hidden, weight, tokens, bias = problem.tensors()
    present = torch.arange(len(tokens)) % 2 == 1
    result = head_pass(hidden, weight, torch.where(present, tokens, -1), bias, **problem.options)
    case = Case(problem, CPU)
    squares = (torch.softmax(case.z, 1) * case.slope).square().sum(1)
    expected = dict(case.expected, score_sq=torch.where(present, case.expected["score_sq"], squares),
                    off_mass=torch.where(present, case.expected["off_mass"], 1.0))
    assert (result.logp[~present] == -torch.inf).all()
    assert (result.off_mass[~present] == 1).all()
    logp = torch.where(present, result.logp, 0.0)
    expected["logp"] = torch.where(present, expected["logp"], 0.0)
    assert_pass(result._replace(logp=logp), expected, case.error)


# -- the merge --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", MERGED, ids=str)
def test_merged_shards_match_the_reference(head_pass, problem):
    """Every split of ``splits_of``: one shard, single rows at either end and inside, uneven ones."""
    tensors = hidden, weight, tokens, bias = problem.tensors()
    expected = reference_pass(hidden, weight, tokens, bias, **problem.options)
    error = Case(problem, CPU).error if problem.n_tokens else 0.0
    for bounds in splits_of(problem.vocabulary):
        planes = shard_passes(head_pass, *tensors, bounds, **problem.options)
        whole, mass = merge_passes(planes, **problem.options)
        assert_pass(whole, expected, error + merge_error(expected["lse"]))
        assert mass.shape == (len(bounds) - 1, problem.n_tokens)
        assert within(mass.sum(0), torch.ones(problem.n_tokens), atol=4 * EPS + merge_error(expected["lse"]))


def certain_tokens(owner: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens of probability 1 - m, m from 1e-2 to 1e-30, at row ``owner`` of 33: up to 72 nats ahead of the others."""
    weight = torch.zeros(33, 1)
    weight[owner] = 1.0
    off_mass = torch.logspace(-2, -30, 57, dtype=torch.float64)
    return (32 / off_mass).log().float()[:, None], weight, torch.full((57,), owner)


def certain_pass(hidden, weight, tokens) -> dict[str, torch.Tensor]:
    """The reference, with H = log(1 + ε) + ℓ ε / (1 + ε) for 32 rivals ℓ behind, ε = 32 e^-ℓ: p log p loses it."""
    lead = hidden.double()[:, 0]
    rivals = 32 * torch.exp(-lead)
    return reference_pass(hidden, weight, tokens) | {"entropy": torch.log1p(rivals) + lead * rivals / (1 + rivals)}


@pytest.mark.parametrize("owner", [0, 16, 32])
@pytest.mark.parametrize("bounds", [(0, 1, 33), (0, 32, 33), (0, 16, 17, 33), (0, 1, 2, 16, 17, 31, 32, 33)],
                         ids=str)
def test_no_digit_is_lost_when_the_token_is_certain(head_pass, owner, bounds):
    """Relative 1e-4 in every column, as unsharded: a lead of 72 nats is known to 8e-6. 1 - p has no digit there."""
    hidden, weight, tokens = certain_tokens(owner)
    exact = certain_pass(hidden, weight, tokens)
    planes = shard_passes(head_pass, hidden, weight, tokens, None, bounds)
    whole, _ = merge_passes(planes, 1.0, None)
    for name in TokenPass._fields:
        column = getattr(whole, name)
        smallest = 1e-37 if name == "score_sq" else 0.0  # the square of 1e-30 is no float32
        assert within(column, exact[name], rtol=1e-4, atol=smallest), f"{name}: {worst(column, exact[name])}"
    naive = 1 - (planes[:, 0] + planes[:, 1] - planes[:, 1].logsumexp(0)).amax(0).exp()
    assert not within(naive, exact["off_mass"], rtol=1e-4)


@pytest.mark.parametrize("bounds", [(0, 1, 33), (0, 16, 17, 33)], ids=str)
@pytest.mark.parametrize("sampled", [0, 32])
def test_a_certain_wrong_token_is_known_too(head_pass, bounds, sampled):
    """The likely row is in one shard, the sampled token in it or in another; log p down to -72."""
    hidden, weight, tokens = certain_tokens(16)
    exact = certain_pass(hidden, weight, torch.full_like(tokens, sampled))
    planes = shard_passes(head_pass, hidden, weight, torch.full_like(tokens, sampled), None, bounds)
    whole, _ = merge_passes(planes, 1.0, None)
    assert within(whole.logp, exact["logp"], rtol=1e-6)
    assert within(whole.score_sq, exact["score_sq"], rtol=1e-5)
    # The likely token is summed with the rest, so H is known to a few roundings of 1 where they share a shard.
    assert within(whole.entropy, exact["entropy"], rtol=1e-4, atol=4 * EPS)


@pytest.mark.parametrize("softcap", [None, 3000.0])
@pytest.mark.parametrize("offset", [-1000.0, 1000.0])
def test_offsets_cancel(head_pass, offset, softcap):
    """A constant on every logit costs the rounding of the logits, ulp(1000) = 6e-5, and nothing else."""
    hidden, weight, tokens, bias = HeadProblem(33, 5, 19, bias="random").tensors()
    options = {"temperature": 1.0, "softcap": softcap}
    expected = reference_pass(hidden, weight, tokens, bias + offset, **options)
    planes = shard_passes(head_pass, hidden, weight, tokens, bias + offset, (0, 1, 16, 33), **options)
    assert_pass(merge_passes(planes, **options)[0], expected, 2 * EPS * abs(offset) + merge_error(expected["lse"]))


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_a_shard_that_is_masked_as_a_whole_has_no_mass(head_pass, softcap):
    hidden, weight, tokens, bias = HeadProblem(33, 5, 19, bias="random").tensors()
    tokens = tokens % 20
    bias[20:] = -torch.inf
    expected = reference_pass(hidden, weight, tokens, bias, 1.0, softcap)
    whole, mass = merge_passes(shard_passes(head_pass, hidden, weight, tokens, bias, (0, 8, 20, 27, 33),
                                            softcap=softcap), 1.0, softcap)
    assert (mass[2:] == 0).all()
    assert_pass(whole, expected, 40 * EPS)


@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_the_soft_cap_slope_of_the_target_is_that_of_its_own_shard(temperature):
    """Logits from the middle of the cap to 3.8 times it, where the slope is 2e-3: 1 - tanh² keeps 2 ulp / slope."""
    raw = torch.linspace(-2.0, 19.0, 43)
    weight, bias, tokens = torch.zeros(6, 1), torch.zeros(6), torch.full((43,), 4)
    weight[4] = 1.0
    options = {"temperature": temperature, "softcap": 5.0}
    expected = reference_pass(raw[:, None], weight, tokens, bias, **options)["score_sq"]
    head_pass = backends.select("head_pass", "torch", CPU)
    planes = torch.stack([torch.stack(head_pass(raw[:, None], local_ids(tokens, a, b),
                                                Head(weight[a:b], bias[a:b], **options)))
                          for a, b in ((0, 3), (3, 6))])
    actual = merge_passes(planes, **options)[0].score_sq
    assert within(actual, expected, rtol=2e-3)
    assert within(actual[raw < 5], expected[raw < 5], rtol=1e-5)


def test_bad_logits_of_one_shard_show_in_the_whole(head_pass):
    """NaN in a shard, or a sampled token that is masked, must not look like a number."""
    hidden, weight, tokens, bias = HeadProblem(33, 5, 4, bias="random").tensors()
    weight[3, 0] = torch.nan
    planes = shard_passes(head_pass, hidden, weight, tokens, bias, (0, 8, 33))
    assert not torch.stack(merge_passes(planes, 1.0, None)[0]).isfinite().all(0).any()
    _, weight, *_ = HeadProblem(33, 5, 4).tensors()
    bias[tokens[0]] = -torch.inf
    whole, _ = merge_passes(shard_passes(head_pass, hidden, weight, tokens, bias, (0, 8, 33)), 1.0, None)
    assert (whole.logp == -torch.inf).equal(tokens == tokens[0])

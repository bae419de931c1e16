"""The float64 specification of advantages against numpy, textbook identities and worked examples."""

import numpy as np
import pytest
import torch
from advantage_batches import BATCHES, make_rollouts, reference_advantages

from rlvr_fast.advantages import DEFAULT_EPS


def groups(rollouts):
    return [(rollouts.prompt_index == prompt).nonzero().squeeze(1) for prompt in range(rollouts.n_prompts)]


@pytest.mark.parametrize(("estimator", "ddof"), [("grpo", 1), ("grpo_population_std", 0)])
def test_grpo_is_the_z_score_of_numpy(estimator, ddof):
    rollouts = BATCHES["ragged real"]
    got = reference_advantages(rollouts, estimator, eps=1e-6)
    for members in groups(rollouts):
        r = rollouts.rewards[members].double().numpy()
        np.testing.assert_allclose(got[members], (r - np.mean(r)) / (np.std(r, ddof=ddof) + 1e-6), rtol=1e-12)


@pytest.mark.parametrize("estimator", ["grpo", "grpo_population_std", "grpo_batch_std", "dr_grpo", "rloo", "maxrl",
                                       "gpg"])
def test_group_centred_advantages_sum_to_zero(estimator):
    for name, rollouts in BATCHES.items():
        if name == "no responses":
            continue
        got = reference_advantages(rollouts, estimator)
        # float64 rounding, relative to the advantages and (large offset) to the rewards they were formed from.
        slack = 1e-12 * (1 + got.abs().max() + rollouts.rewards.double().abs().max())
        for members in groups(rollouts):
            assert abs(got[members].sum()) <= slack, name


def test_rloo_is_bessel_times_centred():
    rollouts = BATCHES["ragged real"]
    rloo, centred = (reference_advantages(rollouts, name) for name in ("rloo", "dr_grpo"))
    for members in groups(rollouts):
        size = len(members)
        torch.testing.assert_close(rloo[members], centred[members] * size / (size - 1), rtol=1e-12, atol=1e-15)


def test_opo_balances_the_tokens_of_each_prompt():
    rollouts = BATCHES["ragged real"]
    weighted = reference_advantages(rollouts, "opo") * rollouts.lengths
    for members in groups(rollouts):
        assert abs(weighted[members].sum()) < 1e-10


@pytest.mark.parametrize("estimator", ["reinforce_pp", "reinforce_pp_baseline"])
def test_reinforce_pp_whitens_the_tokens(estimator):
    rollouts = BATCHES["ragged real"]
    got = reference_advantages(rollouts, estimator, eps=0.0)
    tokens = torch.repeat_interleave(got, rollouts.lengths)
    assert abs(tokens.mean()) < 1e-12
    assert abs(tokens.var() - 1) < 1e-12


def test_batch_std_divides_all_prompts_alike():
    rollouts = BATCHES["ragged real"]
    r = rollouts.rewards.double()
    expected = reference_advantages(rollouts, "dr_grpo") / (np.std(r.numpy(), ddof=1) + 1e-4)
    torch.testing.assert_close(reference_advantages(rollouts, "grpo_batch_std"), expected, rtol=1e-12, atol=0)


def test_worked_examples():
    rollouts = make_rollouts([1, 0, 0, 0, 1, 1], [0, 0, 0, 0, 1, 1], [1, 2, 3, 4, 1, 3])
    expected = {
        "maxrl": [3, -1, -1, -1, 0, 0],
        "pass_at_k": [2, 0, 0, 0, 0, 0],  # σ² = ¼·¾·4/3 = ¼
        "gpg": [1.5, -0.5, -0.5, -0.5, 0, 0],  # 3 of 6 rewards are not 0
        "opo": [0.9, -0.1, -0.1, -0.1, 0, 0],
        "vl_norm": [1.5 * w for w in (1, -1 / 6, -1 / 9, -1 / 12, 0, 0)],  # × 6 / (1 + 1/2 + 1/3 + 1/4 + 1 + 1/3)
    }
    expected["vl_norm"] = [value * 6 / (41 / 12) for value in expected["vl_norm"]]
    for estimator, values in expected.items():
        options = {"eps": 0.0} if DEFAULT_EPS[estimator] is not None else {}
        torch.testing.assert_close(reference_advantages(rollouts, estimator, **options),
                                   torch.tensor(values, dtype=torch.float64), rtol=1e-12, atol=1e-15)

"""Advantages and loss weights against the specification, the objectives of padded batches, and their symmetries."""

import itertools
import subprocess
import sys

import pytest
import torch
from advantage_batches import (
    BATCHES,
    MAX_LENGTH,
    assert_close,
    make_rollouts,
    option_cases,
    reference_advantages,
    reference_weights,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from rlvr_fast import Rollouts
from rlvr_fast.advantages import (
    AGGREGATIONS,
    DEFAULT_EPS,
    ESTIMATORS,
    advantages,
    advantages_and_weights,
    loss_weights,
)

# -- the fast path against the specification ---------------------------------------------------------------------------


@pytest.mark.parametrize(("estimator", "options"), option_cases())
def test_advantages_match_the_specification(estimator, options):
    for name, rollouts in BATCHES.items():
        actual = advantages(rollouts, estimator, **options)
        assert_close(actual, reference_advantages(rollouts, estimator, **options), name=name)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_loss_weights_match_the_specification(aggregation):
    for name, rollouts in BATCHES.items():
        given = torch.randn(rollouts.n_responses, generator=torch.Generator().manual_seed(3))
        weights = loss_weights(rollouts, given, aggregation, max_length=MAX_LENGTH)
        assert_close(weights, reference_weights(rollouts, given, aggregation), name=name)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_both_at_once_is_one_after_the_other(estimator):
    shared, own = {"max_length": MAX_LENGTH, "alpha": 0.75}, {"alpha": 0.75} if estimator == "vl_norm" else {}
    for aggregation in AGGREGATIONS if estimator != "vl_norm" else ("dr_grpo", "dapo"):
        for name in ("ragged real", "a prompt without tokens", "negative rewards"):
            rollouts = BATCHES[name]
            both = advantages_and_weights(rollouts, estimator, aggregation, **shared)
            assert torch.equal(both[0], advantages(rollouts, estimator, **own)), name
            # The fused call keeps float64 advantages until the end: one rounding fewer.
            assert_close(both[1], loss_weights(rollouts, both[0], aggregation, **shared).double(), name=name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_weights_accept_advantages_of_every_float_dtype(dtype):
    rollouts = BATCHES["ragged binary"]
    given = advantages(rollouts).to(dtype).requires_grad_()
    weights = loss_weights(rollouts, given)
    assert not weights.requires_grad
    assert_close(weights, reference_weights(rollouts, given.detach(), "grpo"))


def test_native_means_torch():
    rollouts = BATCHES["ragged real"]
    for backend in ("native", "auto"):
        torch.testing.assert_close(advantages(rollouts, backend=backend), advantages(rollouts, backend="torch"),
                                   rtol=0, atol=0)


# -- defined edges -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", ["one response", "one empty response",
                                  "equal rewards that binary fractions cannot hold"])
def test_nothing_varies_nothing_is_divided(name, estimator):
    for eps in (None,) if DEFAULT_EPS[estimator] is None else (None, 0.0):
        assert (advantages(BATCHES[name], estimator, eps=eps) == 0).all()


@pytest.mark.parametrize("eps", [None, 0.0])
@pytest.mark.parametrize(("name", "estimator"), [
    ("equal rewards but for an empty response", "reinforce_pp"),
    ("equal rewards but for a far empty response", "reinforce_pp"),
    ("equal centred rewards on all tokens", "reinforce_pp_baseline"),
])
def test_equal_tokens_whiten_to_zero(name, estimator, eps):
    assert (advantages(BATCHES[name], estimator, eps=eps) == 0).all()


@pytest.mark.parametrize("estimator", ["opo", "reinforce_pp", "reinforce_pp_baseline", "vl_norm"])
def test_token_statistics_without_tokens_give_zero(estimator):
    assert (advantages(BATCHES["all empty"], estimator) == 0).all()


def test_no_responses_give_empty_results():
    for estimator, aggregation in itertools.product(ESTIMATORS, AGGREGATIONS):
        if (estimator, aggregation) != ("vl_norm", "vl_norm"):
            both = advantages_and_weights(BATCHES["no responses"], estimator, aggregation, max_length=9)
            assert [x.shape for x in both] == [(0,), (0,)]


# -- aggregation: Σ_t w_t x_t against the masked means of a padded batch -----------------------------------------------


def padded_objective(aggregation, loss, mask, prompts, alpha):
    """The objective as a framework computes it from [B, T] tensors; ``loss`` is A_i x_{i,t}."""
    lengths = mask.sum(1)
    if aggregation == "grpo":
        return ((loss * mask).sum(1) / lengths.clamp(min=1)).mean()
    if aggregation in ("dapo", "bnpo"):
        return (loss * mask).sum() / mask.sum()
    if aggregation == "dr_grpo":
        return (loss * mask).sum() / (len(loss) * MAX_LENGTH)
    if aggregation == "seq_mean_token_sum":
        return (loss * mask).sum(1).mean()
    if aggregation == "prompt_mean":
        per_prompt = [(loss * mask)[prompts == q].sum() / mask[prompts == q].sum() for q in prompts.unique()]
        return torch.stack(per_prompt).mean()
    powers = torch.where(lengths > 0, lengths.clamp(min=1) ** -alpha, 0.0)
    return ((loss * mask).sum(1) * powers / powers.sum()).sum() / MAX_LENGTH


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("alpha", [1.0, 0.75])
def test_weights_reproduce_the_padded_objective(aggregation, alpha):
    generator = torch.Generator().manual_seed(11)
    mask = torch.rand(12, MAX_LENGTH, generator=generator) < torch.rand(12, 1, generator=generator)
    mask[5] = False
    prompts = torch.tensor([0, 1, 2] * 4)
    rewards = torch.randn(12, generator=generator)
    rollouts = Rollouts.from_padded(torch.zeros(12, MAX_LENGTH, dtype=torch.int64), mask, rewards, prompt_ids=prompts,
                                    threshold=0.0)
    logp = torch.randn(12, MAX_LENGTH, generator=generator, dtype=torch.float64)
    exact = reference_advantages(rollouts, "grpo")
    expected = padded_objective(aggregation, exact[:, None] * logp, mask.double(), prompts, alpha)
    options = {"alpha": alpha} if aggregation == "vl_norm" else {}
    by_reference = reference_weights(rollouts, exact, aggregation, **options) @ rollouts.pack(logp)
    torch.testing.assert_close(by_reference, expected, rtol=1e-12, atol=1e-15)
    weights = loss_weights(rollouts, exact, aggregation, max_length=MAX_LENGTH, alpha=alpha)
    # float32 weights: N of them, each off by half a rounding step of 6e-8.
    slack = 6e-8 * float((weights.double() * rollouts.pack(logp)).abs().sum())
    torch.testing.assert_close(weights.double() @ rollouts.pack(logp), expected, rtol=0, atol=slack)


def test_vl_norm_as_estimator_or_as_aggregation_is_one_objective():
    rollouts = BATCHES["ragged binary"]
    by_estimator = advantages_and_weights(rollouts, "vl_norm", "dr_grpo", eps=1e-6, max_length=MAX_LENGTH, alpha=0.75)
    by_aggregation = advantages_and_weights(rollouts, "grpo", "vl_norm", eps=1e-6, max_length=MAX_LENGTH, alpha=0.75)
    assert_close(by_estimator[1], by_aggregation[1].double())


# -- properties --------------------------------------------------------------------------------------------------------


@st.composite
def small_batches(draw):
    """(rewards in eighths, prompt ids, lengths): sums of eighths are exact, so order cannot show in the rounding."""
    size = draw(st.integers(1, 14))
    column = lambda elements: draw(st.lists(elements, min_size=size, max_size=size))  # noqa: E731
    return (torch.tensor(column(st.integers(-16, 16))) / 8, torch.tensor(column(st.integers(0, 3))),
            torch.tensor(column(st.integers(0, 6))))


hypothesis_settings = settings(max_examples=25, deadline=None, derandomize=True)


@hypothesis_settings
@given(batch=small_batches(), seed=st.integers(0, 99))
def test_permuting_responses_permutes_advantages(batch, seed):
    order = torch.randperm(len(batch[0]), generator=torch.Generator().manual_seed(seed))
    plain, permuted = make_rollouts(*batch), make_rollouts(*(column[order] for column in batch))
    for estimator in ESTIMATORS:
        assert_close(advantages(permuted, estimator), advantages(plain, estimator)[order].double())


@hypothesis_settings
@given(batch=small_batches())
def test_the_names_of_prompts_do_not_matter(batch):
    rewards, prompts, lengths = batch
    plain, renamed = make_rollouts(*batch), make_rollouts(rewards, torch.tensor([42, -7, 10**12, 0])[prompts], lengths)
    for estimator in ESTIMATORS:
        assert torch.equal(advantages(plain, estimator), advantages(renamed, estimator))


@hypothesis_settings
@given(batch=small_batches(), scale=st.sampled_from([0.25, 2.0, 8.0]), shift=st.sampled_from([-4.0, 0.0, 32.0]))
def test_affine_changes_of_the_reward(batch, scale, shift):
    rewards, prompts, lengths = batch
    plain, changed = make_rollouts(*batch), make_rollouts(scale * rewards + shift, prompts, lengths)
    for estimator in ("grpo", "grpo_population_std", "grpo_batch_std", "reinforce_pp", "pass_at_k", "vl_norm"):
        assert_close(advantages(changed, estimator, eps=0.0), advantages(plain, estimator, eps=0.0).double())
    for estimator in ("dr_grpo", "rloo", "opo"):
        assert_close(advantages(changed, estimator), scale * advantages(plain, estimator).double())


# -- bad input ---------------------------------------------------------------------------------------------------------

ROLLOUTS = BATCHES["contiguous"]
GIVEN = torch.zeros(16)


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: advantages("rollouts"), TypeError, "rollouts must be a Rollouts, got str"),
    (lambda: advantages(ROLLOUTS, "ppo"), ValueError, "estimator must be one of grpo, .*got 'ppo'"),
    (lambda: advantages(ROLLOUTS, 3), TypeError, "estimator must be a string"),
    (lambda: advantages(ROLLOUTS, eps=-1e-6), ValueError, "eps must be >= 0, got -1e-06"),
    (lambda: advantages(ROLLOUTS, eps=float("nan")), ValueError, "eps must be finite"),
    (lambda: advantages(ROLLOUTS, eps="small"), TypeError, "eps must be a number, got str"),
    (lambda: advantages(ROLLOUTS, "rloo", eps=1e-6), ValueError, "eps must be None for estimator 'rloo'"),
    (lambda: advantages(ROLLOUTS, "grpo", alpha=1.0), TypeError, "alpha is not an option of estimator 'grpo'"),
    (lambda: advantages(ROLLOUTS, "gpg", f_norm=0.0), ValueError, "f_norm must be positive"),
    (lambda: advantages(ROLLOUTS, "vl_norm", alpha=-1.0), ValueError, "alpha must be >= 0"),
    (lambda: advantages(ROLLOUTS, "pass_at_k", normalize_by_std=1), TypeError, "normalize_by_std must be a bool"),
    (lambda: advantages(ROLLOUTS, backend="cuda"), ValueError, "backend must be one of"),
    (lambda: loss_weights(None, GIVEN), TypeError, "rollouts must be a Rollouts"),
    (lambda: loss_weights(ROLLOUTS, [0.0] * 16), TypeError, "advantages must be a torch.Tensor"),
    (lambda: loss_weights(ROLLOUTS, GIVEN[:3]), ValueError, r"advantages must have shape \[16\]"),
    (lambda: loss_weights(ROLLOUTS, GIVEN[:, None]), ValueError, r"advantages must have shape \[16\]"),
    (lambda: loss_weights(ROLLOUTS, GIVEN.long()), TypeError, "advantages must have dtype"),
    (lambda: loss_weights(ROLLOUTS, GIVEN.to("meta")), ValueError, "advantages must be on cpu"),
    (lambda: loss_weights(ROLLOUTS, GIVEN / 0), ValueError, "advantages must be finite"),
    (lambda: loss_weights(ROLLOUTS, GIVEN, "mean"), ValueError, "aggregation must be one of grpo, dapo"),
    (lambda: loss_weights(ROLLOUTS, GIVEN, "dr_grpo"), ValueError, "max_length must be given for .*'dr_grpo'"),
    (lambda: loss_weights(ROLLOUTS, GIVEN, "vl_norm"), ValueError, "max_length must be given for .*'vl_norm'"),
    (lambda: loss_weights(ROLLOUTS, GIVEN, "dr_grpo", max_length=0), ValueError, "max_length must be positive"),
    (lambda: loss_weights(ROLLOUTS, GIVEN, max_length=-5), ValueError, "max_length must be positive"),
    (lambda: loss_weights(ROLLOUTS, GIVEN, "vl_norm", max_length=9, alpha=-1), ValueError, "alpha must be >= 0"),
    (lambda: loss_weights(ROLLOUTS, GIVEN, backend=None), TypeError, "backend must be a string"),
    (lambda: advantages_and_weights(ROLLOUTS, "vl_norm", "vl_norm", max_length=9), ValueError, "weighted twice"),
])
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_triton_on_the_cpu_needs_the_interpreter():
    program = ("import torch, rlvr_fast\n"
               "r = rlvr_fast.Rollouts.from_packed(torch.zeros(2, dtype=torch.int64), torch.tensor([0, 1, 2]),\n"
               "    torch.tensor([0.0, 1.0]), group_size=2)\n"
               "try: rlvr_fast.advantages(r, backend='triton')\n"
               "except ValueError as error: print(error)\n")
    environment = {"PATH": "", "OMP_NUM_THREADS": "1"}
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert "backend 'triton' cannot run: Triton kernels need a GPU (or TRITON_INTERPRET=1" in done.stdout

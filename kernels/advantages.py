"""Advantages and token loss weights of a whole batch in one launch, one program per response.

A program sweeps the [R] arrays in blocks to form the statistics of its own group (and of the batch, where the
estimator asks for them), so groups need not be contiguous, nothing is sorted, and no program waits for another: the
result is bitwise repeatable. The sweeps cost O(R²) reads of arrays that stay in the L2 cache (R = 4096: 50 KB).

Statistics are fp32 in two passes around the mean, after subtracting the smallest reward of the set: a set of equal
rewards gives exactly 0, and a large common offset costs no digits. Squares of reward differences must fit fp32
(differences between 1e-19 and 1e19).
"""

import torch
import triton
import triton.language as tl

RESPONSE_BLOCK = 1024
TOKEN_BLOCK = 1024


@triton.jit
def _members(rewards, prompt_index, cu_seqlens, first, n_responses, group, OF_BATCH: tl.constexpr,
             BY_LENGTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rewards and weights of one block of responses: weight 0 outside the set, else 1 or the response's length."""
    response = first + tl.arange(0, BLOCK)
    exists = response < n_responses
    reward = tl.load(rewards + response, mask=exists, other=0.0)
    member = exists
    if not OF_BATCH:
        member = exists & (tl.load(prompt_index + response, mask=exists, other=-1) == group)
    if BY_LENGTH:
        start = tl.load(cu_seqlens + response, mask=member, other=0)
        weight = tl.load(cu_seqlens + response + 1, mask=member, other=0) - start
    else:
        weight = member.to(tl.int64)
    return reward, weight


@triton.jit
def _moments(rewards, prompt_index, cu_seqlens, n_responses, group, OF_BATCH: tl.constexpr, BY_LENGTH: tl.constexpr,
             VARIANCE: tl.constexpr, BLOCK: tl.constexpr):
    """(total weight, smallest reward, mean above it, sum of squared deviations) of the response's group or the batch.

    The first three are 0 for a set without weight; the last is 0 unless VARIANCE.
    """
    counts = tl.zeros([BLOCK], dtype=tl.int64)
    lows = tl.full([BLOCK], float("inf"), dtype=tl.float32)
    for first in range(0, n_responses, BLOCK):
        reward, weight = _members(rewards, prompt_index, cu_seqlens, first, n_responses, group, OF_BATCH, BY_LENGTH,
                                  BLOCK)
        counts += weight
        lows = tl.minimum(lows, tl.where(weight > 0, reward, float("inf")))
    total = tl.sum(counts).to(tl.float32)
    lowest = tl.where(total > 0, tl.min(lows), 0.0)

    sums = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, n_responses, BLOCK):
        reward, weight = _members(rewards, prompt_index, cu_seqlens, first, n_responses, group, OF_BATCH, BY_LENGTH,
                                  BLOCK)
        sums += tl.where(weight > 0, weight.to(tl.float32) * (reward - lowest), 0.0)
    mean = tl.sum(sums) / tl.maximum(total, 1.0)

    squares = tl.zeros([BLOCK], dtype=tl.float32)
    if VARIANCE:
        for first in range(0, n_responses, BLOCK):
            reward, weight = _members(rewards, prompt_index, cu_seqlens, first, n_responses, group, OF_BATCH,
                                      BY_LENGTH, BLOCK)
            deviation = reward - lowest - mean
            squares += tl.where(weight > 0, weight.to(tl.float32) * deviation * deviation, 0.0)
    return total, lowest, mean, tl.sum(squares)


@triton.jit
def _over_std(x, squares, degrees_of_freedom, eps):
    """x / (std + eps), and 0 where the set has no variance: no 0/0 even with eps = 0."""
    variance = squares / tl.maximum(degrees_of_freedom, 1.0)
    varies = variance > 0
    return tl.where(varies, x / tl.where(varies, tl.sqrt(variance) + eps, 1.0), 0.0)


@triton.jit
def _lengths(cu_seqlens, first, n_responses, BLOCK: tl.constexpr):
    """Lengths of one block of responses; 0 beyond the last."""
    response = first + tl.arange(0, BLOCK)
    exists = response < n_responses
    start = tl.load(cu_seqlens + response, mask=exists, other=0)
    return (tl.load(cu_seqlens + response + 1, mask=exists, other=0) - start).to(tl.float32)


@triton.jit
def _length_share(cu_seqlens, n_responses, length, alpha, BLOCK: tl.constexpr):
    """L_i^-alpha / Σ_j L_j^-alpha over the responses that have tokens; 0 if L_i = 0.

    Powers are of L over the shortest length: the largest is 1, so none of the sum is lost to underflow.
    """
    shortest_lengths = tl.full([BLOCK], float("inf"), dtype=tl.float32)
    for first in range(0, n_responses, BLOCK):
        lengths = _lengths(cu_seqlens, first, n_responses, BLOCK)
        shortest_lengths = tl.minimum(shortest_lengths, tl.where(lengths > 0, lengths, float("inf")))
    shortest = tl.min(shortest_lengths)
    powers = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, n_responses, BLOCK):
        powers += _power(_lengths(cu_seqlens, first, n_responses, BLOCK), shortest, alpha)
    return _power(length, shortest, alpha) / tl.maximum(tl.sum(powers), 1.0)


@triton.jit
def _power(length, shortest, alpha):
    """(L / shortest)^-alpha; 0 where there is no token."""
    has_tokens = length > 0
    ratio = tl.where(has_tokens, length / shortest, 1.0)
    return tl.where(has_tokens, tl.exp2(-alpha * tl.log2(ratio)), 0.0)


@triton.jit
def _nonzero_rewards(rewards, n_responses, BLOCK: tl.constexpr):
    counts = tl.zeros([BLOCK], dtype=tl.int32)
    for first in range(0, n_responses, BLOCK):
        response = first + tl.arange(0, BLOCK)
        counts += (tl.load(rewards + response, mask=response < n_responses, other=0.0) != 0).to(tl.int32)
    return tl.sum(counts).to(tl.float32)


@triton.jit
def _best_rival(rewards, prompt_index, n_responses, group, own, BLOCK: tl.constexpr):
    """Largest reward of the other responses to the same prompt; -inf if there is none."""
    tops = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    for first in range(0, n_responses, BLOCK):
        response = first + tl.arange(0, BLOCK)
        exists = response < n_responses
        rival = exists & (tl.load(prompt_index + response, mask=exists, other=-1) == group) & (response != own)
        tops = tl.maximum(tops, tl.load(rewards + response, mask=rival, other=float("-inf")))
    return tl.max(tops)


@triton.jit
def _advantage(rewards, prompt_index, cu_seqlens, n_responses, own, length, eps, alpha, gpg_scale,
               ESTIMATOR: tl.constexpr, NORMALIZE_BY_STD: tl.constexpr, BLOCK: tl.constexpr):
    group = tl.load(prompt_index + own)
    reward = tl.load(rewards + own)
    total, lowest, mean, squares = _moments(
        rewards, prompt_index, cu_seqlens, n_responses, group, OF_BATCH=ESTIMATOR == "reinforce_pp",
        BY_LENGTH=(ESTIMATOR == "reinforce_pp") or (ESTIMATOR == "opo"), VARIANCE=NORMALIZE_BY_STD, BLOCK=BLOCK)
    centred = reward - lowest - mean
    if (ESTIMATOR == "grpo") or (ESTIMATOR == "vl_norm"):
        advantage = _over_std(centred, squares, total - 1, eps)
        if ESTIMATOR == "vl_norm":
            advantage *= n_responses * _length_share(cu_seqlens, n_responses, length, alpha, BLOCK)
    elif ESTIMATOR == "grpo_population_std":
        advantage = _over_std(centred, squares, total, eps)
    elif ESTIMATOR == "grpo_batch_std":
        batch_total, _, _, batch_squares = _moments(rewards, prompt_index, cu_seqlens, n_responses, group,
                                                    OF_BATCH=True, BY_LENGTH=False, VARIANCE=True, BLOCK=BLOCK)
        advantage = _over_std(centred, batch_squares, batch_total - 1, eps)
    elif ESTIMATOR == "reinforce_pp":
        variance = squares / tl.maximum(total - 1, 1.0)
        varies = variance > 0
        advantage = tl.where(varies, centred / tl.sqrt(tl.where(varies, variance + eps, 1.0)), 0.0)
    elif ESTIMATOR == "rloo":
        advantage = centred * total / tl.maximum(total - 1, 1.0)
    elif ESTIMATOR == "maxrl":
        group_mean = lowest + mean
        divisor = tl.where(group_mean > 0, group_mean + eps, 1.0)
        advantage = tl.where(group_mean > 0, centred / divisor, 0.0)
    elif ESTIMATOR == "gpg":
        nonzero = tl.maximum(_nonzero_rewards(rewards, n_responses, BLOCK), 1.0)
        advantage = centred * gpg_scale * (n_responses / nonzero)
    elif ESTIMATOR == "pass_at_k":
        rival = _best_rival(rewards, prompt_index, n_responses, group, own, BLOCK)
        lead = tl.where(rival == float("-inf"), 0.0, tl.maximum(reward - rival, 0.0))
        if NORMALIZE_BY_STD:
            advantage = _over_std(lead, squares, total - 1, eps)
        else:
            advantage = lead
    elif ESTIMATOR == "opo":
        advantage = tl.where(total > 0, centred, 0.0)
    else:
        tl.static_assert(ESTIMATOR == "dr_grpo")
        advantage = centred
    return advantage


@triton.jit
def _coefficient(rewards, prompt_index, cu_seqlens, n_responses, n_prompts, own, length, alpha, max_length,
                 AGGREGATION: tl.constexpr, BLOCK: tl.constexpr):
    """c_i, the weight of every token of the response in the aggregated loss. Asked only for responses with tokens."""
    if AGGREGATION == "grpo":
        coefficient = 1.0 / (n_responses * length)
    elif AGGREGATION == "token_mean":
        coefficient = 1.0 / tl.load(cu_seqlens + n_responses).to(tl.float32)
    elif AGGREGATION == "seq_mean_token_sum":
        coefficient = 1.0 / n_responses
    elif AGGREGATION == "dr_grpo":
        coefficient = 1.0 / (n_responses * max_length)
    elif AGGREGATION == "prompt_mean":
        counts = tl.zeros([BLOCK], dtype=tl.int64)
        group = tl.load(prompt_index + own)
        for first in range(0, n_responses, BLOCK):
            _, weight = _members(rewards, prompt_index, cu_seqlens, first, n_responses, group, OF_BATCH=False,
                                 BY_LENGTH=True, BLOCK=BLOCK)
            counts += weight
        coefficient = 1.0 / (n_prompts * tl.sum(counts).to(tl.float32))
    else:
        tl.static_assert(AGGREGATION == "vl_norm")
        coefficient = _length_share(cu_seqlens, n_responses, length, alpha, BLOCK) / max_length
    return coefficient


@triton.jit(do_not_specialize=["n_responses", "n_prompts"])
def advantages_kernel(rewards, prompt_index, cu_seqlens, advantages, weights, n_responses, n_prompts, eps, alpha,
                      gpg_scale, max_length, ESTIMATOR: tl.constexpr, NORMALIZE_BY_STD: tl.constexpr,
                      AGGREGATION: tl.constexpr, RESPONSE_BLOCK: tl.constexpr, TOKEN_BLOCK: tl.constexpr):
    """advantages[i] and weights[cu_seqlens[i]:cu_seqlens[i+1]] of response i = program_id(0).

    ESTIMATOR "given" reads ``advantages`` instead of writing it; AGGREGATION "none" leaves ``weights`` alone.
    """
    own = tl.program_id(0)
    start = tl.load(cu_seqlens + own)
    end = tl.load(cu_seqlens + own + 1)
    length = (end - start).to(tl.float32)
    if ESTIMATOR == "given":
        advantage = tl.load(advantages + own)
    else:
        advantage = _advantage(rewards, prompt_index, cu_seqlens, n_responses, own, length, eps, alpha, gpg_scale,
                               ESTIMATOR, NORMALIZE_BY_STD, RESPONSE_BLOCK)
        tl.store(advantages + own, advantage)
    if AGGREGATION != "none":
        if end > start:
            weight = advantage * _coefficient(rewards, prompt_index, cu_seqlens, n_responses, n_prompts, own, length,
                                              alpha, max_length, AGGREGATION, RESPONSE_BLOCK)
            for first in range(start, end, TOKEN_BLOCK):
                token = first + tl.arange(0, TOKEN_BLOCK)
                tl.store(weights + token, tl.zeros([TOKEN_BLOCK], dtype=tl.float32) + weight, mask=token < end)


NEEDS_STD = ("grpo", "grpo_population_std", "vl_norm", "reinforce_pp", "pass_at_k")


def launch(rewards, prompt_index, cu_seqlens, n_prompts, advantages, weights, *, estimator, aggregation, eps=0.0,
           alpha=1.0, f_norm=1.0, max_length=1.0, normalize_by_std=True):
    """Fill ``advantages`` [R] float32 and ``weights`` [N] float32 in place.

    Args:
        rewards: [R] float32.
        prompt_index: [R] int64.
        cu_seqlens: [R+1] int64.
        estimator: "given", or an estimator of ``rlvr_fast.advantages``. "reinforce_pp_baseline" is two launches: its
            whitening needs the group mean of every other response, which is what the first launch writes.
        aggregation: "none" (``weights`` may be None), or an aggregation of ``rlvr_fast.advantages``.
    """
    n_responses = rewards.numel()
    if n_responses == 0:
        return
    if estimator == "reinforce_pp_baseline":
        centred = torch.empty_like(rewards)
        launch(rewards, prompt_index, cu_seqlens, n_prompts, centred, None, estimator="dr_grpo", aggregation="none")
        rewards, estimator = centred, "reinforce_pp"
    aggregation = "token_mean" if aggregation in ("dapo", "bnpo") else aggregation
    with torch.cuda.device_of(rewards):
        advantages_kernel[(n_responses,)](
            rewards, prompt_index, cu_seqlens, advantages, advantages if weights is None else weights, n_responses,
            n_prompts, eps, alpha, 1.0 / f_norm, max_length, ESTIMATOR=estimator,
            NORMALIZE_BY_STD=estimator in NEEDS_STD and normalize_by_std, AGGREGATION=aggregation,
            RESPONSE_BLOCK=min(RESPONSE_BLOCK, max(32, triton.next_power_of_2(n_responses))), TOKEN_BLOCK=TOKEN_BLOCK,
            num_warps=4)


def aot_specializations():
    """Shipped configurations for ahead-of-time compilation checks."""
    signature = {"rewards": "*fp32", "prompt_index": "*i64", "cu_seqlens": "*i64", "advantages": "*fp32",
                 "weights": "*fp32", "n_responses": "i32", "n_prompts": "i32", "eps": "fp32", "alpha": "fp32",
                 "gpg_scale": "fp32", "max_length": "fp32"}
    shipped = [("grpo", "grpo", True), ("grpo", "token_mean", True), ("rloo", "token_mean", False),
               ("reinforce_pp", "token_mean", False), ("vl_norm", "dr_grpo", False), ("given", "prompt_mean", False),
               ("pass_at_k", "none", False)]
    return [{"name": f"advantages_{estimator}_{aggregation}", "fn": advantages_kernel, "signature": signature,
             "constexprs": {"ESTIMATOR": estimator, "NORMALIZE_BY_STD": estimator in NEEDS_STD,
                            "AGGREGATION": aggregation, "RESPONSE_BLOCK": RESPONSE_BLOCK, "TOKEN_BLOCK": TOKEN_BLOCK},
             "num_warps": 4, "num_stages": 2, "hot": hot, "expects_matrix": False}
            for estimator, aggregation, hot in shipped]

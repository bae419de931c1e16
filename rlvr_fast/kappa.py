"""How much of the gradient gap an estimator puts into the update, and what its advantages reveal.

With binary rewards and a group of G responses of which a share p is correct, the centred estimators all point along the
gap and differ by one scalar [derived]:

    (1/G) Σ_i A_i s_i = κ (mean⁺ s - mean⁻ s)   exactly, in the finite sample, for any scores s_i

    estimator             κ(p, G)                       A of a correct / an incorrect response
    dr_grpo               p (1-p)                       1-p                          -p
    rloo                  p (1-p) G/(G-1)               (1-p) G/(G-1)                -p G/(G-1)
    grpo                  √(p (1-p)) √((G-1)/G)         √((1-p)/p) √((G-1)/G)        -√(p/(1-p)) √((G-1)/G)
    grpo_population_std   √(p (1-p))                    √((1-p)/p)                   -√(p/(1-p))
    maxrl                 1-p                           (1-p)/p                      -1

These are for eps = 0. ``kappa`` and ``recover_from_advantages`` also take the eps of the divisor (σ + eps; p + eps for
maxrl).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from rlvr_fast import _validate as check
from rlvr_fast.advantages import DEFAULT_EPS, check_advantages

PROPORTIONAL = ("grpo", "grpo_population_std", "dr_grpo", "rloo", "maxrl")
WITH_EPS = ("grpo", "grpo_population_std", "maxrl")
NOT_PROPORTIONAL = {
    "reinforce": "without a baseline it is p mean⁺ s, which has no term in mean⁻ s",
    "grpo_batch_std": "its factor is p (1-p) over a standard deviation that depends on the other prompts",
    "opo": "its length-weighted baseline is not p, so the two classes get weights that do not balance",
    "reinforce_pp": "its baseline is the batch's, not the prompt's, so the two classes get weights that do not balance",
    "reinforce_pp_baseline": "its whitening subtracts the batch's token mean again, so the two classes get weights "
                             "that do not balance",
    "gpg": "its factor is p (1-p) times the share of non-zero rewards in the batch, inverted",
    "pass_at_k": "it weighs one response of the group, and only if no other is as good",
    "vl_norm": "its length weights make it a multiple of a length-weighted gap",
}
RECOVERABLE = ("grpo", "grpo_population_std", "dr_grpo", "rloo")
# Widest relative deviation from an attainable advantage: bfloat16 rounds by 2^-8, another eps of the table moves 3e-4.
MATCH_TOLERANCE = 1e-2


def kappa(success_rate: torch.Tensor | float, group_size: torch.Tensor | int, estimator: str, *,
          eps: float = 0.0) -> torch.Tensor:
    """κ(p, G) of the module's identity, for the rewards of the sampled group [derived].

    Args:
        success_rate: p in [0, 1], any shape. NaN (an unknown rate) gives NaN.
        group_size: G >= 1, an int or integers that broadcast with ``success_rate``.
        estimator: grpo, grpo_population_std, dr_grpo, rloo or maxrl.
        eps: what the estimator adds to its divisor; only for grpo, grpo_population_std and maxrl.

    Returns:
        The broadcast shape, in ``success_rate``'s dtype (float32 for a Python number). 0 where p is 0 or 1, or G is 1:
        one class is empty, every advantage is 0 and there is no gap.

    Raises:
        ValueError: also for an estimator that is not a multiple of the gap, with the reason.
    """
    p, size, dtype = _checked_rate(success_rate, group_size)
    _check_proportional(estimator, eps)
    return _kappa(p, size, estimator, eps).to(dtype)


def population_kappa(success_rate: torch.Tensor | float, estimator: str, group_size: int | None = None, *,
                     filtered: bool = False) -> torch.Tensor:
    """E[(1/G) Σ A_i s_i] = κ (g⁺ - g⁻) over sampled groups, as a function of the true success rate J [derived].

    Σ_k Binomial(k; G, J) κ(k/G, G) with eps = 0, which is J (1-J) for rloo (and for reinforce, whose mean is that of
    rloo although its samples are no multiple of the gap), (1-1/G) J (1-J) for dr_grpo, E √(p̂ (1-p̂)) for
    grpo_population_std and √((G-1)/G) of that for grpo, and (1-J) (1 - (1-J)^(G-1)) for maxrl.

    Args:
        success_rate: J in [0, 1], any shape. NaN gives NaN.
        estimator: reinforce, or one that ``kappa`` knows.
        group_size: G >= 2; needed by all but reinforce.
        filtered: groups of one class are dropped and sampled again (DAPO): κ is divided by 1 - J^G - (1-J)^G. At J = 0
            and J = 1 the limit is returned.

    Returns:
        ``success_rate``'s shape and dtype.
    """
    rate, _, dtype = _checked_rate(success_rate, 1)
    if not isinstance(filtered, bool):
        raise TypeError(f"filtered must be a bool, got {check.describe(filtered)}")
    if estimator == "reinforce":
        if filtered:
            raise ValueError("filtered must be False for estimator 'reinforce': it has no groups to filter")
        return (rate * (1 - rate)).to(dtype)
    _check_proportional(estimator, 0.0)
    size = _checked_group_size(group_size)
    # Binomial weights given that both classes occur, relative to J (1-J): finite in the limits J → 0 and J → 1.
    k = torch.arange(1, size, dtype=torch.float64, device=rate.device)
    log_choose = -torch.lgamma(k + 1) - torch.lgamma(size - k + 1)  # up to a constant, which softmax ignores
    log_odds = torch.special.xlogy(k - 1, rate[..., None]) + torch.special.xlogy(size - 1 - k, 1 - rate[..., None])
    mean = ((log_choose + log_odds).softmax(-1) * _kappa(k / size, k.new_full((), size), estimator, 0.0)).sum(-1)
    if not filtered:
        rarer = torch.minimum(rate, 1 - rate)
        mean = mean * (-torch.expm1(size * torch.log1p(-rarer)) - rarer**size)
    return mean.to(dtype)


class Recovered(NamedTuple):
    """What a response's advantage says about its group.

    success_rate: [R] p of its group; NaN where the advantage is 0: a group of one class, whose p is 0 or 1.
    correct: [R] bool, its class; false where ``mixed`` is, because the class is then unknown.
    mixed: [R] bool, whether its group holds both classes.
    """

    success_rate: torch.Tensor
    correct: torch.Tensor
    mixed: torch.Tensor


def recover_from_advantages(advantages: torch.Tensor, group_size: int, estimator: str = "grpo", *,
                            eps: float | None = None) -> Recovered:
    """Success rate and class of every response from its advantage alone, without group ids or rewards [derived].

    A group of G binary rewards has one of G - 1 mixed success rates, each with its own pair of advantages (the module's
    table): an advantage is matched to the nearest, separately for each sign. So a shuffled fragment of a group is
    enough, and rounding to bfloat16 does no harm while neighbouring rates stay apart (G up to about 100).

    Args:
        advantages: [R] floating point, as the training loop holds them, from binary rewards 0 and 1.
        group_size: G >= 2, the size of the group that normalised them.
        estimator: grpo, grpo_population_std, dr_grpo or rloo. maxrl gives every incorrect response -1 whatever p is,
            so p cannot be recovered.
        eps: the eps that was used; None takes the estimator's default in ``rlvr_fast.advantages``.

    Returns:
        ``Recovered``: (success_rate [R] float32, correct [R] bool, mixed [R] bool).

    Raises:
        ValueError: also for CPU advantages that no group of ``group_size`` binary rewards gives under this estimator.
    """
    check_advantages(advantages)
    size = _checked_group_size(group_size)
    if estimator == "maxrl":
        raise ValueError("estimator 'maxrl' cannot be inverted: every incorrect response has advantage -1 whatever the "
                         f"success rate is; expected one of {', '.join(RECOVERABLE)}")
    check.choice("estimator", estimator, RECOVERABLE)
    eps = (DEFAULT_EPS[estimator] or 0.0) if eps is None else eps
    _check_eps(estimator, eps)

    given = advantages.detach().double()
    p = torch.arange(1, size, dtype=torch.float64, device=given.device) / size
    scale = _kappa(p, given.new_full((), size), estimator, eps) / (p * (1 - p))  # A = (r - p) · scale
    if_correct, if_incorrect = (1 - p) * scale, -p * scale  # both fall as p grows
    nearest_correct, nearest_incorrect = _nearest(given, if_correct), _nearest(given, if_incorrect)
    correct, mixed = given > 0, given != 0
    nearest = torch.where(correct, nearest_correct, nearest_incorrect)
    if given.device.type == "cpu":
        attainable = torch.where(correct, if_correct[nearest], if_incorrect[nearest])
        stray = mixed & ((given - attainable).abs() > MATCH_TOLERANCE * attainable.abs())
        if stray.any():
            raise ValueError(f"advantages must come from groups of {size} binary rewards under estimator {estimator!r} "
                             f"with eps {eps:g}, which never give {given[stray][0].item():g}: another group_size or "
                             "estimator was used, or rewards were not 0 and 1")
    return Recovered(torch.where(mixed, p[nearest], torch.nan).float(), correct, mixed)


def _kappa(p: torch.Tensor, size: torch.Tensor, estimator: str, eps: float) -> torch.Tensor:
    """κ in float64, as p (1-p) over the estimator's divisor."""
    spread = p * (1 - p)
    bessel = size / (size - 1).clamp(min=1)
    if estimator == "dr_grpo":
        divisor = torch.ones_like(spread)
    elif estimator == "rloo":
        divisor = 1 / bessel
    elif estimator == "grpo":
        divisor = (spread * bessel).sqrt() + eps
    elif estimator == "grpo_population_std":
        divisor = spread.sqrt() + eps
    else:
        divisor = p + eps
    mixed = (spread != 0) & (size > 1)  # NaN rates pass and stay NaN
    return torch.where(mixed, spread / torch.where(mixed, divisor, 1.0), 0.0)


def _nearest(values: torch.Tensor, falling: torch.Tensor) -> torch.Tensor:
    """Index of the entry of ``falling`` (strictly falling) that is nearest to each value."""
    rising = falling.flip(0)
    return len(falling) - 1 - torch.bucketize(values, (rising[1:] + rising[:-1]) / 2)


def _checked_rate(success_rate: torch.Tensor | float, group_size: torch.Tensor | int
                  ) -> tuple[torch.Tensor, torch.Tensor, torch.dtype]:
    """(p as float64, G as float64, the dtype to answer in)."""
    if not isinstance(success_rate, torch.Tensor):
        success_rate = torch.tensor(check.real("success_rate", success_rate))
    rate = check.tensor("success_rate", success_rate, dtypes=(*check.FLOAT_DTYPES, torch.float64)).detach()
    if rate.device.type == "cpu" and ((rate < 0) | (rate > 1)).any():
        raise ValueError(f"success_rate must be in [0, 1], got {check.describe(rate)} with values outside")
    if isinstance(group_size, torch.Tensor):
        size = check.tensor("group_size", group_size, dtypes=check.INTEGER_DTYPES, device=rate.device)
        if size.device.type == "cpu" and (size < 1).any():
            raise ValueError(f"group_size must be >= 1, got {check.describe(size)} with smaller values")
    else:
        size = torch.tensor(_checked_group_size(group_size, smallest=1), device=rate.device)
    return rate.double(), size.double(), rate.dtype


def _checked_group_size(group_size: int | None, smallest: int = 2) -> int:
    if isinstance(group_size, bool) or not isinstance(group_size, int):
        raise TypeError(f"group_size must be an int >= {smallest}, got {check.describe(group_size)}")
    if group_size < smallest:
        raise ValueError(f"group_size must be >= {smallest}, got {group_size}")
    return group_size


def _check_proportional(estimator: str, eps: float) -> None:
    reason = NOT_PROPORTIONAL.get(estimator) if isinstance(estimator, str) else None
    if reason is not None:
        raise ValueError(f"estimator {estimator!r} is not a known multiple of the gap: {reason}; "
                         f"expected one of {', '.join(PROPORTIONAL)}")
    check.choice("estimator", estimator, PROPORTIONAL)
    _check_eps(estimator, eps)


def _check_eps(estimator: str, eps: float) -> None:
    if check.real("eps", eps) < 0:
        raise ValueError(f"eps must be >= 0, got {eps!r}")
    if eps and estimator not in WITH_EPS:
        raise ValueError(f"eps must be 0 for estimator {estimator!r}, whose formula has none; got {eps!r}")

"""Advantages per response and loss weights per token, for the estimators and aggregations in use.

For a prompt with G responses, rewards r, lengths L, mean μ, standard deviation σ (Bessel), in a batch of R responses:

    estimator               A_i                                           eps   default matches
    grpo                    (r - μ) / (σ + eps)                           1e-4  TRL (verl 1e-6, OpenRLHF 1e-9)
    grpo_population_std     the same with σ² = Σ (r - μ)² / G             1e-4  loops that divide by numpy.std
    grpo_batch_std          (r - μ) / (σ of all R rewards + eps)          1e-4  TRL scale_rewards="batch"
    dr_grpo                 r - μ                                         -     Dr. GRPO, TRL "none", prime-rl, tinker
    rloo                    r - mean of the others = G/(G-1) (r - μ)      -     verl, OpenRLHF, TRL RLOO
    maxrl                   (r - μ) / (μ + eps), 0 where μ ≤ 0            0     prime-rl (SkyRL 1e-6)
    opo                     r - Σ L r / Σ L                               -     verl
    reinforce_pp            (r - m) / √(v + eps), over the batch's tokens 1e-8  verl with γ = 1 and no KL in the reward
    reinforce_pp_baseline   reinforce_pp of r - μ                         1e-8  verl
    gpg                     (R / #{r ≠ 0}) (r - μ) / f_norm               -     verl; option f_norm = 1
    pass_at_k               best response: (r₍₁₎ - r₍₂₎) / (σ + eps)      1e-6  verl; option normalize_by_std = True
    vl_norm                 grpo · L^-alpha / batch mean of L^-alpha      1e-6  ΔL normalisation; option alpha = 1

Weights are w_{i,t} = A_i c_i, the coefficient of each token's log-prob in the objective Σ_t w_t logp_t (maximised):

    aggregation             c_i                                    also called
    grpo                    1 / (R L_i)                            seq-mean-token-mean
    dapo                    1 / Σ_j L_j, optimizer batch           token-mean
    bnpo                    1 / Σ_j L_j, micro-batch               local token-mean
    dr_grpo                 1 / (R max_length)                     seq-mean-token-sum-norm
    seq_mean_token_sum      1 / R
    prompt_mean             1 / (P Σ_{j∈q} L_j)                    SkyRL prompt_mean
    vl_norm                 L_i^-alpha / (max_length Σ_j L_j^-alpha)

dapo and bnpo are one formula: what differs is the batch it is given. For dapo give the rollouts of the whole optimizer
batch and split the weights over the micro-batches; for bnpo give each micro-batch by itself. R, P and Σ_j count the
rollouts given, so responses without tokens count in R.

Defined edges, never NaN: where the rewards of the set that normalises do not vary, A = 0 exactly, whatever eps is. So a
prompt with one response, having no one to be compared with, has A = 0 wherever the baseline is the prompt's own (verl
gives A = r there); reinforce_pp and reinforce_pp_baseline go on to compare it with the batch. A response without tokens
has a finite advantage and no weight; it has no part in token statistics, and vl_norm gives it A = 0. An opo prompt
without tokens has A = 0, and so has every response where reinforce_pp finds no token in the batch.
Nothing here is differentiable: advantages and weights are constants of the objective.
"""

from __future__ import annotations

from typing import TypedDict

import torch

from rlvr_fast import _validate as check
from rlvr_fast import backends
from rlvr_fast.rollouts import Rollouts
from rlvr_fast.torch_advantages import torch_advantages, torch_loss_weights

DEFAULT_EPS = {
    "grpo": 1e-4, "grpo_population_std": 1e-4, "grpo_batch_std": 1e-4, "dr_grpo": None, "rloo": None, "maxrl": 0.0,
    "opo": None, "reinforce_pp": 1e-8, "reinforce_pp_baseline": 1e-8, "gpg": None, "pass_at_k": 1e-6, "vl_norm": 1e-6,
}
DEFAULT_OPTIONS: dict[str, dict[str, float | bool]] = {
    "gpg": {"f_norm": 1.0}, "pass_at_k": {"normalize_by_std": True}, "vl_norm": {"alpha": 1.0}}
ESTIMATORS = tuple(DEFAULT_EPS)
AGGREGATIONS = ("grpo", "dapo", "bnpo", "dr_grpo", "seq_mean_token_sum", "prompt_mean", "vl_norm")
WITH_MAX_LENGTH = ("dr_grpo", "vl_norm")


class EstimatorOptions(TypedDict, total=False):
    """The options that a formula has, by name."""

    eps: float
    f_norm: float
    normalize_by_std: bool
    alpha: float


class AggregationOptions(TypedDict, total=False):
    """The same for an aggregation."""

    max_length: float
    alpha: float


def advantages(rollouts: Rollouts, estimator: str = "grpo", *, eps: float | None = None, backend: str = "auto",
               **estimator_options: float | bool) -> torch.Tensor:
    """Advantage of every response: [R] float32, from ``rollouts.rewards`` (which need not be binary).

    Args:
        rollouts: R responses to P prompts, a prompt's responses in any order and number.
        estimator: grpo, grpo_population_std, grpo_batch_std, dr_grpo, rloo, maxrl, opo, reinforce_pp,
            reinforce_pp_baseline, gpg, pass_at_k or vl_norm: the table at the head of rlvr_fast/advantages.py.
        eps: the formula's eps, >= 0; None takes the table's. Refused by estimators that have none.
        backend: "triton" (the fused kernel), "torch" (float64, any device; "native" means the same), or "auto": triton
            on a GPU, else torch.
        **estimator_options: ``f_norm`` (gpg, positive), ``normalize_by_std`` (pass_at_k), ``alpha`` (vl_norm, >= 0).

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    options = _checked_estimator(rollouts, estimator, eps, estimator_options)
    if backends.resolve(backend, rollouts.device) == "triton":
        result = torch.empty_like(rollouts.rewards)
        _launch(rollouts, estimator, "none", result, None, **options)
        return result
    return torch_advantages(rollouts, estimator, **options).float()


def loss_weights(rollouts: Rollouts, advantages: torch.Tensor, aggregation: str = "grpo", *,
                 max_length: float | None = None, alpha: float = 1.0, backend: str = "auto") -> torch.Tensor:
    """Coefficient of every token's log-prob in the objective to be maximised: [N] float32.

    The training loss is ``-(w * logp).sum()`` on policy, and ``-(w * ratio).sum()`` with importance ratios.

    Args:
        rollouts: N tokens of R responses.
        advantages: [R] floating point, finite, on the rollouts' device.
        aggregation: grpo, dapo, bnpo, dr_grpo, seq_mean_token_sum, prompt_mean or vl_norm: the second table at the head
            of rlvr_fast/advantages.py.
        max_length: constant divisor of dr_grpo and vl_norm, e.g. the longest completion allowed; unused by the others.
        alpha: exponent of vl_norm, >= 0; 1 is the minimum-variance choice when a response's gradient variance grows
            like its length, 0.75 was its authors' choice for mathematics. Unused by the others.
        backend: as for ``advantages``.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    _check_rollouts(rollouts)
    check_advantages(advantages, rollouts.n_responses, rollouts.device)
    options = _checked_aggregation(aggregation, max_length, alpha)
    if backends.resolve(backend, rollouts.device) == "triton":
        weights = rollouts.rewards.new_empty(rollouts.n_tokens)
        _launch(rollouts, "given", aggregation, advantages.detach().float().contiguous(), weights, **options)
        return weights
    return torch_loss_weights(rollouts, advantages.detach().double(), aggregation, **options).float()


def advantages_and_weights(rollouts: Rollouts, estimator: str = "grpo", aggregation: str = "grpo", *,
                           eps: float | None = None, max_length: float | None = None, alpha: float = 1.0,
                           backend: str = "auto",
                           **estimator_options: float | bool) -> tuple[torch.Tensor, torch.Tensor]:
    """``advantages`` [R] and their ``loss_weights`` [N], in one kernel launch on a GPU (reinforce_pp_baseline: two).

    ``alpha`` serves vl_norm, which is an estimator or an aggregation but not both at once: the two weigh lengths twice.
    (At one eps, estimator vl_norm aggregated by dr_grpo equals estimator grpo aggregated by vl_norm.)
    """
    if estimator == "vl_norm":
        estimator_options["alpha"] = alpha
    own = _checked_estimator(rollouts, estimator, eps, estimator_options)
    options = _checked_aggregation(aggregation, max_length, alpha)
    if estimator == aggregation == "vl_norm":
        raise ValueError("aggregation must not be 'vl_norm' with estimator 'vl_norm': lengths would be weighted twice; "
                         "use aggregation 'dr_grpo'")
    if backends.resolve(backend, rollouts.device) == "triton":
        result, weights = torch.empty_like(rollouts.rewards), rollouts.rewards.new_empty(rollouts.n_tokens)
        _launch(rollouts, estimator, aggregation, result, weights, **{**options, **own})
        return result, weights
    exact = torch_advantages(rollouts, estimator, **own)
    return exact.float(), torch_loss_weights(rollouts, exact, aggregation, **options).float()


# -- arguments ---------------------------------------------------------------------------------------------------------


def _check_rollouts(rollouts: Rollouts) -> None:
    if not isinstance(rollouts, Rollouts):
        raise TypeError(f"rollouts must be a Rollouts, got {type(rollouts).__name__}: {check.describe(rollouts)}")


def check_advantages(advantages: torch.Tensor, n_responses: int | None = None,
                     device: torch.device | None = None) -> None:
    """[R] floating point, and finite on the CPU; an accelerator is not asked, that would synchronise."""
    check.tensor("advantages", advantages, shape=(n_responses,), dtypes=(*check.FLOAT_DTYPES, torch.float64),
                 device=device)
    if advantages.device.type == "cpu" and not advantages.isfinite().all():
        raise ValueError(f"advantages must be finite, got {check.describe(advantages)} with NaN or infinite entries")


def _checked_estimator(rollouts: Rollouts, estimator: str, eps: float | None, options: dict[str, float | bool]
                       ) -> EstimatorOptions:
    """The estimator's keyword arguments, checked and completed with their defaults."""
    _check_rollouts(rollouts)
    check.choice("estimator", estimator, ESTIMATORS)
    known = DEFAULT_OPTIONS.get(estimator, {})
    for name in options:
        if name not in known:
            accepted = ", ".join(known) or "none"
            raise TypeError(f"{name} is not an option of estimator {estimator!r}, which accepts: {accepted}")
    options = {**known, **options}
    checked: EstimatorOptions = {}
    if "f_norm" in options:
        checked["f_norm"] = check.positive("f_norm", options["f_norm"])
    if "alpha" in options:
        checked["alpha"] = _not_negative("alpha", options["alpha"])
    if "normalize_by_std" in options:
        checked["normalize_by_std"] = check.flag("normalize_by_std", options["normalize_by_std"])
    default = DEFAULT_EPS[estimator]
    if default is None and eps is not None:
        raise ValueError(f"eps must be None for estimator {estimator!r}, whose formula has none; got {eps!r}")
    if default is not None:
        checked["eps"] = default if eps is None else _not_negative("eps", eps)
    return checked


def _checked_aggregation(aggregation: str, max_length: float | None, alpha: float) -> AggregationOptions:
    """The aggregation's keyword arguments, checked."""
    check.choice("aggregation", aggregation, AGGREGATIONS)
    alpha = _not_negative("alpha", alpha)
    if max_length is not None:
        max_length = check.positive("max_length", max_length)
    elif aggregation in WITH_MAX_LENGTH:
        raise ValueError(f"max_length must be given for aggregation {aggregation!r}: its divisor is a constant of the "
                         "run (for example the longest completion allowed), not of the batch; got None")
    options: AggregationOptions = {}
    if max_length is not None and aggregation in WITH_MAX_LENGTH:
        options["max_length"] = max_length
    if aggregation == "vl_norm":
        options["alpha"] = alpha
    return options


def _not_negative(name: str, value: float) -> float:
    number = check.real(name, value)
    if number < 0:
        raise ValueError(f"{name} must be >= 0, got {number!r}")
    return number


# -- triton ------------------------------------------------------------------------------------------------------------


def _launch(rollouts: Rollouts, estimator: str, aggregation: str, advantages: torch.Tensor,
            weights: torch.Tensor | None, **options: object) -> None:
    """Write ``advantages`` [R] (read them for estimator "given") and ``weights`` [N] (unless aggregation is "none")."""
    from rlvr_fast.kernels.advantages import launch

    launch(rollouts.rewards, rollouts.prompt_index, rollouts.cu_seqlens, rollouts.n_prompts, advantages, weights,
           estimator=estimator, aggregation=aggregation, **options)

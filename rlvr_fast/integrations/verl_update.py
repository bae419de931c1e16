"""What verl's policy loss does to the update: sums that any averaging leaves intact, and the figures that follow.

A policy loss sees log-probs, advantages and the mask of one micro-batch, and verl averages whatever it reports over
micro-batches, ranks and mini-batches. An average of ratios is no ratio, so what is reported are numerators and
denominators (``SUMS``); all of them are averaged alike, and ``combine`` divides at the end.

The coefficient w_t = −∂loss/∂log p_t is what a loss makes of a token: the update is Σ_t w_t ∇log p_t, with clipping,
masks, importance weights and normalisation in it. Autograd takes it from the loss itself, so it is exact for every
loss; of the graph it walks only the part between loss and log-probs. Its scale cancels in every figure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from rlvr_fast.monitor.metrics import Metric, Sums

KEY = "rlvr/sum/"
SUMS = ("responses", "signal", "up", "tokens", "kl", "score", "ratio", "ratio_sq", "moved_up", "tokens_up",
        "moved_down", "tokens_down", "tokens_signal", "silent", "weight", "weight_down", "weight_sq", "power",
        "power_down")
LOG_RATIO_LIMIT = 20.0  # as in verl's losses: e^20 squared is finite in float32


def _ratio(numerator: str, denominator: str) -> Callable[[Sums], float | None]:
    return lambda s: s[numerator] / s[denominator] if s[denominator] > 0 else None


def _effective(total: str, squares: str) -> Callable[[Sums], float | None]:
    return lambda s: s[total] ** 2 / (s["responses"] * s[squares]) if s[squares] > 0 else None


UPDATE_METRICS: tuple[Metric, ...] = (
    Metric("rlvr/update/frac_signal", 0, "1", "share of responses with an advantage that is not 0; with binary rewards "
           "and a group's own baseline those of mixed prompts", "[derived]", _ratio("signal", "responses")),
    Metric("rlvr/update/frac_up", 0, "1", "share of those whose advantages sum to more than 0; with binary rewards the "
           "success rate within mixed prompts", "[derived]", _ratio("up", "signal")),
    Metric("rlvr/update/frac_silent", 1, "1", "share of tokens with an advantage whose coefficient in the loss is 0: "
           "clipped, rejected or weighed with 0", "autograd", _ratio("silent", "tokens_signal")),
    Metric("rlvr/update/down_share", 1, "1", "Σ_{w<0} |w| / Σ |w|: share of the coefficients that pushes log-probs "
           "down. On policy ½ where each group's advantages cancel token by token; more where incorrect responses are "
           "longer", "autograd", _ratio("weight_down", "weight")),
    Metric("rlvr/update/effective_share", 1, "1", "(Σ c)²/(R Σ c²) of c_i = Σ_t |w_it|: the share of responses that "
           "carries the update", "Kish", _effective("weight", "weight_sq")),
    Metric("rlvr/update/score_floor", 1, "1", "(1 − p_y)², mean over tokens: ‖∂log p_y/∂z‖² is at least this and at "
           "most twice it", "[derived]", _ratio("score", "tokens")),
    Metric("rlvr/update/power_down_share", 1, "1", "Σ_{w<0} w²(1 − p)² / Σ w²(1 − p)²: share of the update's power in "
           "the logits that pushes down, with (1 − p)² for the score norm, right to a factor of two per token",
           "[derived]", _ratio("power_down", "power")),
    Metric("rlvr/update/kl", 1, "nats", "mean over tokens of ρ − 1 − log ρ, ρ = p/p_old: how far the steps since "
           "old_log_probs have gone, 0 at the first", "k3 estimator", _ratio("kl", "tokens")),
    Metric("rlvr/update/ess", 1, "1", "effective share (Σρ)²/(R Σρ²) of the responses, ρ = Π_t ρ_t", "Kish",
           _effective("ratio", "ratio_sq")),
    Metric("rlvr/update/moved_up", 1, "nats", "mean of log p − log p_old over tokens with A > 0. In sample: these very "
           "responses made the steps. Below 0 the steps lower what they are to raise", "[derived]",
           _ratio("moved_up", "tokens_up")),
    Metric("rlvr/update/moved_down", 1, "nats", "the same over tokens with A < 0", "[derived]",
           _ratio("moved_down", "tokens_down")),
)


@torch.no_grad()
def update_sums(loss: torch.Tensor, old_log_prob: torch.Tensor, log_prob: torch.Tensor, advantages: torch.Tensor,
                response_mask: torch.Tensor) -> dict[str, float]:
    """``SUMS`` of one micro-batch, under the keys that they have in verl's logs. One synchronisation; nothing changes.

    Args:
        loss: what the policy loss made of the rest. Its graph is kept. One without a graph has no coefficients: what is
            made of them is 0.
        old_log_prob, log_prob, advantages: [B, T] float.
        response_mask: [B, T] bool or 0/1; what the others hold elsewhere does not matter.
    """
    mask = response_mask.bool()
    move, logp, advantage = (torch.where(mask, x.float(), 0.0)
                             for x in (log_prob - old_log_prob, log_prob, advantages))
    move = move.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    up, down, signal = advantage > 0, advantage < 0, advantage != 0
    ratio = move.sum(1).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp() * mask.any(1)
    score = torch.expm1(logp).square()  # 0 outside the mask, where logp is
    weight, seen = torch.zeros_like(logp), torch.zeros_like(signal)
    if loss.requires_grad and log_prob.requires_grad:
        gradient = torch.autograd.grad(loss, log_prob, retain_graph=True, allow_unused=True)[0]
        weight = weight if gradient is None else torch.where(mask, -gradient.float(), 0.0)
        seen = signal
    size, lowers = weight.abs(), weight < 0
    power = size.square() * score
    found = {
        "responses": mask.any(1), "signal": signal.any(1), "up": advantage.sum(1) > 0,
        "tokens": mask, "kl": torch.expm1(move) - move, "score": score, "ratio": ratio, "ratio_sq": ratio.square(),
        "moved_up": move * up, "tokens_up": up, "moved_down": move * down, "tokens_down": down,
        "tokens_signal": seen, "silent": seen & (weight == 0), "weight": size, "weight_down": size * lowers,
        "weight_sq": size.sum(1).square(), "power": power, "power_down": power * lowers,
    }
    totals = torch.stack([found[name].sum(dtype=torch.float32) for name in SUMS]).tolist()
    return {KEY + name: total for name, total in zip(SUMS, totals, strict=True)}


def combine(metrics: Mapping[str, float]) -> dict[str, float]:
    """``UPDATE_METRICS`` out of averaged sums.

    The plug-in does this to verl's own logs; this is for the logs of a driver of one's own.

    Args:
        metrics: with the keys "rlvr/sum/...", behind any prefix ("actor/", as verl names them), averaged in any way
            that weighs all of them alike. Other keys are not looked at.

    Returns:
        Flat floats; a figure whose denominator is 0, or that is not finite, is absent. {} where there are no sums.

    Raises:
        ValueError: if only some of the sums are there.
    """
    sums = {key.partition(KEY)[2]: float(value) for key, value in metrics.items() if KEY in key}
    if not sums:
        return {}
    if missing := [name for name in SUMS if name not in sums]:
        raise ValueError(f"metrics must hold all of {KEY}..., got {len(sums)} of them without {', '.join(missing)}")
    values = {metric.key: metric.value(sums) for metric in UPDATE_METRICS}
    return {key: value for key, value in values.items() if value is not None and math.isfinite(value)}

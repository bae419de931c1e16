"""The head pass over a whole vocabulary out of the passes over its shards [derived].

With P_w the probability of shard w, H_w its entropy, p^w its conditional probabilities, f = dz/draw and y the sampled
token, in shard *:

    log P_w = -log1p(Σ_{u≠w} exp(lse_u - lse_w))            log p_y = log P_* + log p^*_y
    1 - p_y = Σ_w P_w off_w   (off_w = 1 where y is not)    Σ p² = Σ_w P_w² Σ_v (p^w_v)²
    H = Σ_w P_w (H_w - log P_w)
    ‖∂ log p_y / ∂ raw‖² = Σ_w P_w² ‖·‖²_w + f_y² R (R + 2 P_* off_*),  R = Σ_{w≠*} P_w

The last term is f_y² ((1 - p_y)² - (P_* off_*)²), what the other shards add to the sampled token's own entry.
Everything is a sum of terms of one sign, so a token of probability 1 - 1e-30 keeps its digits wherever the rest of the
mass lies. A shard's lse is a float32: probabilities carry its rounding, 2^-24 |lse| relatively.
"""

from __future__ import annotations

import torch

from rlvr_fast.backends.base import TokenPass


def merge_passes(planes: torch.Tensor, temperature: float, softcap: float | None) -> tuple[TokenPass, torch.Tensor]:
    """The pass over the whole vocabulary from those over its W shards.

    Args:
        planes: [W, 6, N] float32, the columns of each shard's TokenPass; logp is -inf where the sampled token is in
            another shard.

    Returns:
        (TokenPass, [W, N] float32 probability of each shard).
    """
    logp, lse, entropy, sum_p_sq, score_sq, off_mass = planes.double().unbind(1)
    n_shards = len(lse)
    others = torch.stack([torch.cat([lse[:w], lse[w + 1:]]).logsumexp(0) for w in range(n_shards)])
    log_mass = -torch.logaddexp(torch.zeros_like(lse), others - lse)
    mass = log_mass.exp()

    def total(values: torch.Tensor | float, weights: torch.Tensor = mass) -> torch.Tensor:
        # a shard whose rows are all masked may hold anything
        return torch.where(weights > 0, weights * values, 0.0).sum(0)

    present = logp > -torch.inf
    elsewhere = total(1.0, torch.where(present, 0.0, mass))
    own_off_mass = total(off_mass, torch.where(present, mass, 0.0))
    slope = _slope((lse + logp).amax(0), temperature, softcap)
    whole = TokenPass(
        logp=(log_mass + logp).amax(0), lse=lse.logsumexp(0), entropy=total(entropy - log_mass),
        sum_p_sq=total(sum_p_sq, mass * mass),
        score_sq=total(score_sq, mass * mass) + slope * slope * elsewhere * (elsewhere + 2.0 * own_off_mass),
        off_mass=elsewhere + own_off_mass)
    return TokenPass(*(column.float() for column in whole)), mass.float()


def _slope(z: torch.Tensor, temperature: float, softcap: float | None) -> torch.Tensor:
    """dz/draw at the logit z = cap tanh(raw / cap) / T."""
    if softcap is None:
        return torch.full_like(z, 1.0 / temperature)
    tanh = (z * (temperature / softcap)).clamp(-1.0, 1.0)
    return (1.0 - tanh) * (1.0 + tanh) / temperature

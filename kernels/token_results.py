"""The per-token results out of sums over everything but the sampled token, and its logit.

With M the largest held-out logit, S = Σ_{v≠y} e^(z_v - M) and L = z_y - M - log S the sampled token's log-odds:
    logp = min(L, 0) - log1p(e^-|L|),   off_mass = 1 / (1 + e^L),   p_v = e^(z_v - M) · off_mass / S  for v ≠ y,
    entropy = -p_y logp + off_mass · [(lse - M) - Σ e·x / S]: every term is >= 0, so nothing cancels.
A token whose own logit is -inf has logp -inf; a row with every logit at -inf has no distribution and gives NaN. A
sampled token that is not in this shard of the vocabulary (id -1) has logp -inf and no share in the score; a shard with
every logit at -inf then has lse -inf and no mass.
"""

import triton
import triton.language as tl

from rlvr_fast.kernels.logit_tile import LN_2


@triton.jit
def log1p_unit(x):
    """log(1 + x) for x in [0, 1], to fp32 rounding: 2 atanh(s) with s = x / (2 + x) <= 1/3, by its series."""
    s = x / (2.0 + x)
    t = s * s
    series = 0.0769230769 + t * (0.0666666667 + t * 0.0588235294)
    series = 0.142857143 + t * (0.111111111 + t * (0.0909090909 + t * series))
    return 2.0 * s * (1.0 + t * (0.333333333 + t * (0.2 + t * series)))


@triton.jit
def token_results(z, maximum, mass, square, first, slope_square, target_slope, here, inverse_temperature):
    """(logp, lse, entropy, sum_p_sq, score_sq, off_mass, derivative by the target's raw logit, off_mass / (S·T)).

    ``z`` is the target's logit in base 2, -inf unless it is ``here``; with x = z_v - maximum and e = 2^x over the
    held-out entries, ``mass`` = Σe, ``square`` = Σe², ``first`` = Σe·x, ``slope_square`` = Σ(e·f)².
    """
    # Without another token in the vocabulary there is no maximum; off_mass, its weight, is 0 then.
    has_others = mass != 0.0
    mass = tl.where(has_others, mass, 1.0)
    log_mass = tl.where(has_others, tl.log2(mass), float("-inf"))
    log_odds = tl.where(here, z - maximum - log_mass, float("-inf"))
    smaller = tl.exp2(-tl.abs(log_odds))
    tail = log1p_unit(smaller)
    likely = log_odds >= 0
    off_mass = tl.where(likely, smaller, 1.0) / (1.0 + smaller)
    p = tl.where(likely, 1.0, smaller) / (1.0 + smaller)
    logp = tl.minimum(log_odds, 0.0) * LN_2 - tail
    off_per_mass = off_mass / mass
    lse = tl.maximum(z, maximum + log_mass) * LN_2 + tail
    above_maximum = tl.where(has_others, tl.maximum(z - maximum, log_mass) * LN_2 + tail, 0.0)
    entropy = off_mass * (above_maximum - first / mass * LN_2) - tl.where(p == 0.0, 0.0, p * logp)
    target_draw = tl.where(here, off_mass * target_slope * inverse_temperature, 0.0)
    others = off_per_mass * inverse_temperature
    return (logp, lse, entropy, p * p + square * off_per_mass * off_per_mass,
            target_draw * target_draw + slope_square * others * others, off_mass, target_draw, others)

"""Certified step sizes: below them the success rate provably does not fall. Far below what is measured in practice.

These are worst-case bounds. On 3,718 random softmax bandits the step that truly breaks even was at least 138 times, in
the median 1,550 times, the bound of Theorem 1 [derived]. Read them as scaling laws (in the alignment, the length, the
failure rate) and as a floor; the threshold that ``measure_step`` and ``scan_step`` report is measured, not certified,
and is not the theorem's.

Both bound the length η of a step η·w with ‖w‖ ≤ 1. For an update Δ, w = Δ/‖Δ‖: its alignment is the one that
``measure_step`` reports divided by ‖Δ‖, and the bound divided by ‖Δ‖ is in multiples of Δ.
"""

from __future__ import annotations

from typing import overload

import torch

from rlvr_fast import _validate as check

Real = float | torch.Tensor


@overload
def theorem_step_bound(alignment: float, score_norm: float, score_lipschitz: float, *, tight: bool = ...) -> float: ...
@overload
def theorem_step_bound(alignment: torch.Tensor, score_norm: Real, score_lipschitz: Real, *, tight: bool = ...
                       ) -> torch.Tensor: ...
@overload
def theorem_step_bound(alignment: Real, score_norm: Real, score_lipschitz: Real, *, tight: bool = ...) -> Real: ...
def theorem_step_bound(alignment: Real, score_norm: Real, score_lipschitz: Real, *, tight: bool = False) -> Real:
    """Theorem 1: η ≤ [Δμ]₊ / (2(L_o + 8 G_o²)). [paper A, quoted second-hand]

    Steps that all respect it raise the success rate as J(K) ≥ J₀/(J₀ + (1 − J₀)e^{−M/2}) with M = Σ η_k [Δμ_k]₊.
    The guarantee is as good as its constants, which hold for every response and every θ on the way.

    Args:
        alignment: Δμ = ⟨w, g⁺ − g⁻⟩ for ‖w‖ ≤ 1; any sign, the bound is 0 where it is not positive.
        score_norm: G_o ≥ ‖∇ log π(o)‖, positive.
        score_lipschitz: L_o ≥ ‖∇² log π(o)‖, not negative.
        tight: use L_o + G_o²/2 in place of L_o + 8 G_o², for which the same guarantee holds [derived].

    Returns:
        A float if all arguments are numbers, else a float64 tensor of their broadcast shape.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    (gain, norm, lipschitz), numbers = _operands(
        alignment=(alignment, "real"), score_norm=(score_norm, "positive"),
        score_lipschitz=(score_lipschitz, "non-negative"))
    factor = 0.5 if tight else 8.0
    bound = gain.clamp(min=0) / (2 * (lipschitz + factor * norm * norm))
    return bound.item() if numbers else bound


@overload
def token_step_bound(alignment: float, success_rate: float, length: float, token_norm: float, token_lipschitz: float, *,
                     refined: bool = ...) -> float: ...
@overload
def token_step_bound(alignment: torch.Tensor, success_rate: Real, length: Real, token_norm: Real, token_lipschitz: Real,
                     *, refined: bool = ...) -> torch.Tensor: ...
@overload
def token_step_bound(alignment: Real, success_rate: Real, length: Real, token_norm: Real, token_lipschitz: Real, *,
                     refined: bool = ...) -> Real: ...
def token_step_bound(alignment: Real, success_rate: Real, length: Real, token_norm: Real, token_lipschitz: Real, *,
                     refined: bool = False) -> Real:
    """Per-token form: η ≲ (1 − J)[Δμ]₊ / (T(G_p² + L_p)). [derived]

    It has the scaling of the paper's Theorem 3 (shrinking with the length T and with 1 − J), whose own constants were
    not at hand: do not quote the value as that theorem's. To leading order in η, hence ≲.

    Args:
        alignment: Δμ for ‖w‖ ≤ 1, any sign; the bound is 0 where it is not positive.
        success_rate: J in [0, 1]; the bound is 0 at J = 1.
        length: T, tokens per response, positive.
        token_norm: G_p ≥ ‖∇ log π(o_t | prefix)‖, positive.
        token_lipschitz: L_p ≥ ‖∇² log π(o_t | prefix)‖, not negative.
        refined: [Δμ]₊ / (T(2 L_p + 4 G_p²(log 1/(1 − J) + 0.35))), for bounded length (Azuma) [derived]; larger near
            J = 1.

    Returns:
        A float if all arguments are numbers, else a float64 tensor of their broadcast shape.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    (gain, rate, tokens, norm, lipschitz), numbers = _operands(
        alignment=(alignment, "real"), success_rate=(success_rate, "in [0, 1]"), length=(length, "positive"),
        token_norm=(token_norm, "positive"), token_lipschitz=(token_lipschitz, "non-negative"))
    gain = gain.clamp(min=0)
    if refined:
        surprise = -torch.log1p(-rate)
        bound = gain / (tokens * (2 * lipschitz + 4 * norm * norm * (surprise + 0.35)))
    else:
        bound = (1 - rate) * gain / (tokens * (norm * norm + lipschitz))
    return bound.item() if numbers else bound


_CONDITIONS = {
    "real": torch.isfinite,
    "positive": lambda x: x > 0,
    "non-negative": lambda x: x >= 0,
    "in [0, 1]": lambda x: (x >= 0) & (x <= 1),
}


def _operands(**arguments: tuple[Real, str]) -> tuple[list[torch.Tensor], bool]:
    """The arguments as float64 tensors on one device, and whether all were numbers. Device values are not looked at."""
    tensors = {name: value for name, (value, _) in arguments.items() if isinstance(value, torch.Tensor)}
    device = next((value.device for value in tensors.values() if value.ndim), None)
    operands = []
    for name, (value, condition) in arguments.items():
        if isinstance(value, torch.Tensor):
            if value.is_complex() or value.dtype == torch.bool:
                raise TypeError(f"{name} must hold real numbers, got {check.describe(value)}")
            if device is not None and value.device != device and (value.ndim or value.device.type != "cpu"):
                raise ValueError(f"{name} must be on {device} like the other tensors, got {check.describe(value)}")
            operand = value.detach().double()
        else:
            operand = torch.tensor(check.real(name, value), dtype=torch.float64)
        if operand.device.type == "cpu" and not (operand.isfinite() & _CONDITIONS[condition](operand)).all():
            raise ValueError(f"{name} must be finite and {condition}, got {check.describe(value)}")
        operands.append(operand)
    shapes = {name: list(value.shape) for name, value in tensors.items()}
    try:
        torch.broadcast_shapes(*shapes.values())
    except RuntimeError:
        raise ValueError(f"the arguments must broadcast to one shape, got {shapes}") from None
    return operands, not tensors

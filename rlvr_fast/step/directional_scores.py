"""First and second derivative of every response's log-probability along an update, from two forward passes.

ℓ_± = log π_{θ ± wΔ}(o) − log π_θ(o) give s = (ℓ₊ − ℓ₋)/2w and h = (ℓ₊ + ℓ₋)/w². [derived] At w = 1 the two passes are
at θ + Δ and θ − Δ. When θ is where the update Δ has led, θ − Δ is where it came from, so that ℓ₋ is moreover the exact
log-ratio against the previous policy, and E[e^ℓ₋ …] the exact gain of the step whatever its length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from rlvr_fast import _validate as check
from rlvr_fast.rollouts import Rollouts
from rlvr_fast.step.line import StepLine
from rlvr_fast.step.statistics import LOGP_DTYPES, log_ratios


@dataclass(frozen=True, eq=False, repr=False)
class DirectionalScores:
    """What R responses say about moving along an update Δ. Each tensor [R] float64, or None where it is not known.

    Attributes:
        slope: s = ⟨Δ, ∇log π(o)⟩.
        curvature: h = Δᵀ∇²log π(o)Δ.
        behind: log π_{θ−Δ}(o) − log π_θ(o), the log-ratio against the policy before the update Δ.
        token_slope, token_curvature: 0-dim, the largest |s_t| and |h_t| of a single token; for the bounds.
    """

    slope: torch.Tensor | None = None
    curvature: torch.Tensor | None = None
    behind: torch.Tensor | None = None
    token_slope: torch.Tensor | None = None
    token_curvature: torch.Tensor | None = None

    def __post_init__(self) -> None:
        known = {name: value for name, value in vars(self).items() if value is not None}
        rows = [name for name in ("slope", "curvature", "behind") if name in known]
        if not rows:
            raise ValueError("slope, curvature or behind must be given, got none of them")
        length = check.tensor(rows[0], known[rows[0]], ndim=1).shape[0]
        for name, value in known.items():
            check.tensor(name, value, shape=(length,) if name in rows else (), dtypes=LOGP_DTYPES,
                         device=known[rows[0]].device)
            if value.device.type == "cpu" and not value.isfinite().all():
                raise ValueError(f"{name} must be finite, got {check.describe(value)} with NaN or infinite entries")
            object.__setattr__(self, name, value.detach().double())

    @classmethod
    def from_log_ratios(cls, ahead: torch.Tensor, behind: torch.Tensor, *, width: float = 1.0) -> DirectionalScores:
        """From the responses' log-ratios at θ + width·Δ and θ − width·Δ against θ, each [R]."""
        width = check.positive("width", width)
        check.tensor("ahead", ahead, ndim=1, dtypes=LOGP_DTYPES)
        check.tensor("behind", behind, shape=tuple(ahead.shape), dtypes=LOGP_DTYPES, device=ahead.device)
        ahead, behind = ahead.detach().double(), behind.detach().double()
        return cls((ahead - behind) / (2 * width), (ahead + behind) / width ** 2, behind if width == 1 else None)

    def __repr__(self) -> str:
        parts = [f"{name}={float(value.square().mean().sqrt()):.3g} rms" for name in ("slope", "curvature", "behind")
                 if (value := getattr(self, name)) is not None]
        size = next(value.numel() for value in (self.slope, self.curvature, self.behind) if value is not None)
        return f"DirectionalScores({size} responses, {', '.join(parts)})"


@torch.no_grad()
def directional_scores(logp_fn: Callable[[], torch.Tensor], parameters: Iterable[torch.Tensor],
                       update: Sequence[torch.Tensor] | Mapping[torch.Tensor, torch.Tensor], rollouts: Rollouts, *,
                       width: float = 1.0, logp: torch.Tensor | None = None) -> DirectionalScores:
    """s, h and the log-ratio against θ − Δ of every response, by central differences in place.

    Two forward passes, three without ``logp``. The parameters are overwritten while ``logp_fn`` runs and restored bit
    for bit, whatever it raises; that takes one copy of them. Nothing synchronises on device tensors.

    The differences' errors are w²s‴/6 and w²h″/12: the length of the step itself, w = 1, is right for updates as short
    as one trains with. A shorter width does not help where the weights round it away: an update that is 1e-5 of a
    weight is 1 % exact in float32 at w = 0.01, and gone in bfloat16 at any. Directional derivatives need the weights
    that the optimizer updates, in the dtype in which it does.

    Args:
        logp_fn: returns the log-probs of the rollouts' tokens under the current parameters, [N] or the rollouts'
            layout; deterministic.
        parameters, update: θ and Δ as for ``scan_step``.
        rollouts: the responses; of the policy θ if their scores are to be averaged.
        width: w. Other than 1, ``behind`` is not known.
        logp: log-probs at θ, from the same computation; by default ``logp_fn`` is called for them.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected; whatever ``logp_fn`` raises.
    """
    if not callable(logp_fn):
        raise TypeError(f"logp_fn must be callable, got {check.describe(logp_fn)}")
    width, line = check.positive("width", width), StepLine(parameters, update)
    if logp is None:
        logp = check.tensor("logp_fn()", logp_fn()).clone()  # logp_fn may return one buffer every time
    log_ratios(logp, logp, None, rollouts, "torch")  # refuses bad arguments before any parameter moves
    with line:
        ahead = check.tensor("logp_fn()", line.at(width, logp_fn)).clone()
        behind = check.tensor("logp_fn()", line.at(-width, logp_fn))
    sums = log_ratios(logp, ahead, behind, rollouts, "auto")
    scores = DirectionalScores.from_log_ratios(sums[:, 0], sums[:, 1], width=width)
    forward, backward = (rollouts.pack(x).double() - rollouts.pack(logp).double() for x in (ahead, behind))
    largest = [x.abs().amax() if x.numel() else x.new_zeros(()) for x in (
        (forward - backward) / (2 * width), (forward + backward) / width ** 2)]
    return DirectionalScores(scores.slope, scores.curvature, scores.behind, *largest)


"""Try an update at several lengths on rollouts already sampled, and read off where it stops helping.

At every multiple m the policy θ + mΔ is scored by one forward pass: the log-odds gain log mean⁺ρ − log mean⁻ρ is exact
for any step [derived], so unlike the quadratic model it needs no derivatives and has no bias from the step's length.
What limits it is reach: the ratios of a long step rest on few responses, and beyond break-even usually on almost none.
The curve errs on the long, unsafe side there, so the verdict refuses to speak when the effective sample is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import pairwise

import torch

from rlvr_fast import _validate as check
from rlvr_fast.rollouts import Rollouts
from rlvr_fast.step.curve import StepCurve, crossing
from rlvr_fast.step.line import StepLine
from rlvr_fast.step.measure import CLASS_FLOOR, EFFECTIVE_SHARE, measure_step

__all__ = ["StepCurve", "crossing", "scan_step"]


@torch.no_grad()
def scan_step(logp_fn: Callable[[], torch.Tensor], parameters: Iterable[torch.Tensor],
              update: Sequence[torch.Tensor] | Mapping[torch.Tensor, torch.Tensor],
              rollouts: Rollouts, *, multiples: Sequence[float] = (0.5, 1, 2, 4),
              logp_before: torch.Tensor | None = None, in_sample: bool | None = None, z: float = 2.0,
              margin: float = 2.0, ess_floor: float = EFFECTIVE_SHARE, class_floor: float = CLASS_FLOOR,
              backend: str = "auto") -> StepCurve:
    """Score θ + mΔ for several multiples m of an update, on the same rollouts.

    The parameters are overwritten in place while ``logp_fn`` runs and are always restored bit for bit, whatever it
    raises. That takes one copy of them: θ + mΔ − mΔ is not θ in floating point. Autograd sees the writes, so a graph
    recorded before the scan can no longer be run backward.

    Args:
        logp_fn: returns the log-probs of the rollouts' tokens under the current parameters, [N] or the rollouts'
            layout. It must be deterministic: no dropout, no new rollouts. Called without gradients, once per multiple.
        parameters: the distinct floating-point tensors to move.
        update: Δ, one tensor of the same shape for each parameter, on its device; or a dict {parameter: Δ} that has
            all of them, as ``propose`` returns it.
        rollouts: sampled from the policy at multiple 0, better not those that built the update.
        multiples: positive, strictly increasing.
        logp_before: log-probs at multiple 0; by default ``logp_fn`` is called for them. If given, they must come from
            the same computation, not from another engine.
        in_sample: True if these rollouts built the update.
        z: standard errors that make a gain or a loss significant for the verdict.
        margin: a "safe" step still gains at this multiple; at least 1.
        ess_floor: effective share of the responses below which a multiple counts as unknown, in [0, 1].
        class_floor: effective responses in the scarcer class, summed over prompts, below which it does; 0 or more. 30
            took almost all wrong verdicts away, more than that no more of them (docs/simulate, coverage).
        backend: as for ``measure_step``.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected; whatever ``logp_fn`` raises.
    """
    if not callable(logp_fn):
        raise TypeError(f"logp_fn must be callable, got {check.describe(logp_fn)}")
    multiples = _multiples(multiples)
    line = StepLine(parameters, update)
    z, margin, ess_floor = check.positive("z", z), check.real("margin", margin), check.real("ess_floor", ess_floor)
    class_floor = check.real("class_floor", class_floor)
    if margin < 1:
        raise ValueError(f"margin must be at least 1, got {margin:g}")
    if not 0 <= ess_floor <= 1:
        raise ValueError(f"ess_floor must be in [0, 1], got {ess_floor:g}")
    if class_floor < 0:
        raise ValueError(f"class_floor must be at least 0, got {class_floor:g}")
    measured = partial(measure_step, in_sample=in_sample, backend=backend)
    if logp_before is None:
        logp_before = check.tensor("logp_fn()", logp_fn()).clone()  # logp_fn may return one buffer every time
    measured(logp_before, logp_before, rollouts)  # refuses bad arguments before any parameter moves

    with line:
        logps = (check.tensor("logp_fn()", line.at(multiple, logp_fn)) for multiple in multiples)
        measures = tuple(measured(logp_before, logp, rollouts) for logp in logps)
    return StepCurve(multiples, measures, z, margin, ess_floor, class_floor)


def _multiples(multiples: Sequence[float]) -> tuple[float, ...]:
    if isinstance(multiples, str | bytes) or not isinstance(multiples, Iterable):
        raise TypeError(f"multiples must be a sequence of numbers, got {check.describe(multiples)}")
    checked = tuple(check.positive("multiples", multiple) for multiple in multiples)
    if not checked or any(later <= earlier for earlier, later in pairwise(checked)):
        raise ValueError(f"multiples must be strictly increasing and not empty, got {check.describe(checked)}")
    return checked

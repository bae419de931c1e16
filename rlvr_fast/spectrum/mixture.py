"""What to sample next: a mixture over the bins of a spectrum, from the signal that was measured in them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rlvr_fast import _validate as check

if TYPE_CHECKING:
    from rlvr_fast.spectrum.difficulty_spectrum import DifficultySpectrum

ALLOCATIONS = ("shared", "own", "noise", "success")


@dataclass(frozen=True, eq=False, repr=False)
class Mixture:
    """Probabilities of B bins.

    Attributes:
        labels: the B bins. probability: [B] float64, sum 1.
        importance: [B] float64 base/probability: factors of the loss that keep its expectation that of the base.
        base: [B] float64, the mixture that was departed from.
    """

    labels: tuple[Hashable, ...]
    probability: torch.Tensor
    base: torch.Tensor

    @property
    def importance(self) -> torch.Tensor:
        return self.base / self.probability

    def as_dict(self) -> dict[Hashable, float]:
        return dict(zip(self.labels, self.probability.tolist(), strict=True))

    def __repr__(self) -> str:
        shares = ", ".join(f"{label}: {share:.1%}" for label, share in self.as_dict().items())
        return f"Mixture({shares})"


def shrunk(signal: torch.Tensor, stderr: torch.Tensor) -> torch.Tensor:
    """Signal with its uncertain part taken off: s (1 − stderr²/s²), 0 below one standard error and where unknown.

    The linear shrinkage towards 0 with the least squared error is S²/(S² + stderr²) for a true S; s² − stderr²
    estimates S² without bias [derived].
    """
    factor = 1 - (stderr / signal).square()
    return torch.where((signal > 0) & (factor > 0), signal * factor, 0.0)  # NaN is neither


def allocate(score: torch.Tensor, cost: torch.Tensor, base: torch.Tensor, floor: float) -> torch.Tensor:
    """π ∝ q √(s/c), and a share ``floor`` of the base q, all [B].

    Neyman's allocation: π minimises Σ q² s/π at a given cost Σ π c per draw, and makes q² s/(c π²) equal everywhere.
    With s the squared norm of a bin's gradient this is importance sampling by gradient norm.
    """
    weight = base * (score / cost).sqrt()
    if float(weight.sum()) <= 0:
        return base
    return (1 - floor) * weight / weight.sum() + floor * base


def mixture(spectrum: DifficultySpectrum, *, allocation: str | None, base: Mapping[Any, float] | None, floor: float
            ) -> Mixture:
    """What ``DifficultySpectrum.mixture`` returns."""
    bins = spectrum.bins
    with_vectors = spectrum.has_vectors
    allocation = check.choice("allocation", ("shared" if with_vectors else "own") if allocation is None else allocation,
                              ALLOCATIONS)
    if allocation == "shared" and not with_vectors:
        raise ValueError("allocation 'shared' needs gap vectors, which this gap has none of; use 'own'")
    if not 0 <= check.real("floor", floor) <= 1:
        raise ValueError(f"floor must be in [0, 1], got {floor!r}")
    labels, share = _base(spectrum.labels, base)
    if allocation == "noise":
        score = bins.second_moment.nan_to_num(0.0)
    elif allocation == "success":
        score = (bins.success_rate * (1 - bins.success_rate)).square()
    elif allocation == "own":
        score = shrunk(bins.signal, bins.signal_stderr)
    else:
        score = shrunk(bins.shared_signal, bins.shared_signal_stderr)
    cost = torch.ones_like(score) if bins.cost.isnan().any() else bins.cost.clamp(min=1e-12)
    place = torch.tensor([labels.index(label) for label in spectrum.labels], dtype=torch.int64)
    everywhere, price = torch.zeros_like(share), torch.ones_like(share)
    everywhere[place], price[place] = score, cost
    return Mixture(labels, allocate(everywhere, price, share, floor), share)


def _base(measured: tuple[Hashable, ...], base: Mapping[Any, float] | None
          ) -> tuple[tuple[Hashable, ...], torch.Tensor]:
    """(labels, base shares that sum to 1)."""
    if base is None:
        if not measured:
            raise ValueError("base must name the bins of a spectrum without prompts, got None")
        return measured, torch.full((len(measured),), 1 / len(measured), dtype=torch.float64)
    if not isinstance(base, Mapping):
        raise TypeError(f"base must be a mapping from bin to share, got {check.describe(base)}")
    missing = [label for label in measured if label not in base]
    if missing:
        raise ValueError(f"base must have a share for every bin of the spectrum, got none for {missing[0]!r}")
    for label, share in base.items():
        if check.real(f"base[{label!r}]", share) < 0:
            raise ValueError(f"base must be at least 0 everywhere, got {share!r} for {label!r}")
    total = sum(base.values())
    if total <= 0:
        raise ValueError(f"base must have a share above 0, got {check.describe(dict(base))}")
    return tuple(base), torch.tensor([share / total for share in base.values()], dtype=torch.float64)

"""How evenly a spectrum rises in difficulty, and where it does not."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from rlvr_fast.spectrum.evidence import EDGE, BinEvidence


@dataclass(frozen=True)
class Smoothness:
    """What a relay from easy to hard depends on [paper B]: each bin should be in reach from the one before it.

    Attributes:
        difficulty_ratio: R, the largest ratio of the difficulties of neighbouring bins of which the easier is visible;
            NaN for labels and for difficulties that are not positive.
        success_ratio: the largest ratio of their success rates, easier over harder; infinite where the harder has none.
        holes: (easier, harder) neighbours where the relay has nothing to hand over to: the success interval of the
            easier lies above ``visible``, that of the harder below.
        frontier: the hardest bin at the edge of competence; None if no bin is.
    """

    difficulty_ratio: float
    success_ratio: float
    holes: tuple[tuple[Hashable, Hashable], ...]
    frontier: Hashable | None

    def __repr__(self) -> str:
        holes = ", ".join(f"{easier} | {harder}" for easier, harder in self.holes) or "none"
        return (f"Smoothness(R={self.difficulty_ratio:.3g}, success ratio={self.success_ratio:.3g}, holes: {holes}, "
                f"frontier: {self.frontier})")


def smoothness(labels: Sequence[Hashable], centres: Sequence[float], bins: BinEvidence, visible: float) -> Smoothness:
    """Of bins in order of difficulty, the easiest first."""
    rate, low, high = bins.success_rate.tolist(), bins.low.tolist(), bins.high.tolist()
    difficulty_ratio = success_ratio = math.nan
    holes = []
    for easier, harder in pairwise(range(len(labels))):
        if rate[easier] < visible:
            continue
        if centres[easier] > 0:  # NaN is not
            difficulty_ratio = _larger(difficulty_ratio, centres[harder] / centres[easier])
        success_ratio = _larger(success_ratio, rate[easier] / rate[harder] if rate[harder] else math.inf)
        if low[easier] >= visible > high[harder]:
            holes.append((labels[easier], labels[harder]))
    edge = [label for label, verdict in zip(labels, bins.verdict, strict=True) if verdict == EDGE]
    return Smoothness(difficulty_ratio, success_ratio, tuple(holes), edge[-1] if edge else None)


def _larger(known: float, value: float) -> float:
    return value if math.isnan(known) else max(known, value)

"""Which prompts a common step serves at each other's cost."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch


class Conflict(NamedTuple):
    """Two prompts: a step along the gap of one changes the log-odds of the other by ``product``, to first order."""

    prompt: object
    other: object
    product: float
    cosine: float


@dataclass(frozen=True, eq=False, repr=False)
class Interference:
    """Inner products and cosines between the gaps of P prompts.

    Attributes:
        products: [P, P] float64 unbiased ⟨gap_p, gap_q⟩, NaN where not defined; the diagonal is the unbiased ‖gap_p‖².
        significant: [P] bool, prompts whose gap norm stands out of its noise.
        prompt_ids: the P prompt ids.
    """

    products: torch.Tensor
    significant: torch.Tensor
    prompt_ids: tuple[Hashable, ...]

    @cached_property
    def cosine(self) -> torch.Tensor:
        """[P, P] float64 ⟨gap_p, gap_q⟩ / (‖gap_p‖ ‖gap_q‖), NaN unless both are ``significant`` [derived].

        The unbiased norms make it consistent, where plug-in norms pull it towards 0. Noise may take it beyond ±1.
        """
        norm = torch.where(self.significant, self.products.diagonal(), torch.nan).sqrt()
        return self.products / (norm[:, None] * norm)

    @cached_property
    def _pairs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """First prompt, second prompt and cosine of the pairs that have one, the most opposed first."""
        n = len(self.products)
        first, second = torch.triu_indices(n, n, offset=1, device=self.products.device)
        cosines, order = self.cosine[first, second].sort()  # NaN comes last
        order = order[:int(cosines.isfinite().sum())]
        return first[order], second[order], cosines[:len(order)]

    def worst(self, n: int = 5) -> tuple[Conflict, ...]:
        """The n pairs with the lowest cosine, of those below 0. Picked as extremes, they look worse than they are."""
        first, second, cosines = (x[:n].tolist() for x in self._pairs)
        return tuple(Conflict(self.prompt_ids[p], self.prompt_ids[q], float(self.products[p, q]), cosine)
                     for p, q, cosine in zip(first, second, cosines, strict=True) if cosine < 0)

    def summary(self) -> dict[str, float]:
        """Over the pairs with a cosine: their share of all pairs, the mean, the lowest, the share below 0."""
        cosines, n = self._pairs[2], len(self.prompt_ids)
        some = len(cosines) > 0
        return {"rlvr/model/conflict_frac_comparable": len(cosines) / max(n * (n - 1) // 2, 1),
                "rlvr/model/conflict_cosine_mean": float(cosines.mean()) if some else float("nan"),
                "rlvr/model/conflict_cosine_worst": float(cosines[0]) if some else float("nan"),
                "rlvr/model/conflict_frac": float((cosines < 0).double().mean()) if some else float("nan")}

    def __repr__(self) -> str:
        count, mean, _, share = self.summary().values()
        head = (f"Interference(prompts={len(self.prompt_ids)}, comparable pairs={count:.1%}, mean cosine={mean:.3g}, "
                f"opposed={share:.1%})")
        return "\n".join([head, *(f"  {c.prompt!s:.24} and {c.other!s:.24}: cosine {c.cosine:.3g}, product "
                                  f"{c.product:.3g}" for c in self.worst())])

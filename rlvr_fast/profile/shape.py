"""The scale that is profiled: a batch of rollouts and a head; halved along one axis, or scaled down to a budget."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace

from rlvr_fast.synthetic import whole

AXES = ("N", "V", "G")
AXIS_MEANING = {"N": "tokens, by longer responses", "V": "vocabulary",
                "G": "group size, at the same N and response length: half as many prompts"}
FEWEST_PROMPTS, SHORTEST_LENGTH, SMALLEST_V, SMALLEST_D = 2, 16, 64, 16


@dataclass(frozen=True)
class Shape:
    """``prompts`` x ``group_size`` responses of ``length`` tokens on average; an lm_head [V, D]."""

    prompts: int
    group_size: int
    length: int
    vocabulary_size: int
    hidden_size: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            whole(name, value)

    @property
    def n_responses(self) -> int:
        return self.prompts * self.group_size

    @property
    def n_tokens(self) -> int:
        return self.n_responses * self.length

    @property
    def product_flops(self) -> float:
        """2·N·V·D: one product of the hidden states with the lm_head."""
        return 2.0 * self.n_tokens * self.vocabulary_size * self.hidden_size

    def halved(self, axis: str) -> Shape | None:
        """Half of one axis, the others as they are; None where it is 1 or odd."""
        name, size = {"N": ("length", self.length), "V": ("vocabulary_size", self.vocabulary_size),
                      "G": ("group_size", self.group_size)}[axis]
        if size % 2:
            return None
        half = replace(self, **{name: size // 2})
        return replace(half, prompts=2 * half.prompts) if axis == "G" else half

    def fitted(self, product_flops: float) -> Shape:
        """At most about ``product_flops`` per product: fewer prompts first, then shorter responses, then V and D alike.

        The group size stays. Sizes stop at 2 prompts, 16 tokens, V = 64 and D = 16, or where they were below these.
        """
        shape = self
        for name, floor in (("prompts", FEWEST_PROMPTS), ("length", SHORTEST_LENGTH)):
            if shape.product_flops <= product_flops:
                return shape
            size = getattr(shape, name)
            wanted = int(size * product_flops / shape.product_flops)
            shape = replace(shape, **{name: min(size, max(_even(wanted), floor))})
        if shape.product_flops <= product_flops:
            return shape
        share = math.sqrt(product_flops / shape.product_flops)
        v, d = shape.vocabulary_size, shape.hidden_size
        return replace(shape, vocabulary_size=min(v, max(_even(int(v * share)), SMALLEST_V)),
                       hidden_size=min(d, max(int(d * share) // 8 * 8, SMALLEST_D)))

    def __str__(self) -> str:
        return (f"N = {self.n_tokens:,} tokens ({self.prompts} prompts x {self.group_size} responses x {self.length}), "
                f"V = {self.vocabulary_size:,}, D = {self.hidden_size:,}")


def _even(size: int) -> int:
    return size // 2 * 2

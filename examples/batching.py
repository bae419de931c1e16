"""Prompts for the steps of a run."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def batches(items: Sequence[Item], size: int, seed: int) -> Iterator[list[Item]]:
    """Endless batches of ``size`` distinct items; a new shuffle when too few are left."""
    if not 0 < size <= len(items):
        raise ValueError(f"size must be in 1..{len(items)}, the number of training prompts, got {size}")
    generator, pool = random.Random(seed), []
    while True:
        if len(pool) < size:
            pool = generator.sample(items, len(items))
        yield pool[:size]
        pool = pool[size:]

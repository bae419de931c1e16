"""The vocabulary of the GPU benchmarks: a suite is one question asked of several providers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Result = dict[str, torch.Tensor]
ABSOLUTE = ("logp", "entropy")  # in nats; every other error is relative to the largest entry


@dataclass(frozen=True)
class Provider:
    """One implementation.

    Attributes:
        name: as in the table.
        run: what is timed: input set -> tensors by name. Names that the suite's truth knows are checked.
        role: "ours", "peer" or "floor" (a bare product or copy, which answers nothing).
        missing: why it cannot run here, or None.
        lacks: what it computes less than the question asks, or "".
        work: operations or bytes of a floor, which are not the question's; else None.
    """

    name: str
    run: Callable[[Any], Result]
    role: str = "peer"
    missing: str | None = None
    lacks: str = ""
    work: float | None = None


@dataclass(frozen=True)
class Truth:
    """A sample in float64: ``value`` is what ``result[name][rows]`` should be."""

    rows: torch.Tensor
    value: torch.Tensor


@dataclass(frozen=True)
class Suite:
    """One kernel and its peers.

    Attributes:
        name: the kernel.
        providers: the first is the floor whose rate all others are held against.
        truth: input set -> Truth by result name; the first name is the error of the CSV's ``error`` column.
        work: (input set) -> what the question requires of anybody: FLOPs or bytes.
        unit: "TFLOP/s" or "TB/s".
        reference: a provider whose time all others are divided by besides, or None.
    """

    name: str
    providers: tuple[Provider, ...]
    truth: Callable[[Any], dict[str, Truth]]
    work: Callable[[Any], float]
    unit: str = "TFLOP/s"
    reference: str | None = None

    def without(self, names: tuple[str, ...]) -> Suite:
        """Only the providers that no name of ``names`` begins; floors stay."""
        kept = tuple(p for p in self.providers if p.role == "floor" or not any(p.name.startswith(n) for n in names))
        return Suite(self.name, kept, self.truth, self.work, self.unit, self.reference)


def errors(result: Result, truth: dict[str, Truth]) -> dict[str, float]:
    """Largest error of every name that both have; absolute for log-probs and entropies, else over max |truth|."""
    found = {}
    for name, wanted in truth.items():
        if name in result:
            difference = (result[name].index_select(0, wanted.rows).double() - wanted.value).abs().max()
            scale = 1.0 if name in ABSOLUTE else wanted.value.abs().max()
            found[name] = float(difference / scale)
    return found


def repeatable(first: Result, second: Result) -> bool:
    """Whether two calls gave the same bits."""
    return all(torch.equal(first[name], second[name]) for name in first)

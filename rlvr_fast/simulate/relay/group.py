"""Finite groups as multiplication tables, and the random walks that a policy makes on them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import permutations

import torch

from rlvr_fast import _validate as check

Tensor = torch.Tensor


@dataclass(frozen=True, eq=False)
class Group:
    """A finite group with elements 0 … d−1.

    Attributes:
        table: [d, d] int64, ``table[a, b]`` = a·b; for permutations b is applied first.
        name: for reports.

    Raises:
        ValueError: where the table is not a group's, naming the axiom that fails.
    """

    table: Tensor
    name: str = "group"

    def __post_init__(self) -> None:
        check.tensor("table", self.table, ndim=2, dtypes=(torch.int64,))
        d = len(self.table)
        if self.table.shape != (d, d) or d < 2:
            raise ValueError(f"table must be [d, d] with d of at least 2, got {check.describe(self.table)}")
        if self.table.min() < 0 or self.table.max() >= d:
            raise ValueError(f"table must hold elements 0 to {d - 1} (closure), got {int(self.table.min())} to "
                             f"{int(self.table.max())}")
        elements = torch.arange(d)
        neutral = ((self.table == elements).all(1) & (self.table == elements[:, None]).all(0)).nonzero()
        if not len(neutral):
            raise ValueError("table must have an identity element, got none")
        if not (self.table == neutral[0]).any(1).all():
            raise ValueError("table must have an inverse for every element, got an element without one")
        for a in elements:  # [d, d] at a time: (a·b)·c = a·(b·c)
            if not torch.equal(self.table[self.table[a]], self.table[a][self.table]):
                raise ValueError(f"table must be associative, got (a·b)·c ≠ a·(b·c) for a = {int(a)}")

    @property
    def order(self) -> int:
        return len(self.table)

    @cached_property
    def identity(self) -> int:
        return int((self.table == torch.arange(self.order)).all(1).nonzero()[0])

    @cached_property
    def inverse(self) -> Tensor:
        """[d] int64."""
        return (self.table == self.identity).long().argmax(1)

    @cached_property
    def abelian(self) -> bool:
        return torch.equal(self.table, self.table.T)

    @cached_property
    def _is_residues(self) -> bool:
        """Whether element a is the residue a modulo d, so that sums and Fourier transforms stand for the table."""
        elements = torch.arange(self.order)
        return torch.equal(self.table, (elements[:, None] + elements) % self.order)

    def path(self, start: Tensor, actions: Tensor) -> Tensor:
        """[R], [R, L] -> [R, L]: the states g₁·y, g₂·g₁·y, …"""
        if self._is_residues:
            return (start[:, None] + actions.cumsum(1)) % self.order
        states = []
        for action in actions.unbind(1):
            start = self.table[action, start]
            states.append(start)
        return torch.stack(states, 1)

    def walk(self, kernels: Tensor) -> Tensor:
        """Distribution of h_L ⋯ h_1 with independent h_k: [R, L, d] probabilities -> [R, d]."""
        if self._is_residues:
            return torch.fft.irfft(torch.fft.rfft(kernels).prod(1), n=self.order)
        reached, back = kernels[:, 0], self.table[self.inverse]  # back[h, x] = h⁻¹·x
        for kernel in kernels.unbind(1)[1:]:
            reached = torch.einsum("rh,rhx->rx", kernel, reached[:, back])
        return reached

    def __repr__(self) -> str:
        return f"Group({self.name}, order={self.order}, {'abelian' if self.abelian else 'not abelian'})"


def cyclic(n: int) -> Group:
    """Z_n, addition modulo n."""
    _check_size(n, 2, 1024)
    elements = torch.arange(n)
    return Group((elements[:, None] + elements) % n, f"Z_{n}")


def symmetric(n: int) -> Group:
    """S_n, the n! permutations of n points; n up to 5."""
    _check_size(n, 2, 5)
    return _permutations(list(permutations(range(n))), f"S_{n}")


def alternating(n: int) -> Group:
    """A_n, the n!/2 even permutations of n points; n from 3 to 5."""
    _check_size(n, 3, 5)
    even = [p for p in permutations(range(n)) if sum(p[i] > p[j] for i in range(n) for j in range(i + 1, n)) % 2 == 0]
    return _permutations(even, f"A_{n}")


def named(name: str) -> Group:
    """Z_n, S_n or A_n by its name, such as "Z_96"."""
    family, _, size = name.partition("_") if isinstance(name, str) else ("", "", "")
    makers = {"Z": cyclic, "S": symmetric, "A": alternating}
    if family not in makers or not size.isdecimal():
        raise ValueError(f"group must be Z_n, S_n or A_n with a number n, got {check.describe(name)}")
    return makers[family](int(size))


def _permutations(members: list[tuple[int, ...]], name: str) -> Group:
    number = {p: i for i, p in enumerate(members)}
    table = [[number[tuple(a[i] for i in b)] for b in members] for a in members]
    return Group(torch.tensor(table), name)


def _check_size(n: int, smallest: int, largest: int) -> None:
    if isinstance(n, bool) or not isinstance(n, int):
        raise TypeError(f"n must be an int, got {check.describe(n)}")
    if not smallest <= n <= largest:
        raise ValueError(f"n must be {smallest} to {largest}, got {n}")

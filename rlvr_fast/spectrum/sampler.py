"""A torch sampler that follows a mixture over bins of prompts, which may change while training goes on."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler

from rlvr_fast import _validate as check
from rlvr_fast.spectrum.mixture import Mixture
from rlvr_fast.synthetic import whole


class SpectrumSampler(Sampler[int]):
    """Indices of prompts, drawn batch by batch from bins with given weights.

    Every batch holds each bin as often as its weight says, to within one prompt (systematic sampling), in random order.
    Within a bin prompts come without replacement until it is used up, then in a new order; a prompt is in a batch
    twice only where the bin's share is larger than the bin. With several ranks the prompts of a batch are dealt out:
    all ranks draw the same batch from the same seed and take their own part of it, each prompt whole with its
    repetitions.

    Each ``iter()`` starts the next epoch of ``n_batches``; the seed fixes the order, and no epoch repeats another. Give
    a DataLoader ``batch_size = batch_size // world_size * group_size``. Its workers read ahead (``prefetch_factor``
    batches each): a new mixture, or a saved state, is then as much ahead of what was trained on.

    Args:
        bins: label -> indices into the data set, at least one each; an index may be in one bin only.
        batch_size: prompts per batch, over all ranks.
        n_batches: batches per epoch.
        mixture: weights of the bins: a Mixture, or label -> weight; equal by default. See ``update``.
        group_size: how often each prompt is repeated, in a row: one for every response of a group, where the trainer
            wants that (as TRL's GRPOTrainer does of its sampler).
        seed: of the order. rank, world_size: which part of each batch is this rank's.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """

    def __init__(self, bins: Mapping[Any, Sequence[int]], *, batch_size: int, n_batches: int,
                 mixture: Mixture | Mapping[Any, float] | None = None, group_size: int = 1, seed: int = 0,
                 rank: int = 0, world_size: int = 1) -> None:
        self._bins = _checked_bins(bins)
        self._n_batches, self._group_size = whole("n_batches", n_batches), whole("group_size", group_size)
        self._batch_size, self._world_size = whole("batch_size", batch_size), whole("world_size", world_size)
        self._rank = whole("rank", rank, least=0)
        if rank >= world_size:
            raise ValueError(f"rank must be below world_size = {world_size}, got {rank}")
        if batch_size % world_size:
            raise ValueError(f"batch_size must be a multiple of world_size = {world_size}, got {batch_size}")
        self._generator = torch.Generator().manual_seed(whole("seed", seed, least=0))
        self._waiting: list[list[int]] = [[] for _ in self._bins]  # of each bin, the indices left, last one first
        self._batch: list[int] = []  # of this batch, the indices left on this rank, last one first
        self._drawn = self._n_batches  # batches of the epoch; at its end until iteration starts
        self._resumed = False
        self.update(dict.fromkeys(self._bins, 1.0) if mixture is None else mixture)

    @property
    def mixture(self) -> dict[Hashable, float]:
        """Label -> probability, as set last."""
        return dict(zip(self._bins, self._probability.tolist(), strict=True))

    def update(self, mixture: Mixture | Mapping[Any, float]) -> None:
        """New weights, from the next batch that is drawn.

        Args:
            mixture: one weight of at least 0 for every bin, on any scale. In a distributed run the same on every rank,
                at the same batch.
        """
        weights = mixture.as_dict() if isinstance(mixture, Mixture) else mixture
        if not isinstance(weights, Mapping):
            raise TypeError(f"mixture must be a Mixture or a mapping from bin to weight, got {check.describe(mixture)}")
        if set(weights) != set(self._bins):
            raise ValueError(f"mixture must have exactly the bins {check.describe(list(self._bins))}, "
                             f"got {check.describe(list(weights))}")
        values = [check.real(f"mixture[{label!r}]", weights[label]) for label in self._bins]
        if min(values) < 0 or sum(values) <= 0:
            raise ValueError("mixture must be at least 0 everywhere and above 0 somewhere, "
                             f"got {check.describe(values)}")
        self._probability = torch.tensor(values, dtype=torch.float64) / sum(values)

    def __len__(self) -> int:
        return self._n_batches * self._batch_size // self._world_size * self._group_size

    def __iter__(self) -> Iterator[int]:
        if not self._resumed:
            self._drawn, self._batch = 0, []
        self._resumed = False
        while self._batch or self._drawn < self._n_batches:
            if not self._batch:
                self._batch = self._own_part(self._draw_batch())
                self._drawn += 1
            yield self._batch.pop()

    def _own_part(self, batch: list[int]) -> list[int]:
        size = self._batch_size // self._world_size
        own = batch[self._rank * size:(self._rank + 1) * size]
        return [index for index in reversed(own) for _ in range(self._group_size)]

    def _draw_batch(self) -> list[int]:
        """The prompts of the next batch on all ranks."""
        start = torch.rand(1, generator=self._generator, dtype=torch.float64)
        marks = (start + torch.arange(self._batch_size)) / self._batch_size
        chosen = torch.searchsorted(self._probability.cumsum(0), marks, right=True)
        last = int(self._probability.nonzero()[-1])  # the sum may round to less than 1
        batch: list[int] = []
        for which in chosen.clamp(max=last).tolist():
            batch.append(self._next_of(which, batch))
        order = torch.randperm(self._batch_size, generator=self._generator).tolist()
        return [batch[place] for place in order]

    def _next_of(self, which: int, batch: list[int]) -> int:
        waiting, everything = self._waiting[which], list(self._bins.values())[which]
        if not waiting:
            order = torch.randperm(len(everything), generator=self._generator).tolist()
            taken = set(batch)  # those come last in the new order
            waiting += sorted((everything[place] for place in order), key=lambda index: index not in taken)
        return waiting.pop()

    def state_dict(self) -> dict[str, Any]:
        """All that the continuation depends on, in plain types; also in the middle of a batch."""
        return {"generator": self._generator.get_state().tolist(), "waiting": [list(one) for one in self._waiting],
                "batch": list(self._batch), "drawn": self._drawn, "probability": self._probability.tolist(),
                "sizes": self._sizes()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where the state was saved, on the same rank: the next ``iter()`` yields the rest of that epoch."""
        if not isinstance(state, Mapping) or state.keys() != self.state_dict().keys():
            raise ValueError(f"state must be what state_dict returned, got {check.describe(state)}")
        if list(state["sizes"]) != self._sizes():
            raise ValueError("state must come from a sampler with the same bins, batch_size, n_batches, group_size, "
                             f"rank and world_size, got {list(state['sizes'])} for {self._sizes()}")
        self._generator.set_state(torch.tensor(state["generator"], dtype=torch.uint8))
        self._waiting = [list(one) for one in state["waiting"]]
        self._batch, self._drawn = list(state["batch"]), state["drawn"]
        self._probability = torch.tensor(state["probability"], dtype=torch.float64)
        self._resumed = bool(self._batch) or self._drawn < self._n_batches

    def _sizes(self) -> list[int]:
        return [self._batch_size, self._n_batches, self._group_size, self._rank, self._world_size,
                *(len(one) for one in self._bins.values())]

    def __repr__(self) -> str:
        shares = ", ".join(f"{label}: {share:.1%} of {len(indices)}" for (label, share), indices
                           in zip(self.mixture.items(), self._bins.values(), strict=True))
        return (f"SpectrumSampler({self._batch_size} prompts × {self._group_size}, {self._n_batches} batches, rank "
                f"{self._rank} of {self._world_size}; {shares})")


def _checked_bins(bins: object) -> dict[Hashable, tuple[int, ...]]:
    if not isinstance(bins, Mapping):
        raise TypeError(f"bins must be a mapping from label to indices, got {check.describe(bins)}")
    if not bins:
        raise ValueError("bins must hold at least one bin, got none")
    result: dict[Hashable, tuple[int, ...]] = {}
    seen: set[int] = set()
    for label, indices in bins.items():
        name = f"bins[{label!r}]"
        indices = indices.tolist() if hasattr(indices, "tolist") else indices
        if isinstance(indices, str | bytes) or not isinstance(indices, Sequence):
            raise TypeError(f"{name} must be a sequence of indices, got {check.describe(indices)}")
        if not len(indices):
            raise ValueError(f"{name} must hold at least one index, got none")
        result[label] = tuple(whole(f"an index of {name}", index, least=0) for index in indices)
        if len(set(result[label])) < len(indices) or seen & set(result[label]):
            raise ValueError(f"{name} must hold indices that occur once in all bins together, got one again")
        seen |= set(result[label])
    return result

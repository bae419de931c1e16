"""Layers whose weights are spread over tensor-parallel ranks: what this rank has of a gradient, and how ranks add up.

Ranks that share a layer see the same responses. What each has of a response's gradient is one of three things:

- a **shard** of it (column- and row-parallel weights, a vocabulary's rows): inner products of shards add up;
- the **whole** of it, the same on every rank (plain or replicated parameters): it counts once;
- its **partial** sum over some of the tokens or heads (norms of a sequence-parallel region): gradients add up first,
  inner products are taken of their sum.

Sketches of shards and of partial sums add up, since a shard is folded under the feature ids of the whole weight.
Everything a site hands on is local and plain: collectors see an ordinary layer that is smaller.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import nn

from rlvr_fast.distributed import checksum, raise_refusals, tell
from rlvr_fast.model_gap.micro_batch import Spans, spread_spans
from rlvr_fast.rollouts import Rollouts
from rlvr_fast.vocabulary_parallel import VocabularyShard

if TYPE_CHECKING:  # DTensor takes a while to import, and whoever has one has done it
    from torch.distributed.tensor import DTensor

    from rlvr_fast.model_gap.tap import Site
    from rlvr_fast.model_gap.tensor_parallel.head import HeadSamples

SHARD, WHOLE, PARTIAL = "shard", "whole", "partial"


@dataclass(frozen=True)
class Part:
    """What this rank has of one parameter's gradient.

    Attributes:
        kind: "shard", "whole" or "partial".
        shape: of the whole parameter.
        starts, sizes: the indices [start, start + size) of every dimension that are here.
    """

    kind: str
    shape: tuple[int, ...]
    starts: tuple[int, ...]
    sizes: tuple[int, ...]

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part of a tensor of the whole shape."""
        for dim, (start, size) in enumerate(zip(self.starts, self.sizes, strict=True)):
            whole = whole.narrow(dim, start, size)
        return whole

    def local_rows(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Row ids counted from the first row here (0 for those elsewhere), and whether they are here."""
        local = ids - self.starts[0]
        here = (local >= 0) & (local < self.sizes[0])
        return torch.where(here, local, 0), here


def is_dtensor(tensor: object) -> TypeGuard[DTensor]:
    """Whether it is a DTensor."""
    return isinstance(tensor, torch.Tensor) and hasattr(tensor, "device_mesh")


class TensorParallel:
    """The ranks that share this rank's layers, and what it has of each parameter.

    Args:
        group: the ranks.
        vocabulary: the rows of the lm_head that a loop's own vocabulary-parallel head holds here; None otherwise.
        head: the names of that head's parameters.

    Attributes:
        parts: by parameter name, as its layers ran.
        own_rows: those of a loop's own head.
        shapes: by parameter name, of the whole.
        replicated: names of the vectors under ``parallelize_module`` whose gradients may be partial sums.
        heads: samples of the logits' gradient, where no rank has all of it; see ``tensor_parallel_head``.
    """

    def __init__(self, group: dist.ProcessGroup, parameters: dict[str, nn.Parameter],
                 vocabulary: VocabularyShard | None, head: Sequence[str]) -> None:
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        self.ranks = dist.get_process_group_ranks(group)
        self.parts: dict[str, Part] = {}
        self.heads: list[HeadSamples] = []
        self.vocabulary = vocabulary
        self.shapes = {name: tuple(p.shape) for name, p in parameters.items()}
        self._spread = {name for name, p in parameters.items() if is_dtensor(p) and self._lies_here(p)}
        self.own_rows: dict[str, Part] = {}
        if vocabulary is not None:
            for name in head:
                sizes = tuple(parameters[name].shape)
                self.shapes[name] = (vocabulary.size, *sizes[1:])
                self.own_rows[name] = Part(SHARD, self.shapes[name], (vocabulary.first, *(0 for _ in sizes[1:])), sizes)
        # Gradients of these may come as partial sums.
        self.replicated = [name for name, p in parameters.items() if is_dtensor(p) and p.ndim == 1
                           and not self._placement(p, sharded=True).is_shard()]

    def agree(self, rollouts: Rollouts, options: str) -> None:
        """Collective: raise on every rank if one refused its arguments, or if they do not measure the same thing."""
        same = checksum((rollouts.prompt_ids, rollouts.members, rollouts.bounds))
        told = tell(f"{options}, {len(self.shapes)} parameters #{checksum(sorted(self.shapes.items()))}, "
                     f"{rollouts.n_responses} responses #{same}", self.group)
        raise_refusals(told)
        if len(set(told)) > 1:
            raise ValueError("every rank that shares the model's layers must measure the same responses in the same "
                             "way, got " + " | ".join(f"rank {rank}: {words}" for rank, words in enumerate(told)))

    # -- layouts ------------------------------------------------------------------------------------------------------

    def _lies_here(self, tensor: DTensor) -> bool:
        mesh = tensor.device_mesh
        return any(dist.get_process_group_ranks(mesh.get_group(dim)) == self.ranks for dim in range(mesh.ndim))

    def _placement(self, tensor: DTensor, *, sharded: bool = False) -> Any:
        """How a DTensor lies on these ranks. ``sharded``: it may lie on a data-parallel mesh besides.

        A Placement; to type checkers anything, as ``is_shard()`` does not tell them that there is a ``dim``.
        """
        for dim, placement in reversed(list(enumerate(tensor.placements))):
            if dist.get_process_group_ranks(tensor.device_mesh.get_group(dim)) == self.ranks:
                return placement
        if not sharded:
            raise ValueError(f"group must hold data-parallel ranks only, and the layers be spread over the ranks "
                             f"{self.ranks}: got a tensor on {tensor.device_mesh}")
        from torch.distributed.tensor import Replicate  # imported already, since a DTensor came
        return Replicate()

    def extent(self, name: str, parameter: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """First indices and sizes of what is here of a parameter that a layer computes with."""
        shape = tuple(parameter.shape)
        starts, sizes = [0] * len(shape), list(shape)
        if name in self.own_rows:
            return self.own_rows[name].starts, self.own_rows[name].sizes
        if is_dtensor(parameter) and (placement := self._placement(parameter)).is_shard():
            starts[placement.dim], sizes[placement.dim] = self._chunk(shape[placement.dim])
        return tuple(starts), tuple(sizes)

    def _chunk(self, n: int) -> tuple[int, int]:
        """Start and size of this rank's piece of n, as ``torch.chunk`` splits."""
        step = -(-n // self.size)
        start = min(self.rank * step, n)
        return start, min(step, n - start)

    def admit(self, site: Site, seen: torch.Tensor, spans: Spans, *, gram: bool) -> str | None:
        """Note what is here of the parameters of ``site`` when it runs on ``seen``; else why they are not covered.

        ``gram``: inner products are formed layer by layer, so a matrix whose gradient is a partial sum cannot be.
        """
        if self.spans_here(site, seen, spans) is None:
            return "its rows on a tensor-parallel rank cannot be assigned to responses"
        for own, name in site.parameters.items():
            parameter = getattr(site.module, own)
            kind = self._kind(site, own, name, parameter, seen)
            if kind is None:
                return (f"its layout on the tensor-parallel ranks ({own} {_layout(parameter)}, input {_layout(seen)}) "
                        "is not one that can be measured")
            starts, sizes = self.extent(name, parameter)
            if kind == PARTIAL and gram and parameter.ndim > 1:
                return "each tensor-parallel rank sees a part of its tokens: use method='sketch'"
            if kind == SHARD and any((self.size - 1) * -(-n // self.size) >= n
                                     for n, size in zip(self.shapes[name], sizes, strict=True)
                                     if n != size and name not in self.own_rows):
                return "it is smaller than the number of tensor-parallel ranks, some of which have nothing of it"
            part = Part(kind, self.shapes[name], starts, sizes)
            if self.parts.setdefault(name, part) != part:
                return "its uses have different layouts on the tensor-parallel ranks"
        return None

    def hold(self, name: str, parameter: torch.Tensor, *, partial: bool) -> None:
        """Note what is here of a parameter whose gradient is looked at whole, not layer by layer."""
        starts, sizes = self.extent(name, parameter)
        spread = name in self.own_rows or (is_dtensor(parameter) and self._placement(parameter).is_shard())
        kind = PARTIAL if partial else SHARD if spread else WHOLE
        self.parts[name] = Part(kind, self.shapes[name], starts, sizes)

    def head_part(self, weight: torch.Tensor) -> Part:
        """What is here of the weight of the lm_head, trainable or not."""
        if self.vocabulary is not None:
            sizes, vocabulary = tuple(weight.shape), self.vocabulary
            return Part(SHARD, (vocabulary.size, sizes[1]), (vocabulary.first, 0), sizes)
        spread = is_dtensor(weight) and self._placement(weight).is_shard()
        return Part(SHARD if spread else WHOLE, tuple(weight.shape), *self.extent("", weight))

    def _kind(self, site: Site, own: str, name: str, parameter: torch.Tensor, seen: torch.Tensor) -> str | None:
        if not is_dtensor(parameter):
            if name in self._spread and self.size > 1:
                raise ValueError(f"group must hold the ranks that {name} is sharded over: its layer is not spread over "
                                 f"{self.ranks}")
            return None if is_dtensor(seen) else SHARD if name in self.own_rows else WHOLE
        if not is_dtensor(seen) or not is_dtensor(site.weight):
            return None
        placement, given, weight = (self._placement(tensor) for tensor in (parameter, seen, site.weight))
        if weight.is_replicate():
            if not placement.is_replicate():
                return None
            tokens = len(site.leading(seen))
            return WHOLE if given.is_replicate() else PARTIAL if given.is_shard() and given.dim < tokens else None
        sides = site.spread_sides(weight.dim) if type(weight).__name__ == "Shard" else None
        if sides is None or not (given.is_shard(seen.ndim - 1) if sides[0] else given.is_replicate()):
            return None
        return SHARD if placement.is_shard() else WHOLE if placement.is_replicate() else None

    # -- what a backward brings ---------------------------------------------------------------------------------------

    def local_input(self, site: Site, seen: torch.Tensor, spans: Spans) -> tuple[torch.Tensor, Spans]:
        """The input and the rows of the responses as far as they are here."""
        here = self.spans_here(site, seen, spans)
        assert here is not None  # else the layer was not admitted
        return waited(seen), here

    def local_output_gradient(self, site: Site, seen: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient of the output as far as it is here."""
        if is_dtensor(seen):
            assert is_dtensor(site.weight)  # else the layer was not admitted
            assert is_dtensor(gradient)
            from torch.distributed.tensor import Replicate, Shard  # imported already, since a DTensor came
            weight, wanted = self._placement(site.weight), self._placement(seen)
            if weight.is_shard() and (sides := site.spread_sides(weight.dim)) is not None:
                wanted = Shard(gradient.ndim - 1) if sides[1] else Replicate()
            if gradient.placements != (wanted,):
                gradient = gradient.redistribute(placements=(wanted,))
        return waited(gradient)

    def local_rows(self, name: str, weight: torch.Tensor, ids: torch.Tensor
                   ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``Part.local_rows`` of an embedding that was called with ids of the whole vocabulary."""
        return self.parts[name].local_rows(ids) if is_dtensor(weight) else (ids, None)

    def kind_of(self, name: str, kind: str) -> str:
        """The ``kind`` of a contribution to the gradient of ``name``, as collectors know it."""
        return PARTIAL if kind == "vector" and self.parts[name].kind == PARTIAL else kind

    def spans_here(self, site: Site, seen: torch.Tensor, spans: Spans) -> Spans | None:
        """The rows of each response among those that are here; None if they are no ranges."""
        if not is_dtensor(seen) or not (given := self._placement(seen)).is_shard():
            return spans
        tokens = tuple(site.leading(seen))
        if given.dim >= len(tokens):
            return spans
        return spread_spans(spans, tokens, given.dim, *self._chunk(tokens[given.dim]))

    def as_parameter(self, local: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
        """A gradient as autograd expects it for ``parameter``."""
        if not is_dtensor(parameter):
            return local
        from torch.distributed.tensor import DTensor
        return DTensor.from_local(local, parameter.device_mesh, parameter.placements, run_check=False,
                                  shape=parameter.shape, stride=parameter.stride())

    def local_gradient(self, name: str, parameter: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """Of the gradient that reached ``parameter``, what belongs to the part that is here; partial sums stay so."""
        if not is_dtensor(gradient):
            return gradient
        assert is_dtensor(parameter)
        own, given = self._placement(parameter), self._placement(gradient)
        if own.is_shard() and given.is_replicate():
            starts, sizes = self.extent(name, parameter)
            return Part(SHARD, tuple(parameter.shape), starts, sizes).of(waited(gradient))
        if own != given and not given.is_partial():
            gradient = gradient.redistribute(placements=parameter.placements)
        return waited(gradient)

    def is_partial(self, gradient: torch.Tensor) -> bool:
        """Whether the ranks' gradients of one parameter have yet to be added up."""
        return is_dtensor(gradient) and self._placement(gradient, sharded=True).is_partial()

    def __repr__(self) -> str:
        kinds = [part.kind for part in self.parts.values()]
        return (f"TensorParallel(rank {self.rank} of {self.size}, "
                f"{', '.join(f'{kind} {kinds.count(kind)}' for kind in (SHARD, WHOLE, PARTIAL))})")


def waited(tensor: torch.Tensor) -> torch.Tensor:
    """The local tensor of a DTensor, there."""
    local = tensor.to_local() if is_dtensor(tensor) else tensor
    return local.wait() if hasattr(local, "wait") else local  # of a collective under way


def _layout(tensor: torch.Tensor) -> str:
    return ", ".join(map(str, tensor.placements)) if is_dtensor(tensor) else "plain"

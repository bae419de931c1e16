"""The head split by vocabulary rows over the ranks of a process group (tensor-parallel, "vocab-parallel" lm_head).

Every rank runs the head pass of its backend over its own rows; ``merge_passes`` makes the pass over the whole
vocabulary out of the ranks' passes, and given that, every backend's gradients are this rank's share of the whole's.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from rlvr_fast import _validate as check
from rlvr_fast.backends.base import TokenPass
from rlvr_fast.distributed import REFUSED, carries_cpu_tensors, gather, raise_refusals, tell
from rlvr_fast.merge_passes import merge_passes

if TYPE_CHECKING:
    from rlvr_fast.head import Head


@dataclass(frozen=True, eq=False, repr=False)
class VocabularyShard:
    """The lm_head rows [first, first + rows) of a vocabulary of ``size`` entries, held by this rank.

    Creating one is collective over ``group``: every rank does, and all raise if the shards do not tile the vocabulary.
    Pass the rank's rows as ``weight`` and ``bias`` together with the shard; hidden states, tokens (ids of the whole
    vocabulary) and rollouts are the same on every rank, and so, bit for bit, are the results.

    Calls that take a shard are collective too. Where the group can carry CPU tensors ("gloo", or
    "cpu:gloo,cuda:nccl", torch's default on a GPU machine), their arguments are compared on the host first, without
    waiting for the device: a bad argument on one rank raises on all. Over NCCL alone only the rank that has it raises,
    and the others wait for the group's timeout.

    Attributes:
        first: vocabulary id of this rank's first row.
        rows: number of its rows, at least 1.
        size: V, the number of rows of all ranks together.
        group: the ranks that share the vocabulary; None is the default group. Their order need not be the rows'.
        largest: rows of the largest shard.

    Raises:
        ValueError, TypeError: on every rank, if a rank's numbers are no rows of the vocabulary, or the shards of the
            group leave a hole, overlap, or disagree about ``size``; or without ``torch.distributed``.
    """

    first: int
    rows: int
    size: int
    group: dist.ProcessGroup | None = None
    largest: int = field(init=False)

    def __post_init__(self) -> None:
        _check_group(self.group)
        numbers = [self.first, self.rows, self.size]
        integers = all(isinstance(number, int) and not isinstance(number, bool) for number in numbers)
        fits = integers and 0 <= self.first < self.stop <= self.size
        told = tell(f"{self.first} {self.rows} {self.size}" if fits else f"{REFUSED}first, rows, size = {numbers}",
                     self.group)
        if not fits:
            kind = ValueError if integers else TypeError
            raise kind(f"first, rows and size must be integers with 0 <= first < first + rows <= size, got {numbers}")
        raise_refusals(told)
        shards = [tuple(map(int, words.split())) for words in told]
        sizes = {size for _, _, size in shards}
        spans = ", ".join(f"[{first}, {first + rows}) of {size} on rank {rank}"
                          for rank, (first, rows, size) in enumerate(shards))
        ordered = sorted((first, first + rows) for first, rows, _ in shards)
        stops = [0, *(stop for _, stop in ordered)]
        if len(sizes) > 1 or stops[-1] != self.size or [first for first, _ in ordered] != stops[:-1]:
            raise ValueError(f"the shards must tile the vocabulary without hole or overlap, got {spans}")
        object.__setattr__(self, "largest", max(rows for _, rows, _ in shards))

    @classmethod
    def even(cls, size: int, group: dist.ProcessGroup | None = None) -> VocabularyShard:
        """This rank's shard of an even split: ceil(size / ranks) rows each, as ``torch.chunk`` and DTensor split.

        Raises:
            ValueError, TypeError: on every rank, also if the split leaves a rank without rows.
        """
        _check_group(group)
        if isinstance(size, bool) or not isinstance(size, int):
            return cls(0, 1, size, group)  # which refuses it on every rank
        rows = -(-size // dist.get_world_size(group))
        first = rows * dist.get_rank(group)
        return cls(first, min(rows, size - first), size, group)

    @property
    def operator_arguments(self) -> tuple[list[int], str]:
        """The shard in types that a torch operator takes."""
        group = dist.group.WORLD if self.group is None else self.group
        assert group is not None  # checked when the shard was made
        return [self.first, self.rows, self.size, self.largest], group.group_name

    @property
    def stop(self) -> int:
        """One past this rank's last row: its rows are ``weight[shard.first:shard.stop]``."""
        return self.first + self.rows

    def __repr__(self) -> str:
        rank, ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
        return f"VocabularyShard([{self.first}, {self.stop}) of {self.size}, rank {rank} of {ranks})"

    # -- arguments --------------------------------------------------------------------------------------------------

    def check_rows(self, weight: torch.Tensor) -> None:
        """Raise if ``weight`` is not this rank's rows."""
        if weight.shape[0] != self.rows:
            raise ValueError(f"weight must hold the {self.rows} rows [{self.first}, {self.stop}) of this rank's shard, "
                             f"got {check.describe(weight)}")

    def refuse(self, error: Exception) -> None:
        """Tell the ranks that are in, or come to, an ``agreement`` that this one raises ``error``."""
        if carries_cpu_tensors(self.group):
            tell(REFUSED + str(error), self.group)

    def compare(self, words: str) -> None:
        """Raise if a rank refused, or if not all say the same words."""
        if carries_cpu_tensors(self.group):
            told = tell(words, self.group)
            raise_refusals(told)
            if len(set(told)) > 1:
                raise ValueError("every rank must make the same call with the same tokens, got "
                                 + " | ".join(f"rank {rank}: {words}" for rank, words in enumerate(told)))

    # -- work ---------------------------------------------------------------------------------------------------------

    def local_ids(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids counted from this shard's first row; -1 outside it."""
        inside = (tokens >= self.first) & (tokens < self.stop)
        return torch.where(inside, tokens - self.first, -1)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of the ranks' tensors, in place of this rank's."""
        dist.all_reduce(values, group=self.group)
        return values

    def sums(self, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """``sum`` of each of some tensors of one dtype, in one collective; none is changed."""
        if not parts:
            return []
        flat = self.sum(torch.cat([part.flatten() for part in parts]))
        return [total.view(part.shape) for total, part in zip(flat.split([part.numel() for part in parts]), parts,
                                                              strict=True)]


def restored(numbers: list[int] | None, group_name: str | None) -> VocabularyShard | None:
    """The shard that gave these ``operator_arguments``; nobody is asked again, it was checked when it was made."""
    if numbers is None or group_name is None:
        return None
    shard = object.__new__(VocabularyShard)
    group = dist.distributed_c10d._resolve_process_group(group_name)  # type: ignore[attr-defined, arg-type]  # private
    for name, value in zip(("first", "rows", "size", "largest", "group"), (*numbers, group), strict=True):
        object.__setattr__(shard, name, value)
    return shard


@dataclass(frozen=True)
class ShardMerge:
    """A ``backends.Merge``: one all-gather of six float32 numbers per token."""

    shard: VocabularyShard
    temperature: float
    softcap: float | None

    @property
    def largest_shard(self) -> int:
        return self.shard.largest

    def __call__(self, local: TokenPass) -> tuple[TokenPass, torch.Tensor]:
        merged, mass = merge_passes(gather(torch.stack(local), self.shard.group), self.temperature, self.softcap)
        return merged, mass[dist.get_rank(self.shard.group)]


# -- what the ranks say to each other ---------------------------------------------------------------------------------


def check_shard(vocabulary: VocabularyShard) -> VocabularyShard:
    """Return ``vocabulary`` if it is a shard."""
    if not isinstance(vocabulary, VocabularyShard):
        raise TypeError(f"vocabulary must be rlvr_fast.VocabularyShard or None, got {type(vocabulary).__name__}")
    return vocabulary


@contextmanager
def agreement(vocabulary: VocabularyShard | None) -> Iterator[Callable[..., None]]:
    """Check a call's arguments inside, and give the function that it yields what all ranks must have alike.

    Raises:
        ValueError: on a rank with good arguments, if another refused its own or if the ranks differ. What is raised
            inside goes on after the others were told.
    """
    if vocabulary is None:
        yield lambda *call: None
        return
    check_shard(vocabulary)
    said: list[str] = []
    try:
        yield lambda *call: said.append(_describe_call(*call))
    except Exception as error:
        vocabulary.refuse(error)
        raise
    vocabulary.compare("; ".join(said))


def _describe_call(name: str, hidden: torch.Tensor, tokens: torch.Tensor, head: Head, *options: str) -> str:
    """A call in words; token ids only where reading them costs no waiting."""
    ids = [f"tokens #{zlib.crc32(tokens.contiguous().numpy().data):08x}"] if tokens.device.type == "cpu" else []
    return ", ".join([f"{name}: hidden {list(hidden.shape)} {hidden.dtype} on {hidden.device.type}", *ids,
                      f"bias {head.bias is not None}", f"temperature {head.temperature}", f"softcap {head.softcap}",
                      *options])


def _check_group(group: dist.ProcessGroup | None) -> None:
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("a vocabulary shard needs torch.distributed, call torch.distributed.init_process_group first")
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a torch.distributed.ProcessGroup of which this rank is a member, or None; got "
                        f"{check.describe(group)}")

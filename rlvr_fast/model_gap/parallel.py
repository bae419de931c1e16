"""One gap out of the responses of several data-parallel ranks.

What the ranks collected in a step is joined by a single all-gather of one flat buffer per rank: rows of inner products
where every prompt is whole on one rank, sketches, which are squared after the join, where prompts may be split.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist

from rlvr_fast import _validate as check
from rlvr_fast.distributed import REFUSED, checksum, gather, raise_refusals, tell
from rlvr_fast.model_gap.collected import Collected, JoinedResponses
from rlvr_fast.model_gap.segmented import accumulation_dtype
from rlvr_fast.moments import Responses
from rlvr_fast.rollouts import Rollouts

WORDS_BYTES = 4096  # what a rank tells the others in words: why it refuses, or why parameters are not covered
ALIGNMENT = 8  # bytes; every section of the buffer can be viewed in its dtype
ABSENT = -1.0  # a squared norm of no gradient
Sections = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # of a buffer


@contextmanager
def refusals_told(group: dist.ProcessGroup | None) -> Iterator[None]:
    """Check a rank's arguments inside: what is raised there is raised on the ranks that make ``Ranks`` of ``group``."""
    if group is not None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError("group needs torch.distributed, call torch.distributed.init_process_group first")
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError("group must be a torch.distributed.ProcessGroup of which this rank is a member, or None; "
                            f"got {check.describe(group)}")
    try:
        yield
    except Exception as error:
        if group is not None:
            tell(REFUSED + str(error), group)
        raise


class Ranks:
    """The ranks of ``group``, each with responses of its own to the same model. Creating one is collective.

    Args:
        parameters: the trainable parameters, the same on every rank.
        columns: per parameter the width of its sketches; None for inner products.
        directed: names of the parameters that a direction is given for.
        options: all else that must be the same on every rank.

    Attributes:
        buffer_bytes: what each rank contributes to the all-gather of ``joined``, as much as the largest one needs.

    Raises:
        ValueError: on every rank, if one refused its arguments or they do not measure the same thing.
    """

    def __init__(self, group: dist.ProcessGroup, rollouts: Rollouts, parameters: dict[str, torch.nn.Parameter], *,
                 columns: dict[str, int] | None, directed: Sequence[str], options: str) -> None:
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        self.names, self.columns, self.directed = tuple(parameters), columns, tuple(directed)
        self.device = next(iter(parameters.values())).device
        dtypes = {accumulation_dtype(p.dtype) for p in parameters.values()}
        self.dtype = torch.float64 if columns is None or torch.float64 in dtypes else torch.float32
        bounds = rollouts.bounds
        self._description = pickle.dumps((rollouts.prompt_ids, rollouts.members,
                                          [stop - start for start, stop in pairwise(bounds)]))
        own = (rollouts.n_responses, max(map(len, rollouts.members)), len(self._description))
        model = checksum([(name, tuple(p.shape), str(p.dtype)) for name, p in parameters.items()])
        told = tell(f"{own[0]} {own[1]} {own[2]} {int(_numbered(rollouts))} {options}, {len(self.names)} parameters "
                     f"#{model}, directions #{checksum(self.directed)}", group)
        raise_refusals(told)
        told_apart = [words.split(" ", 4) for words in told]
        if len({words[4] for words in told_apart}) > 1:
            raise ValueError("every rank of the group must measure the same model in the same way, got "
                             + " | ".join(f"rank {rank}: {words[4]}" for rank, words in enumerate(told_apart)))
        numbered = [str(rank) for rank, words in enumerate(told_apart) if words[3] == "1"]
        if len(numbered) > 1:
            raise ValueError("prompts of different ranks must have different prompt_ids, got prompts counted from 0 "
                             f"on each of the ranks {', '.join(numbered)}, as group_size does: give "
                             "prompt_ids=[rank * prompts_per_rank + i // group_size, ...] instead (or, if prompts are "
                             "split over the ranks, ids that are no such count)")
        self._sections = [self._layout(*map(int, words[:3])) for words in told_apart]
        largest = max(stops[-1] for stops in map(_stops, self._sections))
        self.buffer_bytes = -(-largest // ALIGNMENT) * ALIGNMENT

    def _widths(self, longest_group: int) -> list[int]:
        return [longest_group] * len(self.names) if self.columns is None else [self.columns[n] for n in self.names]

    def _layout(self, n_responses: int, longest_group: int, description_bytes: int) -> Sections:
        """What a rank's buffer holds, wide dtypes first: name -> (dtype, shape)."""
        return {"coefficients": (torch.float64, (n_responses,)), "norm_sq": (torch.float64, (len(self.names),)),
                "dots": (torch.float64, (len(self.directed), n_responses)),
                "table": (self.dtype, (n_responses, sum(self._widths(longest_group)))),
                "reason": (torch.uint8, (len(self.names),)), "correct": (torch.uint8, (n_responses,)),
                "words": (torch.uint8, (WORDS_BYTES,)), "description": (torch.uint8, (description_bytes,))}

    # -- the join -----------------------------------------------------------------------------------------------------

    def joined(self, collect: Callable[[], Collected]) -> Collected:
        """What ``collect()`` gives on all ranks together, the same on every one. Collective: one all-gather.

        Raises:
            ValueError: on every rank, if ``collect`` raised on one (which raises that), or if the method needs whole
                prompts and one has responses on two ranks.
        """
        try:
            own = collect()
        except Exception as error:
            self._exchange({"words": _bytes((REFUSED + str(error)).encode()[:WORDS_BYTES])})
            raise
        received = self._exchange(self._pack(own))
        words = [bytes(part["words"].tolist()).rstrip(b"\0").decode(errors="replace") for part in received]
        raise_refusals(words)
        responses, reasons = self._responses(received), self._reasons(received, words)
        tables, dots = self._tables(received, reasons)
        return Collected(responses, _source({text.split("\n")[0] for text in words}),
                         torch.cat([part["coefficients"] for part in received]).cpu(), tables, dots, reasons,
                         self._norms(received))

    def _pack(self, own: Collected) -> dict[str, torch.Tensor]:
        n_responses = own.rollouts.n_responses
        longest = max(map(len, own.rollouts.members))
        distinct = list(dict.fromkeys(own.reasons.values()))[:254]
        number = {reason: i + 1 for i, reason in enumerate(distinct)}
        codes = [number.get(own.reasons[name], 255) if name in own.reasons else 0 for name in self.names]
        tables = [own.tables[name].to(self.device, self.dtype) if name in own.tables
                  else torch.zeros(n_responses, width, dtype=self.dtype, device=self.device)
                  for name, width in zip(self.names, self._widths(longest), strict=True)]
        absent = torch.tensor(ABSENT, dtype=torch.float64, device=self.device)
        none = torch.zeros(n_responses, dtype=torch.float64, device=self.device)
        words = "\n".join([own.source, *distinct]).encode()[:WORDS_BYTES]
        return {"coefficients": own.coefficients,
                "norm_sq": torch.stack([own.norm_sq.get(name, absent) for name in self.names]),
                "dots": torch.cat([none[:0], *(own.dots.get(name, none) for name in self.directed)]),
                "table": torch.cat(tables, 1), "reason": torch.tensor(codes, dtype=torch.uint8),
                "correct": own.rollouts.correct.byte(), "words": _bytes(words),
                "description": _bytes(self._description)}

    def _exchange(self, own: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """Every rank's sections, in rank order; what is missing of this one's is zero."""
        buffer = torch.zeros(self.buffer_bytes, dtype=torch.uint8, device=self.device)
        starts = dict(zip(self._sections[self.rank], _stops(self._sections[self.rank]), strict=False))
        for name, values in own.items():
            flat = values.to(self.device).contiguous().view(-1).view(torch.uint8)
            buffer[starts[name]:starts[name] + len(flat)] = flat
        received = []
        for sections, row in zip(self._sections, gather(buffer, self.group), strict=True):
            pieces = zip(sections.items(), pairwise(_stops(sections)), strict=True)
            received.append({name: row[start:stop].view(dtype).view(shape)
                             for (name, (dtype, shape)), (start, stop) in pieces})
        return received

    def _responses(self, received: list[dict[str, torch.Tensor]]) -> JoinedResponses:
        """The responses of all ranks. These trust each other's pickles, as ``all_gather_object`` does."""
        parts: list[Responses] = []
        lengths: list[int] = []
        first_on: dict[Hashable, int] = {}
        for rank, part in enumerate(received):
            ids, members, own_lengths = pickle.loads(bytes(part["description"].tolist()))
            for identity in ids:
                if first_on.setdefault(identity, rank) != rank and self.columns is None:
                    raise ValueError(f"a prompt's responses must be on one rank, or method='sketch'; prompt "
                                     f"{identity!r} has some on ranks {first_on[identity]} and {rank} (prompts of "
                                     "different ranks need different prompt_ids)")
            index = torch.empty(len(own_lengths), dtype=torch.int64)
            for prompt, own in enumerate(members):
                index[list(own)] = prompt
            parts.append(Responses(part["correct"].bool(), index.to(self.device), ids))
            lengths += own_lengths
        whole = Responses.merge(parts)
        of_prompt: list[list[int]] = [[] for _ in whole.prompt_ids]
        for response, prompt in enumerate(whole.prompt_index.tolist()):
            of_prompt[prompt].append(response)
        return JoinedResponses(whole.correct, whole.prompt_index, whole.prompt_ids,
                               torch.tensor(lengths, device=self.device), tuple(map(tuple, of_prompt)))

    def _reasons(self, received: list[dict[str, torch.Tensor]], words: list[str]) -> dict[str, str]:
        """A parameter is covered where it is on every rank: the others' gradients would be measured in part."""
        reasons = {}
        codes = [part["reason"].tolist() for part in received]
        for name, own in zip(self.names, zip(*codes, strict=True), strict=True):
            rank = next((rank for rank, code in enumerate(own) if code), None)
            if rank is not None:
                listed = dict(enumerate(words[rank].split("\n")))
                where = "" if all(own) else f" (on rank {rank})"
                reasons[name] = listed.get(own[rank], "it is not covered") + where
        if len(reasons) == len(self.names):
            raise RuntimeError(f"no parameter is covered on every rank: {reasons}")
        return reasons

    def _tables(self, received: list[dict[str, torch.Tensor]], reasons: dict[str, str]
                ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        rows = []
        widest = max(part["table"].shape[1] // len(self.names) for part in received)
        for part in received:
            if self.columns is None:  # groups of another size elsewhere
                table = part["table"].unflatten(1, (len(self.names), -1))
                rows.append(torch.nn.functional.pad(table, (0, widest - table.shape[2])).flatten(1))
            else:
                rows.append(part["table"])
        tables = torch.cat(rows).split(self._widths(widest), 1)
        dots = torch.cat([part["dots"] for part in received], 1)
        return ({name: table for name, table in zip(self.names, tables, strict=True) if name not in reasons},
                {name: row for name, row in zip(self.directed, dots, strict=True) if name not in reasons})

    def _norms(self, received: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Means over the ranks: of equal values where gradients were averaged, see ``attach.gradient_norm_sq``."""
        stacked = torch.stack([part["norm_sq"] for part in received])
        mean, there = torch.where(stacked == ABSENT, 0.0, stacked).mean(0), (stacked != ABSENT).any(0).tolist()
        return {name: value for name, value, present in zip(self.names, mean, there, strict=True) if present}

    def __repr__(self) -> str:
        return f"Ranks(rank {self.rank} of {self.size}, buffer_bytes={self.buffer_bytes})"


def _numbered(rollouts: Rollouts) -> bool:
    """Whether prompts are numbered as ``group_size`` does it: from 0, equally large, one after the other."""
    size = len(rollouts.members[0])
    return rollouts.prompt_ids == tuple(range(rollouts.n_prompts)) and all(
        members == tuple(range(prompt * size, (prompt + 1) * size)) for prompt, members in enumerate(rollouts.members))


def _bytes(text: bytes) -> torch.Tensor:
    return torch.tensor(list(text), dtype=torch.uint8)


def _stops(sections: Sections) -> list[int]:
    """0 and where each section ends, in bytes."""
    return [0, *accumulate(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in sections.values())]


def _source(kinds: set[str]) -> str:
    return kinds.pop() if len(kinds) == 1 else "mixed"

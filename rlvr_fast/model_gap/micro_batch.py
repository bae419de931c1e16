"""One forward of the model: which responses it holds and which rows of a layer belong to each of them.

Gradients of log π(o|q) flow through the prompt's positions too, so a response owns every row of its sequence, prompt
tokens and padding included (the latter carry zeros).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch

from rlvr_fast import _validate as check
from rlvr_fast.rollouts import Rollouts

Spans = list[tuple[int, int]]  # half-open row ranges, one per response


@dataclass(eq=False, repr=False)
class MicroBatch:
    """R_m responses in one forward, padded [B, T] (B = R_m) or packed [1, M].

    Attributes:
        responses: their numbers in the rollouts, in row order.
        bounds: R_m + 1 row numbers; response i of the forward owns rows ``bounds[i]:bounds[i+1]`` of its B·T or M.
        packed: whether the sequences stand in one row.
        groups: per prompt in the forward its number and the places in ``responses`` of its own, in rollout order.
        next_tokens: [B·T] or [M] int64, the token that follows each position in its sequence, -1 after the last;
            None where the forward got embeddings.
        probed: a probe backward serves this forward, its training backward is not looked at.
        captured: a backward came through it.
        calls: how often each parameter was used, by kind of layer.
        arrived: how many of these have been through the backward.
        embedding_ids: per embedding parameter the ids that were looked up.
    """

    rollouts: Rollouts
    responses: tuple[int, ...]
    bounds: tuple[int, ...]
    packed: bool
    next_tokens: torch.Tensor | None = None
    probed: bool = False
    captured: bool = False
    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    arrived: Counter[tuple[str, str]] = field(default_factory=Counter)
    embedding_ids: dict[str, list[tuple[torch.Tensor, Spans]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        place = {response: i for i, response in enumerate(self.responses)}
        self.groups = [(prompt, tuple(place[i] for i in members if i in place))
                       for prompt, members in enumerate(self.rollouts.members) if not place.keys().isdisjoint(members)]
        self._index: dict[torch.device, tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]] = {}

    @property
    def n_tokens(self) -> int:
        """Response tokens, without prompts and padding."""
        return sum(self.lengths)

    @property
    def lengths(self) -> list[int]:
        bounds = self.rollouts.bounds
        return [bounds[i + 1] - bounds[i] for i in self.responses]

    def split_prompt(self) -> int | None:
        """The first prompt of which only a part of the responses is in this forward, if there is one."""
        for prompt, places in self.groups:
            if len(places) != len(self.rollouts.members[prompt]):
                return prompt
        return None

    def index(self, device: torch.device) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        """On ``device``: the responses, per prompt its responses, per prompt their places. Copied there once."""
        if device not in self._index:
            own = [torch.tensor([self.responses[i] for i in places], device=device) for _, places in self.groups]
            places = [torch.tensor(places, device=device) for _, places in self.groups]
            self._index[device] = torch.tensor(self.responses, device=device), own, places
        return self._index[device]

    def spans(self, leading: Sequence[int]) -> Spans | None:
        """Rows of each response in a tensor with leading dimensions ``leading``, flattened; None if it cannot be said.

        Known are the layouts [B, T, ...] and [B·T], packed [1, M, ...] and [M, ...] (any number of rows per position,
        heads say), and the bare response tokens in rollout order, [N_m] or [1, N_m]. A bare [B] is not: B rows may be
        any selection of tokens, an expert's say.
        """
        leading, n_rows, total = tuple(leading), self.bounds[-1], 1
        for size in leading:
            total *= size
        n_responses = len(self.responses)
        if self.packed:
            if leading[:2] == (1, n_rows) or leading[:1] == (n_rows,):
                per_position = total // n_rows
                return [(a * per_position, b * per_position) for a, b in pairwise(self.bounds)]
        elif leading[:1] == (n_responses,) and len(leading) > 1:
            per_response = total // n_responses
            return [(i * per_response, (i + 1) * per_response) for i in range(n_responses)]
        elif leading == (n_rows,):
            return list(pairwise(self.bounds))
        if leading in ((self.n_tokens,), (1, self.n_tokens)):
            return list(pairwise((0, *accumulate(self.lengths))))
        return None


def spread_spans(spans: Spans, shape: Sequence[int], dim: int, start: int, size: int) -> Spans | None:
    """Rows of each response among those that are here, when [start, start + size) of dimension ``dim`` is.

    ``spans`` are rows of a tensor whose leading dimensions are ``shape``, flattened. None if a response's rows here
    are no range.
    """
    outer, inner = 1, 1
    for n in shape[:dim]:
        outer *= n
    for n in shape[dim + 1:]:
        inner *= n
    block = shape[dim] * inner
    if all(first % block == 0 and last % block == 0 for first, last in spans):
        return [(first // block * size * inner, last // block * size * inner) for first, last in spans]
    if outer > 1:
        return None
    low, high = start * inner, (start + size) * inner
    return [(min(max(first, low), high) - low, min(max(last, low), high) - low) for first, last in spans]


def from_forward(rollouts: Rollouts, consumed: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> MicroBatch:
    """The micro-batch of a call ``model(*args, **kwargs)`` whose responses follow the first ``consumed`` ones.

    Raises:
        ValueError: if the call's tensors do not fit the rollouts.
    """
    ids = kwargs.get("input_ids")
    tensors = [x for x in (ids, kwargs.get("inputs_embeds"), *args) if isinstance(x, torch.Tensor)]
    if not tensors or tensors[0].ndim < 2:
        raise ValueError("the model must be called with input_ids [B, T] or inputs_embeds [B, T, D] first, or inside "
                         f"probe.micro_batch(...); got {check.describe(tensors[0]) if tensors else 'no tensor'}")
    first = tensors[0]
    ids = None if first.is_floating_point() else first
    batch, width = first.shape[:2]
    cu_seqlens = kwargs.get("cu_seqlens", kwargs.get("cu_seq_lens_q"))
    bounds: tuple[int, ...] | None
    if cu_seqlens is not None:
        bounds = tuple(check.tensor("cu_seqlens", cu_seqlens, ndim=1, dtypes=check.INTEGER_DTYPES).tolist())
    else:
        bounds = packed_bounds(kwargs.get("position_ids"), kwargs.get("attention_mask"), batch, width)
    if bounds is None:
        n_responses = batch
    else:
        n_responses = len(bounds) - 1
        _check_isolation(kwargs.get("attention_mask"), bounds)
    responses = range(consumed, consumed + n_responses)
    if responses.stop > rollouts.n_responses:
        raise ValueError(f"the forwards hold {responses.stop} responses by now, rollouts has {rollouts.n_responses}")
    return make(rollouts, responses, ids, (batch, width), bounds)


def make(rollouts: Rollouts, responses: Sequence[int], ids: torch.Tensor | None, shape: tuple[int, int],
         bounds: tuple[int, ...] | None) -> MicroBatch:
    """A checked micro-batch of the given responses; ``bounds`` if they are packed, else [B, T] = ``shape``."""
    batch, width = shape
    packed = bounds is not None
    if bounds is not None:
        if batch != 1 or not bounds or bounds[0] != 0 or bounds[-1] != width or any(b < a for a, b in pairwise(bounds)):
            raise ValueError(f"cu_seqlens must never decrease and run from 0 to {width}, the width of a packed batch "
                             f"[1, {width}]; got {check.describe(bounds)} for [{batch}, {width}]")
    else:
        bounds = tuple(range(0, (batch + 1) * width, width)) if width else (0,) * (batch + 1)
    if len(bounds) - 1 != len(responses):
        raise ValueError(f"responses must name one response per sequence, got {len(responses)} for {len(bounds) - 1}")
    next_tokens = None
    if ids is not None:
        flat = ids.detach().reshape(-1).long()
        _check_tokens(rollouts, responses, flat, bounds)
        next_tokens = torch.cat([flat[1:], flat.new_full((1,), -1)])
        last = torch.tensor([b - 1 for a, b in pairwise(bounds) if b > a], device=flat.device, dtype=torch.int64)
        next_tokens = next_tokens.index_fill(0, last, -1)
    return MicroBatch(rollouts, tuple(responses), bounds, packed, next_tokens)


def packed_bounds(position_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, batch: int,
                  width: int) -> tuple[int, ...] | None:
    """Sequence borders of a packed row, where its positions restart at 0; None if they never restart.

    Padding, as a 2-D attention mask says, goes with the sequence before it (on the left, with the first).

    Raises:
        ValueError: where positions repeat or fall to anything but 0: sequences that share a prefix.
    """
    if batch != 1 or not isinstance(position_ids, torch.Tensor) or position_ids.numel() != width:
        return None
    places: Sequence[int] = range(width)
    if isinstance(attention_mask, torch.Tensor) and tuple(attention_mask.shape) == (1, width):
        places = attention_mask[0].nonzero().squeeze(1).tolist()
    positions = position_ids.reshape(-1).tolist()
    starts = []
    for earlier, later in pairwise(places):
        if positions[later] == 0:
            starts.append(later)
        elif positions[later] != positions[earlier] + 1:
            raise ValueError(f"position_ids must count up from 0 in every packed sequence, got {positions[later]} "
                             f"after {positions[earlier]} at {later}: responses that share a prefix have no gradients "
                             "of their own")
    return (0, *starts, width) if starts else None


def _check_isolation(mask: torch.Tensor | None, bounds: tuple[int, ...]) -> None:
    """Refuse a 4-D attention mask that lets one packed sequence see another."""
    if not isinstance(mask, torch.Tensor) or mask.ndim != 4:
        return
    visible = mask[0, 0] if mask.dtype == torch.bool else mask[0, 0] > -1e4
    lengths = torch.tensor(bounds, device=mask.device).diff()
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=mask.device), lengths)
    if (visible & (sequence[:, None] != sequence[None, :])).any():
        raise ValueError("attention_mask must keep packed sequences apart, got one in which a sequence sees another "
                         "(a shared prefix?): its responses have no gradients of their own")


def _check_tokens(rollouts: Rollouts, responses: Sequence[int], flat: torch.Tensor, bounds: tuple[int, ...]) -> None:
    """Every response's tokens occur, in order, in its sequence. Looked at on the CPU only."""
    if flat.device.type != "cpu":
        return
    ids = flat.tolist()
    for response, (start, stop) in zip(responses, pairwise(bounds), strict=True):
        row = iter(ids[start:stop])
        own = rollouts.tokens[rollouts.bounds[response]:rollouts.bounds[response + 1]].tolist()
        if not all(token in row for token in own):
            raise ValueError(f"rollouts do not match the batch: the {len(own)} tokens of response {response} are not "
                             f"in sequence {responses.index(response)} of the forward (rows must be responses in "
                             "rollout order; packed rows need position_ids, cu_seqlens or probe.micro_batch)")

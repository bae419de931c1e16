"""A batch of sampled responses with verifiable rewards: the one input type of every analysis.

Whatever layout a training loop holds (padded left or right, with holes, packed, labels with -100), ``Rollouts`` turns
it into one: N response tokens in a row, response after response, with ``cu_seqlens`` marking the borders. ``pack``
brings any per-token tensor of the loop (hidden states, log-probs) into the same order; ``unpack`` brings it back.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Any

import torch

from rlvr_fast import _validate as check

IGNORED_LABEL = -100


@dataclass(frozen=True, eq=False, repr=False)
class Rollouts:
    """N response tokens of R responses to P prompts. Build it with ``from_padded`` or ``from_packed``.

    These two validate everything and are the one place that synchronises host and device.

    Attributes:
        tokens: [N] int64, the sampled token ids, response after response.
        cu_seqlens: [R+1] int64, response i owns tokens ``cu_seqlens[i]:cu_seqlens[i+1]``. Empty responses are allowed.
        rewards: [R] float32, as given.
        correct: [R] bool, the verdict that splits a prompt's responses into its two classes.
        prompt_index: [R] int64 in [0, P), prompts numbered in order of first appearance.
        prompt_ids: the P distinct prompt ids as given, in that order.
        vocabulary_range: (smallest, largest) token id, (0, -1) without tokens. On the host, like the next two.
        bounds: ``cu_seqlens`` as R+1 Python ints.
        members: per prompt the tuple of its responses.
    """

    tokens: torch.Tensor
    cu_seqlens: torch.Tensor
    rewards: torch.Tensor
    correct: torch.Tensor
    prompt_index: torch.Tensor
    prompt_ids: tuple[Hashable, ...]
    vocabulary_range: tuple[int, int]
    bounds: tuple[int, ...]
    members: tuple[tuple[int, ...], ...]
    lengths: torch.Tensor = field(init=False)
    _source_index: torch.Tensor = field(kw_only=True)
    _source_shape: tuple[int, ...] = field(kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", self.cu_seqlens.diff())

    # -- construction -------------------------------------------------------------------------------------------------

    @classmethod
    def from_padded(cls, completion_ids: torch.Tensor, completion_mask: torch.Tensor | None, rewards: torch.Tensor, *,
                    group_size: int | None = None, prompt_ids: Sequence[Hashable] | torch.Tensor | None = None,
                    correct: torch.Tensor | None = None, threshold: float | None = None) -> Rollouts:
        """Rollouts from a padded batch.

        Args:
            completion_ids: [B, T] integer token ids; entries equal to -100 are never part of a response.
            completion_mask: [B, T] bool or 0/1, true on response tokens. Padding may be left, right, or in between
                (tool output). None if the -100 labels alone mark the padding.
            rewards: [B], finite. Without ``correct`` or ``threshold`` they must be 0 or 1.
            group_size: responses per prompt, for batches in which every prompt's responses stand together.
            prompt_ids: [B] ids instead, in any order and any multiplicity (tensor, or sequence of hashables).
            correct: [B] bool or 0/1, the two classes, for rewards that are not binary.
            threshold: responses with ``reward >= threshold`` are the correct ones, for rewards that are not binary.

        Raises:
            ValueError, TypeError: naming the argument, what came and what was expected.
        """
        check.tensor("completion_ids", completion_ids, ndim=2, dtypes=check.INTEGER_DTYPES)
        valid = completion_ids != IGNORED_LABEL
        if completion_mask is not None:
            check.tensor("completion_mask", completion_mask, shape=tuple(completion_ids.shape),
                         device=completion_ids.device)
            valid = valid & _as_bool("completion_mask", completion_mask)
        lengths = valid.sum(dim=1)
        return cls._build(completion_ids.reshape(-1), valid.reshape(-1), lengths, rewards, "completion_ids",
                          tuple(completion_ids.shape), group_size, prompt_ids, correct, threshold)

    @classmethod
    def from_packed(cls, tokens: torch.Tensor, cu_seqlens: torch.Tensor, rewards: torch.Tensor,
                    prompt_ids: Sequence[Hashable] | torch.Tensor | None = None, *, group_size: int | None = None,
                    correct: torch.Tensor | None = None, threshold: float | None = None) -> Rollouts:
        """Rollouts from a packed batch.

        Args:
            tokens: [M] integer token ids of all sequences in a row; entries equal to -100 (prompt tokens, say) are
                left out, so that N counts response tokens only.
            cu_seqlens: [R+1] integers, from 0 to M, never decreasing.
            rewards, prompt_ids, group_size, correct, threshold: as for ``from_padded``, with R for B.

        Raises:
            ValueError, TypeError: naming the argument, what came and what was expected.
        """
        check.tensor("tokens", tokens, ndim=1, dtypes=check.INTEGER_DTYPES)
        check.tensor("cu_seqlens", cu_seqlens, ndim=1, dtypes=check.INTEGER_DTYPES, device=tokens.device)
        bounds = cu_seqlens.tolist()
        if not bounds or bounds[0] != 0 or bounds[-1] != tokens.numel():
            ends = f"{bounds[0]} to {bounds[-1]}" if bounds else "nothing"
            raise ValueError(f"cu_seqlens must run from 0 to len(tokens) = {tokens.numel()}, got {ends}")
        if any(later < earlier for earlier, later in pairwise(bounds)):
            raise ValueError(f"cu_seqlens must never decrease, got {check.describe(bounds)}")
        valid = tokens != IGNORED_LABEL
        running = torch.cat([valid.new_zeros(1, dtype=torch.int64), valid.cumsum(0)])
        lengths = running[cu_seqlens.long()].diff()
        return cls._build(tokens, valid, lengths, rewards, "tokens", tuple(tokens.shape), group_size, prompt_ids,
                          correct, threshold)

    @classmethod
    def _build(cls, flat_tokens: torch.Tensor, valid: torch.Tensor, lengths: torch.Tensor, rewards: torch.Tensor,
               tokens_name: str, source_shape: tuple[int, ...], group_size: int | None,
               prompt_ids: Sequence[Hashable] | torch.Tensor | None, correct: torch.Tensor | None,
               threshold: float | None) -> Rollouts:
        device, n_responses = flat_tokens.device, lengths.numel()
        check.tensor("rewards", rewards, shape=(n_responses,), device=device)
        if rewards.is_complex():
            raise TypeError(f"rewards must be real numbers, got {check.describe(rewards)}")
        rewards = rewards.detach().to(torch.float32).clone()
        correct = _classes(rewards, correct, threshold)
        index, distinct = _prompts(n_responses, group_size, prompt_ids)
        members: list[list[int]] = [[] for _ in distinct]
        for response, prompt in enumerate(index):
            members[prompt].append(response)
        prompt_index = torch.tensor(index, dtype=torch.int64, device=device)

        source_index = valid.nonzero().squeeze(1)
        tokens = flat_tokens.detach()[source_index].long()
        smallest, largest = (int(tokens.min()), int(tokens.max())) if tokens.numel() else (0, -1)
        if smallest < 0:
            raise ValueError(f"{tokens_name} must be token ids >= 0 (or {IGNORED_LABEL} for padding), got {smallest}")
        cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).long()
        return cls(tokens, cu_seqlens, rewards, correct, prompt_index, distinct, (smallest, largest),
                   tuple(cu_seqlens.tolist()), tuple(map(tuple, members)),
                   _source_index=source_index, _source_shape=source_shape)

    # -- sizes --------------------------------------------------------------------------------------------------------

    @property
    def n_tokens(self) -> int:
        return self.tokens.numel()

    @property
    def n_responses(self) -> int:
        return self.rewards.numel()

    @property
    def n_prompts(self) -> int:
        return len(self.prompt_ids)

    @property
    def device(self) -> torch.device:
        return self.tokens.device

    @property
    def response_index(self) -> torch.Tensor:
        """[N] int64: the response that each token belongs to."""
        responses = torch.arange(self.n_responses, device=self.device)
        return torch.repeat_interleave(responses, self.lengths, output_size=self.n_tokens)

    # -- per-token tensors of the loop --------------------------------------------------------------------------------

    def pack(self, x: torch.Tensor, name: str = "x") -> torch.Tensor:
        """Bring a per-token tensor into rollout order: [B, T, ...] (or [M, ...] when packed) -> [N, ...].

        A tensor that already has N rows comes back as it is; where both readings fit, the batch's layout wins.
        Differentiable.
        """
        check.tensor(name, x, device=self.device)
        source = self._source_shape
        if tuple(x.shape[: len(source)]) == source:
            flat = x.flatten(0, len(source) - 1)
            return flat if flat.shape[0] == self.n_tokens else flat.index_select(0, self._source_index)
        if x.ndim >= 1 and x.shape[0] == self.n_tokens:
            return x
        wanted = ", ".join(map(str, source))
        raise ValueError(f"{name} must start with [{wanted}] (the batch's layout) or [{self.n_tokens}] "
                         f"(rollout order), got {check.describe(x)}")

    def unpack(self, x: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
        """Inverse of ``pack``: [N, ...] in rollout order -> the batch's layout, ``fill`` where there is no token."""
        check.tensor("x", x, device=self.device)
        if x.ndim < 1 or x.shape[0] != self.n_tokens:
            raise ValueError(f"x must have {self.n_tokens} rows (rollout order), got {check.describe(x)}")
        flat = x.new_full((math.prod(self._source_shape), *x.shape[1:]), fill).index_copy(0, self._source_index, x)
        return flat.reshape(*self._source_shape, *x.shape[1:])

    def to(self, device: torch.device | str) -> Rollouts:
        """The same rollouts on another device."""
        moved: dict[str, Any] = {f.name: value.to(device) for f in fields(self) if f.init
                 and isinstance(value := getattr(self, f.name), torch.Tensor)}
        return replace(self, **moved)

    def __repr__(self) -> str:
        correct = self.correct.tolist()
        shares = [sum(correct[i] for i in prompt) / len(prompt) for prompt in self.members]
        solved, failed = shares.count(1.0), shares.count(0.0)
        rate = f"{self.correct.float().mean().item():.3f}" if self.n_responses else "n/a"
        lengths = (f"{int(self.lengths.min())}..{int(self.lengths.max())}" if self.n_responses else "n/a")
        return (f"Rollouts(prompts={self.n_prompts}: {self.n_prompts - solved - failed} mixed, {solved} solved, "
                f"{failed} failed; responses={self.n_responses}, success={rate}; "
                f"tokens={self.n_tokens}, length={lengths}; device={self.device})")


def _as_bool(name: str, value: torch.Tensor) -> torch.Tensor:
    if value.dtype == torch.bool:
        return value
    if not ((value == 0) | (value == 1)).all():
        raise ValueError(f"{name} must hold only 0 and 1, got {check.describe(value)} with other values")
    return value.bool()


def _classes(rewards: torch.Tensor, correct: torch.Tensor | None, threshold: float | None) -> torch.Tensor:
    """The correct / incorrect split of the responses: [R] bool."""
    bad = ~torch.isfinite(rewards)
    if bad.any():
        where = int(bad.nonzero()[0])
        raise ValueError(f"rewards must be finite, got {rewards[where].item()} for response {where} "
                         f"({int(bad.sum())} such); drop responses that could not be scored")
    if correct is not None and threshold is not None:
        raise ValueError("correct and threshold both say which responses are correct: give one of them")
    if correct is not None:
        check.tensor("correct", correct, shape=tuple(rewards.shape), device=rewards.device)
        return _as_bool("correct", correct).clone()
    if threshold is not None:
        return rewards >= check.real("threshold", threshold)
    other = (rewards != 0) & (rewards != 1)
    if other.any():
        raise ValueError(f"rewards must be 0 or 1, got {rewards[other][0].item():g}; for other rewards say which "
                         "responses are correct with correct= or threshold=")
    return rewards == 1


def _prompts(n_responses: int, group_size: int | None, prompt_ids: Any) -> tuple[list[int], tuple[Hashable, ...]]:
    """Number the prompts in order of first appearance: (the prompt of each response, the P distinct ids)."""
    if (group_size is None) == (prompt_ids is None):
        raise ValueError("give exactly one of group_size and prompt_ids")
    if group_size is not None:
        if isinstance(group_size, bool) or not isinstance(group_size, numbers.Integral):
            raise TypeError(f"group_size must be an int, got {check.describe(group_size)}")
        if group_size < 1 or n_responses % group_size:
            raise ValueError(f"group_size must be >= 1 and divide the number of responses, "
                             f"got {group_size} for {n_responses} responses")
        return [i // group_size for i in range(n_responses)], tuple(range(n_responses // group_size))
    if isinstance(prompt_ids, torch.Tensor):
        check.tensor("prompt_ids", prompt_ids, shape=(n_responses,), dtypes=(*check.INTEGER_DTYPES, torch.bool))
    if isinstance(prompt_ids, str | bytes) or not (isinstance(prompt_ids, Sequence) or hasattr(prompt_ids, "tolist")):
        raise TypeError(f"prompt_ids must be a tensor or a sequence of ids, got {check.describe(prompt_ids)}")
    ids = prompt_ids.tolist() if hasattr(prompt_ids, "tolist") else list(prompt_ids)
    if len(ids) != n_responses:
        raise ValueError(f"prompt_ids must have one id per response, got {len(ids)} for {n_responses} responses")
    numbering: dict[Hashable, int] = {}
    try:
        index = [numbering.setdefault(identity, len(numbering)) for identity in ids]
    except TypeError:
        raise TypeError(f"prompt_ids must be hashable, got {check.describe(ids)}") from None
    return index, tuple(numbering)

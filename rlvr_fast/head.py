"""The language-model head as an argument bundle: how hidden states become log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlvr_fast import _validate as check
from rlvr_fast.backends.base import Merge
from rlvr_fast.vocabulary_parallel import ShardMerge, VocabularyShard


@dataclass(frozen=True, eq=False)
class Head:
    """raw = hidden @ weight.T + bias;  z = softcap * tanh(raw / softcap) / temperature;  p = softmax(z).

    Attributes:
        weight: [V, D] float32, bfloat16 or float16.
        bias: [V] float or None. Minus infinity takes a token out of the vocabulary.
        temperature: divides the logits; positive.
        softcap: bound of the soft-capped logits (Gemma 2: 30), or None.
        shard: which rows of the vocabulary ``weight`` and ``bias`` hold; None if all.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    temperature: float = 1.0
    softcap: float | None = None
    shard: VocabularyShard | None = None

    @property
    def vocabulary_size(self) -> int:
        """Rows that are here."""
        return self.weight.shape[0]

    @property
    def whole_vocabulary_size(self) -> int:
        """Rows in all: token ids are below it."""
        return self.vocabulary_size if self.shard is None else self.shard.size

    @property
    def hidden_size(self) -> int:
        return self.weight.shape[1]

    @classmethod
    def checked(cls, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, temperature: float,
                softcap: float | None, shard: VocabularyShard | None = None) -> Head:
        """Validate ``hidden`` [N, D] against the head's arguments and bundle the latter."""
        check.tensor("hidden", hidden, ndim=2, dtypes=check.FLOAT_DTYPES)
        check.tensor("weight", weight, ndim=2, dtypes=check.FLOAT_DTYPES, device=hidden.device)
        if weight.dtype != hidden.dtype:
            raise TypeError(f"hidden and weight must have one dtype, got {hidden.dtype} and {weight.dtype}")
        if weight.shape[0] == 0 or weight.shape[1] == 0:
            raise ValueError(f"weight must be [V, D] with V, D >= 1, got {check.describe(weight)}")
        if weight.shape[1] != hidden.shape[1]:
            raise ValueError(f"weight must be [V, D] with D = {hidden.shape[1]} as in hidden, "
                             f"got {check.describe(weight)}")
        if shard is not None:
            shard.check_rows(weight)
        if bias is not None:
            check.tensor("bias", bias, shape=(weight.shape[0],), dtypes=check.FLOAT_DTYPES, device=hidden.device)
        temperature = check.positive("temperature", temperature)
        softcap = None if softcap is None else check.positive("softcap", softcap)
        return cls(weight, bias, temperature, softcap, shard)

    def local_ids(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids as rows of ``weight``; -1 where the row is on another rank."""
        return tokens if self.shard is None else self.shard.local_ids(tokens)

    @property
    def merge(self) -> Merge | None:
        """What makes whole the passes over the rows that are here; None if they are."""
        return None if self.shard is None else ShardMerge(self.shard, self.temperature, self.softcap)

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, in place of this rank's share."""
        return values if self.shard is None else self.shard.sum(values)


def check_values(hidden: torch.Tensor) -> None:
    """Raise if ``hidden`` on the CPU is not finite; an accelerator is not asked, that would synchronise."""
    if hidden.device.type == "cpu" and not torch.isfinite(hidden).all():
        raise ValueError(f"hidden must be finite, got {check.describe(hidden)} with NaN or infinite entries")


def check_shapes_of_tokens(tokens: torch.Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Token ids of the wanted shape and an integer dtype; looks at no value."""
    check.tensor("tokens", tokens, shape=tuple(shape), dtypes=check.INTEGER_DTYPES, device=device)


def check_tokens(tokens: torch.Tensor, n_tokens: int, vocabulary_size: int, device: torch.device) -> torch.Tensor:
    """[N] token ids inside the vocabulary, as contiguous int64.

    On the CPU a bad id raises ValueError; on an accelerator it fails an asynchronous device assertion, because looking
    at the ids would synchronise.
    """
    check_shapes_of_tokens(tokens, (n_tokens,), device)
    tokens = tokens.detach().long().contiguous()
    outside = (tokens < 0) | (tokens >= vocabulary_size)
    if device.type == "cpu":
        if outside.any():
            where = int(outside.nonzero()[0])
            raise ValueError(f"tokens must be in [0, V) with V = {vocabulary_size}, "
                             f"got {int(tokens[where])} at position {where}")
    elif n_tokens:
        torch._assert_async(~outside.any(), f"tokens must be in [0, V) with V = {vocabulary_size}")
    return tokens

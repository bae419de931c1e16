"""Where sequences begin in a packed micro-batch, however a framework says it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch

from rlvr_fast import _validate as check

PerToken = torch.Tensor | Sequence[torch.Tensor]


def is_list_of_sequences(value: Any) -> bool:
    return isinstance(value, Sequence) and len(value) > 0 and all(
        isinstance(part, torch.Tensor) and part.ndim == 1 for part in value)


def is_per_token(value: Any, mask: PerToken) -> bool:
    """Rather than one entry per sequence."""
    if isinstance(value, torch.Tensor) and isinstance(mask, torch.Tensor):
        return value.shape == mask.shape
    return is_list_of_sequences(value)


def flat(name: str, value: PerToken, mask: PerToken) -> torch.Tensor:
    """[N], if its layout is that of ``mask``."""
    if isinstance(mask, torch.Tensor):
        return check.tensor(name, value, shape=tuple(mask.shape), device=mask.device).reshape(-1)
    if not is_list_of_sequences(value):
        raise TypeError(f"{name} must be a list of one 1-D tensor per sequence (or mask one tensor, too), "
                        f"got {check.describe(value)}")
    lengths, wanted = [len(part) for part in value], [len(part) for part in mask]
    if lengths != wanted:
        raise ValueError(f"{name} must have the lengths of mask, {wanted}, got {lengths}")
    return torch.cat(list(value))


def borders(mask: PerToken, n: int, given: dict[str, Any]) -> list[int]:
    """Where sequences begin, and where the last one ends.

    Args:
        n: tokens of ``mask``.
        given: seq_lens, cu_seqlens, position_ids and document_ids of ``packed.update``, one or none of them not None.
    """
    names = [name for name, value in given.items() if value is not None]
    if len(names) != isinstance(mask, torch.Tensor):
        raise ValueError(f"give one of {', '.join(given)} where mask is a tensor and none where it is a list of "
                         f"sequences, got {' and '.join(names) or 'none'} and a {type(mask).__name__}")
    if not names:
        return [0, *accumulate(len(part) for part in mask)]
    name, value = names[0], given[names[0]]
    if name in ("position_ids", "document_ids"):
        if flat(name, value, mask).numel() == 0:
            return [0]
        table = value.reshape(-1, value.shape[-1])
        begins = table == 0 if name == "position_ids" else table != table.roll(1, 1)
        if name == "position_ids" and not bool(begins[:, 0].all()):
            raise ValueError("position_ids must begin at 0 in every row: this one goes on with a sequence of another "
                             "micro-batch (or lost its first token, which document_ids do not mind)")
        begins[:, 0] = True
        return [*begins.reshape(-1).nonzero().squeeze(1).tolist(), n]
    cuts = [int(cut) for cut in (value.tolist() if isinstance(value, torch.Tensor) else value)]
    cuts = [0, *accumulate(cuts)] if name == "seq_lens" else cuts
    if cuts[:1] != [0] or cuts[-1] > n or any(later < earlier for earlier, later in pairwise(cuts)):
        raise ValueError(f"{name} must cut the {n} tokens of mask into sequences, got {check.describe(value)}")
    return cuts

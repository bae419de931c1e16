"""Packed micro-batches, as prime-rl 0.8.0, open-instruct and slime train on: many sequences in one row.

Per-token tensors lie one sequence after the other, and something says where each begins. ``update`` makes them rows of
a GapMonitor, one per response. Where prompts are not known, the monitor's ``group_size`` and ``estimator`` recover
class and success rate from advantages.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from rlvr_fast import _validate as check
from rlvr_fast.integrations import packed_layout as layout
from rlvr_fast.integrations.packed_layout import PerToken
from rlvr_fast.monitor import GapMonitor


@torch.no_grad()
def update(monitor: GapMonitor, *, mask: PerToken, seq_lens: Sequence[int] | torch.Tensor | None = None,
           cu_seqlens: Sequence[int] | torch.Tensor | None = None, position_ids: torch.Tensor | None = None,
           document_ids: torch.Tensor | None = None, logp: PerToken | None = None, old_logp: PerToken | None = None,
           sum_p_sq: PerToken | None = None, entropy: PerToken | None = None,
           advantages: PerToken | Sequence[float] | None = None, rewards: PerToken | Sequence[float] | None = None,
           prompt_ids: PerToken | Sequence[Hashable] | None = None) -> int:
    """Give ``monitor`` the responses of a packed micro-batch.

    The loss tokens of a sequence are one response; holes in between (a tool's output) are no part of it. A sequence
    without loss tokens, padding for one, is left out if advantages, rewards or prompt_ids are per token, for its own
    cannot be read then; else it is a response of length 0.

    A response that is spread over two micro-batches would count as two: join its parts first. Of positions that do not
    begin at 0, and with ``group_size`` of prompts with too many responses, this is noticed and refused.

    Synchronises host and device, in the windows that are measured.

    Args:
        mask: not 0 on loss tokens. One tensor of any shape ([N], [1, N], or [B, T] with one pack per row), or a list of
            one 1-D tensor per sequence. Per-token arguments have the same layout, each entry beside its own token.
        seq_lens, cu_seqlens, position_ids, document_ids: one of them where ``mask`` is no list. Lengths or borders of
            the sequences, behind whose last one is padding; positions, 0 where a sequence begins; or numbers that
            change from sequence to sequence (open-instruct's attention_masks). The latter two are per token.
        logp, old_logp, sum_p_sq, entropy: per token, anything outside of the mask; see ``GapMonitor.update``.
        advantages, rewards, prompt_ids: per token, the same on all loss tokens of a response, or one per sequence.

    Returns:
        The number of responses; 0 in a window that is not measured.

    Raises:
        ValueError, TypeError: naming the argument; the monitor is unchanged then.
    """
    if not monitor.due:
        return 0
    loss_tokens = layout.flat("mask", mask, mask) != 0
    with monitor.timed(loss_tokens.device):
        borders = layout.borders(mask, len(loss_tokens), {
            "seq_lens": seq_lens, "cu_seqlens": cu_seqlens, "position_ids": position_ids, "document_ids": document_ids})
        seen = torch.cat([loss_tokens.new_zeros(1, dtype=torch.int64), loss_tokens.cumsum(0)])
        counts = seen[torch.tensor([*borders, len(loss_tokens)], device=seen.device)].diff().tolist()
        if counts.pop():
            raise ValueError(f"mask must be 0 behind the sequences, which have {borders[-1]} tokens")
        given: dict[str, Any] = {name: value for name, value in (("advantages", advantages), ("rewards", rewards),
                                                                 ("prompt_ids", prompt_ids)) if value is not None}
        per_token = {name for name, value in given.items() if layout.is_per_token(value, mask)}
        kept = [i for i, count in enumerate(counts) if count or not per_token]
        if not kept:
            return 0

        def rows(name: str, value: PerToken) -> torch.Tensor:
            tokens = layout.flat(name, value, mask)
            return pad_sequence([tokens[borders[i]:borders[i + 1]] for i in kept], batch_first=True)

        own = rows("mask", mask) != 0
        data: dict[str, Any] = {name: rows(name, value) for name, value in (
            ("logp", logp), ("old_logp", old_logp), ("sum_p_sq", sum_p_sq), ("entropy", entropy)) if value is not None}
        for name, value in given.items():
            data[name] = (_of_response(name, rows(name, value), own) if name in per_token
                          else _entries(name, value, kept, len(counts), own.device))
        monitor.update(mask=own, **data)
    return len(kept)


def _of_response(name: str, rows: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """[R]: what all loss tokens of a response agree upon."""
    value = rows.gather(1, own.int().argmax(1, keepdim=True))
    same = torch.isclose(rows, value, rtol=1e-4, atol=0, equal_nan=True) if rows.is_floating_point() else rows == value
    if not bool((same | ~own).all()):
        raise ValueError(f"{name} must be the same on all loss tokens of a response, as those of one outcome are (no "
                         "critic, no penalty per token), or have one entry per sequence")
    return value.squeeze(1)


def _entries(name: str, value: Any, kept: list[int], n: int, device: torch.device) -> Any:
    """Those of the kept sequences."""
    if not hasattr(value, "__len__") or len(value) != n or (isinstance(value, torch.Tensor) and value.ndim != 1):
        raise ValueError(f"{name} must be laid out like mask or have one entry for each of the {n} sequences, those of "
                         f"padding included, got {check.describe(value)}")
    if isinstance(value, torch.Tensor):
        return value[torch.tensor(kept, device=value.device)]
    chosen = [value[i] for i in kept]
    return chosen if name == "prompt_ids" else torch.tensor(chosen, dtype=torch.float64, device=device)

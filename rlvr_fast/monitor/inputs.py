"""What one update brings, checked and turned into one row of numbers per response. Nothing here synchronises."""

from __future__ import annotations

import hashlib
import numbers
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from rlvr_fast import _validate as check
from rlvr_fast.kappa import PROPORTIONAL, RECOVERABLE, recover_from_advantages
from rlvr_fast.rollouts import Rollouts
from rlvr_fast.segments import Segments
from rlvr_fast.token_stats import token_stats_from_logprobs

FLOATS = (*check.FLOAT_DTYPES, torch.float64)
UNKNOWN = -1.0
"""A verdict or success rate that was asked for and does not exist: an unscored response, a group of one class seen
through its advantages."""

LOG_RATIO_CAP = 80.0  # beyond e^80 nothing but the absence of overflow matters

COLUMNS = ("identified", "scored", "correct", "success_rate", "mixed", "advantage", "length", "logp", "log_ratio",
           "divergence", "collision", "score_sq", "energy", "entropy", "sharpening")
"""Columns of the response table. ``identified`` and ``scored`` are flags: prompt ids were given; verdicts come from
rewards. The token columns are sums over the response's tokens."""


@dataclass(frozen=True)
class Settings:
    """What a monitor was told about the training loop; see ``GapMonitor``."""

    level: str
    length_norm: bool
    threshold: float | None
    group_size: int | None
    estimator: str
    eps: float | None
    temperature: float
    softcap: float | None


@dataclass(frozen=True, eq=False)
class ResponseRows:
    """A table of responses.

    Attributes:
        keys: [R] int64, the prompt of each; zeros where ids were not given. On whatever device the ids were on.
        cells: [R, 1 + len(COLUMNS)] float64; the first column is the bit mask of the columns that were given.
    """

    keys: torch.Tensor
    cells: torch.Tensor

    @classmethod
    def none(cls) -> ResponseRows:
        return cls(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 1 + len(COLUMNS), dtype=torch.float64))

    @classmethod
    def of(cls, keys: torch.Tensor, columns: dict[str, torch.Tensor]) -> ResponseRows:
        some = next(iter(columns.values()))
        zero = torch.zeros_like(some)
        given = sum(1 << i for i, name in enumerate(COLUMNS) if name in columns)
        return cls(keys, torch.stack([zero + given, *(columns.get(name, zero) for name in COLUMNS)], 1))


def response_rows(*, rollouts: Rollouts | None, prompt_ids: Any, rewards: torch.Tensor | None,
                  correct: torch.Tensor | None, success_rate: torch.Tensor | None, advantages: torch.Tensor | None,
                  mask: torch.Tensor | None, logp: torch.Tensor | None, old_logp: torch.Tensor | None,
                  sum_p_sq: torch.Tensor | None, entropy: torch.Tensor | None, settings: Settings) -> ResponseRows:
    """The rows of one update; its arguments are those of ``GapMonitor.update``."""
    n, device = _size(rollouts, rewards=rewards, correct=correct, advantages=advantages, mask=mask)
    row = _Row(n, device)
    columns: dict[str, torch.Tensor] = {}
    if advantages is not None:
        columns["advantage"] = row("advantages", advantages)
    verdict, scored = _verdicts(row, rollouts, rewards, correct, columns.get("advantage"), settings)
    columns["correct"] = verdict
    if scored:
        columns["scored"] = torch.ones_like(verdict)
    identified = rollouts is not None or prompt_ids is not None
    if success_rate is not None:
        rate = row("success_rate", success_rate, nan=True)
        if device.type == "cpu" and not (((rate >= 0) & (rate <= 1)) | rate.isnan()).all():
            raise ValueError(f"success_rate must be in [0, 1], got {check.describe(success_rate)} with values outside")
        mixed = ((rate > 0) & (rate < 1)).double()
        columns |= {name: torch.where(rate.isnan(), UNKNOWN, values)
                    for name, values in (("success_rate", rate), ("mixed", mixed))}
    elif advantages is not None and not (scored and identified):
        columns |= _groups_behind(advantages.detach(), verdict, scored, settings)
    keys = torch.zeros(n, dtype=torch.int64)
    if identified:
        if rollouts is not None and prompt_ids is not None:
            raise ValueError("prompt_ids must be left out where rollouts are given, which have their own")
        keys = rollout_keys(rollouts) if rollouts is not None else prompt_keys(prompt_ids, n)
        columns["identified"] = torch.ones_like(verdict)
    columns |= _token_columns(rollouts, mask, row, settings.length_norm, logp, old_logp, sum_p_sq, entropy)
    return ResponseRows.of(keys, columns)


def _size(rollouts: Rollouts | None, **candidates: torch.Tensor | None) -> tuple[int, torch.device]:
    """How many responses, and on which device."""
    if rollouts is not None:
        if not isinstance(rollouts, Rollouts):
            raise TypeError(f"rollouts must be rlvr_fast.Rollouts, got {type(rollouts).__name__}")
        return rollouts.n_responses, rollouts.device
    if all(candidates[name] is None for name in ("rewards", "correct", "advantages")):
        raise ValueError("update needs rollouts, rewards, correct or advantages: without one of them nothing says "
                         "which responses are correct")
    name, first = next((name, value) for name, value in candidates.items() if value is not None)
    check.tensor(name, first)
    if first.ndim == 0:
        raise ValueError(f"{name} must have one entry per response, got {check.describe(first)}")
    return first.shape[0], first.device


@dataclass(frozen=True)
class _Row:
    """Checks of a tensor with one number per response."""

    n: int
    device: torch.device

    def __call__(self, name: str, value: Any, *, nan: bool = False) -> torch.Tensor:
        check.tensor(name, value, shape=(self.n,), device=self.device)
        if value.is_complex():
            raise TypeError(f"{name} must hold real numbers, got {check.describe(value)}")
        value = value.detach().double()
        fine = value.isfinite() | value.isnan() if nan else value.isfinite()
        if self.device.type == "cpu" and not fine.all():
            raise ValueError(f"{name} must be finite, got {check.describe(value)} with other values")
        return value


def _verdicts(row: _Row, rollouts: Rollouts | None, rewards: torch.Tensor | None, correct: torch.Tensor | None,
              advantage: torch.Tensor | None, settings: Settings) -> tuple[torch.Tensor, bool]:
    """([R] 1, 0 or UNKNOWN, whether they come from rewards)."""
    given = [name for name, value in (("rollouts", rollouts), ("correct", correct), ("rewards", rewards))
             if value is not None]
    if len(given) > 1:
        raise ValueError(f"give one of rollouts, correct and rewards, each of which says which responses are correct; "
                         f"got {' and '.join(given)}")
    if rollouts is not None:
        return rollouts.correct.double(), True
    if correct is not None:
        return _binary("correct", row("correct", correct)), True
    if rewards is None:
        if settings.estimator not in PROPORTIONAL:
            raise ValueError("rewards or correct must be given beside advantages of estimator "
                             f"{settings.estimator!r}, whose sign is not the verdict")
        assert advantage is not None  # one of the four was given
        return torch.where(advantage == 0, UNKNOWN, (advantage > 0).double()), False
    rewards = row("rewards", rewards, nan=True)  # NaN marks a response that could not be scored
    if settings.threshold is None:
        return torch.where(rewards.isnan(), UNKNOWN, _binary("rewards", rewards)), True
    return torch.where(rewards.isnan(), UNKNOWN, (rewards >= settings.threshold).double()), True


def _groups_behind(advantages: torch.Tensor, verdict: torch.Tensor, scored: bool, settings: Settings
                   ) -> dict[str, torch.Tensor]:
    """What advantages say about the groups that normalised them: a zero is a group of one class."""
    if settings.estimator not in PROPORTIONAL:
        return {}
    mixed = (advantages != 0).double()
    columns = {"mixed": torch.where(verdict == UNKNOWN, UNKNOWN, mixed) if scored else mixed}
    if settings.group_size is not None and settings.threshold is None and settings.estimator in RECOVERABLE:
        found = recover_from_advantages(advantages, settings.group_size, settings.estimator, eps=settings.eps)
        one_class = verdict if scored else torch.full_like(verdict, UNKNOWN)
        columns["success_rate"] = torch.where(found.mixed, found.success_rate.double(), one_class)
    return columns


def _binary(name: str, values: torch.Tensor) -> torch.Tensor:
    """``values`` if they are 0, 1 or NaN; those of a device are looked at in ``compute``."""
    if values.device.type == "cpu" and not ((values == 0) | (values == 1) | values.isnan()).all():
        hint = "; for other rewards give the monitor a threshold" if name == "rewards" else ""
        raise ValueError(f"{name} must be 0 or 1, got {check.describe(values)} with other values{hint}")
    return values


# -- prompt ids -------------------------------------------------------------------------------------------------------


def prompt_keys(prompt_ids: Any, n: int) -> torch.Tensor:
    """[R] int64: integers as they are, on their device; everything else by a hash that all processes share."""
    if isinstance(prompt_ids, torch.Tensor):
        return check.tensor("prompt_ids", prompt_ids, shape=(n,), dtypes=check.INTEGER_DTYPES).detach().long()
    if isinstance(prompt_ids, str | bytes) or not (isinstance(prompt_ids, Sequence) or hasattr(prompt_ids, "tolist")):
        raise TypeError(f"prompt_ids must be a tensor or a sequence of ids, got {check.describe(prompt_ids)}")
    ids = prompt_ids.tolist() if hasattr(prompt_ids, "tolist") else list(prompt_ids)
    if len(ids) != n:
        raise ValueError(f"prompt_ids must have one id per response, got {len(ids)} for {n} responses")
    return torch.tensor([_key(identity) for identity in ids], dtype=torch.int64)


def rollout_keys(rollouts: Rollouts) -> torch.Tensor:
    """[R] int64 on the host."""
    keys = torch.empty(rollouts.n_responses, dtype=torch.int64)
    for identity, members in zip(rollouts.prompt_ids, rollouts.members, strict=True):
        keys[list(members)] = _key(identity)
    return keys


def _key(identity: Hashable) -> int:
    if isinstance(identity, numbers.Integral) and -(1 << 63) <= identity < 1 << 63:
        return int(identity)
    if not isinstance(identity, str | bytes | tuple | numbers.Integral):
        raise TypeError(f"prompt_ids must be integers, strings, bytes or tuples of these, which every process names "
                        f"alike; got {check.describe(identity)}")
    return int.from_bytes(hashlib.blake2b(repr(identity).encode(), digest_size=8).digest(), "little", signed=True)


# -- tokens -----------------------------------------------------------------------------------------------------------


class _Tokens:
    """Where the response tokens are in the caller's per-token tensors, and sums over each response's."""

    def __init__(self, rollouts: Rollouts | None, mask: torch.Tensor | None, row: _Row) -> None:
        self.rollouts, self.device = rollouts, row.device
        if rollouts is not None:
            self.lengths = rollouts.lengths.double()
            return
        mask = check.tensor("mask", mask, shape=(row.n, None), device=row.device)
        if mask.device.type == "cpu" and not ((mask == 0) | (mask == 1)).all():
            raise ValueError(f"mask must hold only 0 and 1, got {check.describe(mask)} with other values")
        self.inside = mask.detach() != 0
        self.lengths = self.inside.sum(1).double()

    def read(self, name: str, values: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
        """The response tokens' values as float64, ``fill`` at all others."""
        check.tensor(name, values, dtypes=FLOATS, device=self.device)
        if self.rollouts is not None:
            values = self.rollouts.pack(values, name).detach().double()
            if values.ndim != 1:
                raise ValueError(f"{name} must have one number per token, got {check.describe(values)}")
        else:
            check.tensor(name, values, shape=tuple(self.inside.shape))
            values = torch.where(self.inside, values.detach().double(), fill)
        if self.device.type == "cpu" and not values.isfinite().all():
            raise ValueError(f"{name} must be finite on the response tokens, got {check.describe(values)} "
                             "with other values")
        return values

    @cached_property
    def _segments(self) -> Segments | None:
        """Each response's tokens in a packed tensor; None where every response has a row."""
        return None if self.rollouts is None else Segments.of(self.rollouts.response_index, self.rollouts.n_responses)

    def total(self, values: torch.Tensor) -> torch.Tensor:
        return values.sum(1) if self._segments is None else self._segments.sum(values)


def _token_columns(rollouts: Rollouts | None, mask: torch.Tensor | None, row: _Row, length_norm: bool,
                   logp: torch.Tensor | None, old_logp: torch.Tensor | None, sum_p_sq: torch.Tensor | None,
                   entropy: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """What follows from the given per-token tensors."""
    for name, value in (("old_logp", old_logp), ("sum_p_sq", sum_p_sq), ("entropy", entropy)):
        if value is not None and logp is None:
            raise ValueError(f"{name} needs logp beside it")
    if rollouts is not None and mask is not None:
        raise ValueError("mask must be left out where rollouts are given, which know their tokens")
    if rollouts is None and mask is None:
        if logp is not None:
            raise ValueError("logp needs rollouts or a mask beside it, which say where the response tokens are")
        return {}
    tokens = _Tokens(rollouts, mask, row)
    columns = {"length": tokens.lengths}
    if logp is None:
        return columns
    own = tokens.read("logp", logp)
    columns["logp"] = tokens.total(own)
    if old_logp is not None:
        change = own - tokens.read("old_logp", old_logp)
        columns["log_ratio"] = tokens.total(change)
        columns["divergence"] = tokens.total(torch.expm1(change.clamp(max=LOG_RATIO_CAP)) - change)
    if sum_p_sq is not None:
        columns["collision"] = tokens.total(tokens.read("sum_p_sq", sum_p_sq))
        filled = tokens.read("sum_p_sq", sum_p_sq, fill=1.0)
        stats = token_stats_from_logprobs(own.flatten(), filled.flatten())
        columns["score_sq"] = score_sq = tokens.total(stats.score_sq.double().view_as(own))
        columns["energy"] = score_sq / tokens.lengths.clamp(min=1).square() if length_norm else score_sq
    if entropy is not None:
        columns["entropy"] = tokens.total(tokens.read("entropy", entropy))
        columns["sharpening"] = columns["logp"] + columns["entropy"]
    return columns

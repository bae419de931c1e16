"""Calls that one rank of a group gets wrong, and what every rank must raise. Needs no pytest: ranks import it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from vocabulary_problems import GAP_VOCABULARY, GAP_WIDTH, exact_problem, rollouts_of, rows, shard_of

import rlvr_fast as rf


@dataclass(frozen=True)
class Refusal:
    """A call that rank ``at_fault`` (None: every rank) gets wrong, its error there, and what every rank's says."""

    call: Callable[[bool], object]  # given whether this rank is the one at fault
    at_fault: int | None
    kind: str
    message: str


def _stats(wrong: bool, **changes) -> None:
    hidden, weight, tokens = exact_problem()
    shard = shard_of("even", 33)
    arguments = {"hidden": hidden, "weight": weight[shard.first:shard.stop], "tokens": tokens, "vocabulary": shard}
    rf.token_stats(**(arguments | changes if wrong else arguments))


def _gap(wrong: bool, **changes) -> None:
    hidden, weight, options, rollouts = rollouts_of()
    shard = shard_of("even", GAP_VOCABULARY)
    weight, options["bias"] = rows(shard, weight, options["bias"])
    arguments = {"hidden": hidden, "weight": weight, "rollouts": rollouts, "vocabulary": shard, **options}
    rf.gradient_gap(**(arguments | changes if wrong else arguments))


def _logprob(wrong: bool, **changes) -> None:
    hidden, weight, tokens = exact_problem()
    shard = shard_of("even", 33)
    arguments = {"hidden": hidden, "weight": weight[shard.first:shard.stop], "tokens": tokens, "vocabulary": shard}
    rf.linear_logprob(**(arguments | changes if wrong else arguments))


def _masked(wrong: bool) -> None:
    hidden, weight, tokens = exact_problem()
    shard = shard_of("even", 33)
    bias = torch.zeros(shard.rows)
    if wrong:
        bias[-1] = -torch.inf
    rf.token_stats(hidden, weight[shard.first:shard.stop], tokens * 0 + shard.largest - 1, bias=bias, vocabulary=shard)


def _shifted(wrong: bool, by: int) -> None:
    size, rank, ranks = 30, dist.get_rank(), dist.get_world_size()
    rf.VocabularyShard(size // ranks * rank + (by if wrong else 0), size // ranks, size)


HIDDEN, WEIGHT, TOKENS = exact_problem()
NAN_HIDDEN = HIDDEN.clone()
NAN_HIDDEN[2] = torch.nan
REFUSALS = {
    "overlapping shards": Refusal(lambda wrong: _shifted(wrong, -1), 1, "ValueError", "without hole or overlap"),
    "a hole": Refusal(lambda wrong: rf.VocabularyShard(0 if dist.get_rank() == 0 else 8, 7, 15) if dist.get_rank() < 2
                      else rf.VocabularyShard(8, 7, 15), None, "ValueError", "without hole or overlap"),
    "rows that end early": Refusal(lambda wrong: rf.VocabularyShard(dist.get_rank(), 1, dist.get_world_size() + 1),
                                   None, "ValueError", "must tile the vocabulary"),
    "sizes that differ": Refusal(lambda wrong: rf.VocabularyShard(dist.get_rank(), 1, 9 if wrong else 8), 0,
                                 "ValueError", "must tile the vocabulary"),
    "a rank without rows": Refusal(lambda wrong: rf.VocabularyShard.even(1), None, "ValueError", "first, rows"),
    "rows beyond the end": Refusal(lambda wrong: _shifted(wrong, 16), 1, "ValueError", "first, rows"),
    "no integers": Refusal(lambda wrong: rf.VocabularyShard("0" if wrong else 0, 1, 2), 0, "TypeError", "first, rows"),
    "size no integer": Refusal(lambda wrong: rf.VocabularyShard.even(33.0), None, "TypeError", "first, rows"),
    "no group": Refusal(lambda wrong: rf.VocabularyShard(0, 3, 3, "tp"), None, "TypeError", "group must be"),
    "weight of other rows": Refusal(lambda wrong: _stats(wrong, weight=WEIGHT[:3]), 1, "ValueError",
                                    "weight must hold the"),
    "whole weight": Refusal(lambda wrong: _stats(wrong, weight=WEIGHT), 0, "ValueError", "weight must hold the"),
    "token outside": Refusal(lambda wrong: _stats(wrong, tokens=TOKENS + 8), 1, "ValueError",
                             "tokens must be in [0, V) with V = 33"),
    "label": Refusal(lambda wrong: _stats(True, tokens=TOKENS - 100), None, "ValueError",
                     "tokens must be in [0, V) with V = 33"),
    "hidden NaN": Refusal(lambda wrong: _stats(wrong, hidden=NAN_HIDDEN), 0, "ValueError", "hidden must be finite"),
    "fewer tokens": Refusal(lambda wrong: _stats(wrong, hidden=HIDDEN[:4], tokens=TOKENS[:4]), 1, "ValueError",
                            "every rank must make the same call"),
    "other tokens": Refusal(lambda wrong: _stats(wrong, tokens=TOKENS.flip(0)), 1, "ValueError",
                            "every rank must make the same call"),
    "other temperature": Refusal(lambda wrong: _stats(wrong, temperature=0.5), 0, "ValueError",
                                 "every rank must make the same call"),
    "hidden_grad on one rank": Refusal(lambda wrong: _stats(wrong, hidden_grad=True), 0, "ValueError",
                                       "every rank must make the same call"),
    "backend unknown": Refusal(lambda wrong: _stats(wrong, backend="cuda"), 1, "ValueError", "backend must be one of"),
    "weight NaN": Refusal(lambda wrong: _stats(wrong, weight=WEIGHT[:shard_rows()] * torch.nan), 1, "ValueError",
                          "weight and bias must give finite logits"),
    "sampled token masked": Refusal(_masked, 0, "ValueError", "every sampled token a probability above 0"),
    "gap: level": Refusal(lambda wrong: _gap(wrong, level="model"), 0, "ValueError", "level must be one of"),
    "gap: levels that differ": Refusal(lambda wrong: _gap(wrong, level="head"), 1, "ValueError",
                                       "every rank must make the same call"),
    "gap: weight of other rows": Refusal(lambda wrong: _gap(wrong, weight=torch.ones(3, GAP_WIDTH)), 1, "ValueError",
                                         "weight must hold the"),
    "gap: no rollouts": Refusal(lambda wrong: _gap(wrong, rollouts=None), 0, "TypeError", "rollouts must be"),
    "logprob: weight of other rows": Refusal(lambda wrong: _logprob(wrong, weight=WEIGHT[:3]), 0, "ValueError",
                                             "weight must hold the"),
    "logprob: dtype": Refusal(lambda wrong: _logprob(wrong, hidden=HIDDEN.double()), 1, "TypeError",
                              "hidden must have dtype"),
    "logprob: token outside": Refusal(lambda wrong: _logprob(wrong, tokens=TOKENS + 8), 1, "ValueError",
                                      "tokens must be in [0, V) with V = 33"),
    "logprob: other softcap": Refusal(lambda wrong: _logprob(wrong, softcap=9.0), 1, "ValueError",
                                      "every rank must make the same call"),
}


def shard_rows() -> int:
    return rf.VocabularyShard.even(33).rows


def refused(case: Refusal) -> tuple[str, str]:
    try:
        case.call(case.at_fault in (dist.get_rank(), None))
    except (ValueError, TypeError) as error:
        return type(error).__name__, str(error)
    return "nothing", ""

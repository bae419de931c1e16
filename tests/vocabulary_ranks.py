"""What the ranks of a process group run for test_vocabulary_parallel: every scenario once, its answers kept on disk.

Needs no pytest: the spawned processes import it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import gloo_ranks
import torch
import torch.distributed as dist
from policies import HeadProblem
from vocabulary_problems import (
    GAP_VOCABULARY,
    PROBLEMS,
    SPLITS,
    direction_of,
    exact_problem,
    rollouts_of,
    rows,
    shard_of,
)
from vocabulary_refusals import REFUSALS, refused

import rlvr_fast as rf

BACKENDS = ("torch", "native")
GAP_LEVELS = ("logits", "hidden", "head")
WORLDS = (3, 2)  # numbers of ranks


# -- scenarios: each gives a dict of tensors on every rank ------------------------------------------------------------


def token_stats(problem: HeadProblem, backend: str, split: str) -> dict[str, torch.Tensor]:
    hidden, weight, tokens, bias = problem.tensors()
    shard = shard_of(split, problem.vocabulary)
    weight, bias = rows(shard, weight, bias)
    stats = rf.token_stats(hidden, weight, tokens, bias=bias, hidden_grad=True, vocabulary=shard, backend=backend,
                           **problem.options)
    return dict(vars(stats))


def gap(level: str, backend: str, split: str) -> dict[str, torch.Tensor]:
    hidden, weight, options, rollouts = rollouts_of()
    shard = shard_of(split, GAP_VOCABULARY)
    weight, options["bias"] = rows(shard, weight, options["bias"])
    result = rf.gradient_gap(hidden, weight, rollouts, level=level, vocabulary=shard, backend=backend, **options)
    answer = {"first": shard.first, "norm_sq": result.norm_sq, "norm_sq_naive": result.norm_sq_naive,
              "stderr": result.stderr, "sq": result.moments.sq, "dot_class": result.moments.dot_class,
              "gram": torch.cat([own.flatten() for own in result.gram]), "logp": result.stats.logp}
    if dist.get_rank() == 0:
        result.summary()  # what one rank alone logs must not wait for the others
    if result.vector is not None:
        direction = direction_of(level)
        direction = direction[shard.first:shard.stop] if level == "logits" else direction
        answer |= {"batch": torch.stack(result.batch_norm_sq()), "alignment": result.alignment(direction),
                   "vector": result.vector}
    return answer


def gap_in_blocks() -> dict[str, torch.Tensor]:
    """Three responses at a time by the largest shard; a block is collective, and the other shard has a single row."""
    held, rf.gap.SUM_BYTES = rf.gap.SUM_BYTES, 4 * GAP_VOCABULARY * 3
    try:
        return gap("hidden", "torch", "one row first")
    finally:
        rf.gap.SUM_BYTES = held


def linear_logprob(problem: HeadProblem, backend: str, split: str) -> dict[str, torch.Tensor]:
    hidden, weight, tokens, bias = problem.tensors()
    shard = shard_of(split, problem.vocabulary)
    leaves = [None if x is None else x.requires_grad_() for x in (hidden, *rows(shard, weight, bias))]
    logp, entropy = rf.linear_logprob(*leaves[:2], tokens, bias=leaves[2], vocabulary=shard, backend=backend,
                                      **problem.options)
    (torch.linspace(-1, 2, len(tokens)) * logp - 0.3 * entropy).sum().backward()
    gradients = {name: leaf.grad for name, leaf in zip(("hidden", "weight", "bias"), leaves, strict=True)
                 if leaf is not None}
    return {"first": shard.first, "logp": logp.detach(), "entropy": entropy.detach(), **gradients}


def compiled() -> dict[str, list[torch.Tensor]]:
    hidden, weight, tokens, bias = PROBLEMS[0].tensors()
    shard = shard_of("one row first", 33)
    weight, bias = rows(shard, weight, bias)

    def step(hidden, weight, bias):
        logp, entropy = rf.linear_logprob(hidden, weight, tokens, bias=bias, temperature=0.7, vocabulary=shard)
        return (logp * torch.linspace(-1, 2, logp.shape[0])).sum() - 0.1 * entropy.sum()

    results = {}
    for name, function in (("eager", step), ("compiled", torch.compile(step, fullgraph=True, backend="aot_eager"))):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        value = function(*leaves)
        results[name] = [value.detach(), *torch.autograd.grad(value, leaves)]
    return results


def exact() -> dict[str, torch.Tensor]:
    hidden, weight, tokens = exact_problem()
    shard = shard_of("one row first", 33)
    stats = rf.token_stats(hidden, *rows(shard, weight), tokens, vocabulary=shard)
    return {name: column for name, column in vars(stats).items() if column is not None}


def groups() -> dict[str, torch.Tensor]:
    """The vocabulary split over the last two ranks of the world, and over a group of this rank alone."""
    hidden, weight, tokens = exact_problem()
    ranks = dist.get_world_size()
    pair = dist.new_group([ranks - 2, ranks - 1])
    alone = [dist.new_group([rank]) for rank in range(ranks)][dist.get_rank()]
    answer = {"alone": rf.token_stats(hidden, weight, tokens, vocabulary=rf.VocabularyShard(0, 33, 33, alone)).score_sq}
    if dist.get_rank() >= ranks - 2:
        shard = rf.VocabularyShard.even(33, pair)
        leaf = hidden.clone().requires_grad_()
        rf.linear_logprob(leaf, *rows(shard, weight), tokens, vocabulary=shard)[0].sum().backward()
        answer["pair"] = leaf.grad
    return answer


def no_tokens() -> dict[str, object]:
    hidden, weight, tokens = exact_problem()
    shard = shard_of("even", 33)
    hidden, tokens, (weight,) = hidden[:0].requires_grad_(), tokens[:0], rows(shard, weight)
    stats = rf.token_stats(hidden, weight, tokens, vocabulary=shard)
    rollouts = rf.Rollouts.from_packed(tokens, torch.tensor([0]), torch.zeros(0), group_size=1)
    gaps = {level: tuple(rf.gradient_gap(hidden, weight, rollouts, level=level, vocabulary=shard).vector.shape)
            for level in ("logits", "hidden")}
    rf.linear_logprob(hidden, weight, tokens, vocabulary=shard)[0].sum().backward()
    return {"stats": [len(column) for column in vars(stats).values() if column is not None], **gaps,
            "logprob": tuple(hidden.grad.shape)}


def shards() -> dict[str, object]:
    shard = rf.VocabularyShard.even(33)
    return {"even": (shard.first, shard.stop), "repr": repr(shard), "largest": shard.largest}


# -- running them -----------------------------------------------------------------------------------------------------


def scenarios(ranks: int) -> dict[str, Callable[[], object]]:
    """In an order that every rank shares."""
    found: dict[str, Callable[[], object]] = {"shards": shards, "exact": exact, "groups": groups,
                                              "no tokens": no_tokens,
                                              "gap in blocks": gap_in_blocks}
    for backend, split in itertools.product(BACKENDS, SPLITS):
        for i, problem in enumerate(PROBLEMS):
            arguments = (problem, backend, split)
            found[f"token_stats {i} {backend} {split}"] = lambda arguments=arguments: token_stats(*arguments)
            found[f"linear_logprob {i} {backend} {split}"] = lambda arguments=arguments: linear_logprob(*arguments)
        for level in GAP_LEVELS:
            arguments = (level, backend, split)
            found[f"gap {level} {backend} {split}"] = lambda arguments=arguments: gap(*arguments)
    for name, case in REFUSALS.items():
        found[f"refused: {name}"] = lambda case=case: refused(case)
    found["after the refusals"] = exact
    if ranks == min(WORLDS):
        found["compiled"] = compiled  # loading the compiler takes seconds
    return found


def work(rank: int, folder: str) -> None:
    """What a spawned process runs."""
    gloo_ranks.answer(rank, folder, WORLDS, scenarios)


class Ranks(gloo_ranks.Ranks):
    """With what the tests compare the answers with."""

    splits = SPLITS
    exact_problem = property(lambda self: exact_problem())

    def direction(self, level: str) -> torch.Tensor:
        return direction_of(level)

    def even_split(self, size: int) -> list[tuple[int, int]]:
        step = -(-size // self.count)
        return [(start, min(start + step, size)) for start in range(0, size, step)]

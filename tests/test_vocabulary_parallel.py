"""The head split by vocabulary rows over real ranks (gloo): the numbers of one rank, the same bits on all of them."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import BF16, FP16, Case, assert_pass
from policies import HeadProblem, random_rollouts, within, worst
from vocabulary_ranks import BACKENDS, GAP_LEVELS, PROBLEMS, WORLDS, Ranks, rollouts_of, work
from vocabulary_refusals import REFUSALS
from vocabulary_shards import merge_error

import rlvr_fast as rf
from rlvr_fast.backends import TokenPass

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> dict[int, Ranks]:
    """What every scenario gave on every rank; the processes run once."""
    return Ranks.run(work, tmp_path_factory.mktemp("ranks"), WORLDS)


@pytest.fixture(params=sorted(WORLDS), ids=lambda count: f"{count} ranks")
def ranks(request, worlds) -> Ranks:
    return worlds[request.param]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("index", range(len(PROBLEMS)), ids=[str(problem) for problem in PROBLEMS])
def test_token_stats_are_the_same_on_every_rank_and_those_of_one(ranks, index, backend):
    problem = PROBLEMS[index]
    hidden, weight, tokens, bias = problem.tensors()
    one = rf.token_stats(hidden, weight, tokens, bias=bias, hidden_grad=True, backend=backend, **problem.options)
    case = Case(problem, CPU)
    for split in ranks.splits:
        answers = ranks.answers(f"token_stats {index} {backend} {split}")
        for name, column in answers[0].items():
            assert all(torch.equal(column, other[name]) for other in answers), name
            assert column.dtype == torch.float32
        assert_pass(TokenPass(**{**{n: answers[0].get(n) for n in TokenPass._fields if n != "off_mass"},
                                 "off_mass": case.expected["off_mass"].float()}),
                    case.expected, case.error + merge_error(case.expected["lse"]))
        scale = one.hidden_grad.abs().amax().item()
        assert within(answers[0]["hidden_grad"], one.hidden_grad, atol=1e-5 * scale)


def test_exact_logits_give_the_numbers_of_one_rank(ranks):
    """Logits that fp32 holds exactly leave the merge's own rounding: 1e-6 for |lse| below 8."""
    one = rf.token_stats(*ranks.exact_problem)
    for rank in ranks.answers("exact"):
        for name, column in rank.items():
            assert within(column, getattr(one, name), rtol=1e-6), f"{name}: {worst(column, getattr(one, name))}"


def test_one_rank_alone_and_the_last_two_of_the_world(ranks):
    """A group's ranks are not the world's. A single shard merges into itself, bit for bit."""
    hidden, weight, tokens = ranks.exact_problem
    one, leaf = rf.token_stats(hidden, weight, tokens), hidden.clone().requires_grad_()
    rf.linear_logprob(leaf, weight, tokens)[0].sum().backward()
    answers = ranks.answers("groups")
    assert all(torch.equal(answer["alone"], one.score_sq) for answer in answers)
    assert [rank for rank, answer in enumerate(answers) if "pair" in answer] == [ranks.count - 2, ranks.count - 1]
    for answer in answers[-2:]:
        assert within(answer["pair"], leaf.grad, rtol=1e-5)


def test_no_tokens_at_all(ranks):
    for (start, stop), answer in zip(ranks.even_split(33), ranks.answers("no tokens"), strict=True):
        assert answer == {"stats": [0] * 5, "logits": (0, stop - start), "hidden": (0, 1), "logprob": (0, 1)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("level", GAP_LEVELS)
def test_gradient_gap_is_the_same_on_every_rank_and_that_of_one(ranks, level, backend):
    hidden, weight, options, rollouts = rollouts_of()
    one = rf.gradient_gap(hidden, weight, rollouts, level=level, backend=backend, **options)
    direction = ranks.direction(level)
    for split in ranks.splits:
        answers = ranks.answers(f"gap {level} {backend} {split}")
        for name in ("norm_sq", "norm_sq_naive", "stderr", "sq", "dot_class", "gram", "logp", "batch", "alignment"):
            if name in answers[0]:
                assert all(torch.equal(answers[0][name].nan_to_num(-7), other[name].nan_to_num(-7))
                           for other in answers), name
        first, usable = answers[0], one.defined
        assert torch.equal(first["norm_sq"].isnan(), one.norm_sq.isnan())
        scale = one.norm_sq_naive[usable].max().item()
        for name in ("norm_sq", "norm_sq_naive", "stderr"):
            assert within(first[name][usable], getattr(one, name)[usable], atol=2e-5 * scale), name
        gram = torch.cat([own.flatten() for own in one.gram])
        assert within(first["gram"], gram, atol=2e-5 * gram.max().item())
        assert within(first["sq"], one.moments.sq, atol=2e-5 * gram.max().item())
        assert within(first["logp"], one.stats.logp, atol=1e-5)
        if level == "head":
            continue
        assert within(first["batch"], torch.stack(one.batch_norm_sq()), atol=2e-5 * scale)
        assert within(first["alignment"][usable], one.alignment(direction)[usable],
                      atol=1e-5 * (one.vector[usable].abs() @ direction.abs()).max().item())
        vectors = [answer["vector"] for answer in sorted(answers, key=lambda answer: answer["first"])]
        vector = torch.cat(vectors, 1) if level == "logits" else vectors[0]
        assert vector.shape == one.vector.shape
        assert within(vector[usable], one.vector[usable], atol=1e-5 * one.vector[usable].abs().max().item())
        if level == "hidden":
            assert all(torch.equal(vectors[0].nan_to_num(-7), own.nan_to_num(-7)) for own in vectors)


def test_uneven_shards_cut_the_same_blocks_of_responses(ranks):
    whole = ranks.answers("gap hidden torch one row first")[0]
    usable = ~whole["norm_sq"].isnan()
    for answer in ranks.answers("gap in blocks"):
        assert within(answer["vector"][usable], whole["vector"][usable], rtol=1e-5, atol=1e-6)
        assert within(answer["logp"], whole["logp"], atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("index", range(len(PROBLEMS)), ids=[str(problem) for problem in PROBLEMS])
def test_linear_logprob_differentiates_like_a_column_parallel_layer(ranks, index, backend):
    hidden, weight, tokens, bias = PROBLEMS[index].tensors()
    leaves = [None if x is None else x.requires_grad_() for x in (hidden, weight, bias)]
    logp, entropy = rf.linear_logprob(*leaves[:2], tokens, bias=leaves[2], backend=backend, **PROBLEMS[index].options)
    ramp = torch.linspace(-1, 2, len(tokens))
    (ramp * logp - 0.3 * entropy).sum().backward()
    half_ulp = {torch.float32: 0.0, FP16: 2.0**-11, BF16: 2.0**-8}[hidden.dtype]
    for split in ranks.splits:
        answers = sorted(ranks.answers(f"linear_logprob {index} {backend} {split}"), key=lambda answer: answer["first"])
        for name in ("logp", "entropy", "hidden"):
            assert all(torch.equal(answers[0][name], other[name]) for other in answers), name
        assert within(answers[0]["logp"], logp.detach(), atol=1e-5)
        assert within(answers[0]["entropy"], entropy.detach(), atol=2e-5)
        joined = {name: torch.cat([answer[name] for answer in answers]) for name in ("weight", "bias")
                  if name in answers[0]}
        for leaf, gradient in zip(leaves, (answers[0]["hidden"], joined["weight"], joined.get("bias")), strict=True):
            if leaf is None:
                continue
            assert gradient.dtype == leaf.dtype
            scale = leaf.grad.abs().max().item()
            assert within(gradient, leaf.grad, rtol=4 * half_ulp, atol=1e-5 * scale), worst(gradient, leaf.grad)


def test_linear_logprob_compiles(worlds):
    """One graph, no break, the eager numbers."""
    for answer in worlds[min(WORLDS)].answers("compiled"):
        for eager, compiled in zip(answer["eager"], answer["compiled"], strict=True):
            assert torch.equal(eager, compiled)


def test_shards_describe_themselves(ranks):
    assert [answer["even"] for answer in ranks.answers("shards")] == ranks.even_split(33)
    for rank, answer in enumerate(ranks.answers("shards")):
        start, stop = ranks.even_split(33)[rank]
        assert answer["repr"] == f"VocabularyShard([{start}, {stop}) of 33, rank {rank} of {ranks.count})"
        assert answer["largest"] == ranks.even_split(33)[0][1]


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_arguments_of_one_rank_raise_on_all(ranks, case):
    """On the rank at fault its own error; on the others one that says which rank, or how they differ."""
    at_fault, kind, message = REFUSALS[case].at_fault, REFUSALS[case].kind, REFUSALS[case].message
    for rank, (name, text) in enumerate(ranks.answers(f"refused: {case}")):
        expected = kind if at_fault in (rank, None) else "ValueError"
        assert name == expected, (rank, name, text)
        assert message in text, (rank, text)


def test_ranks_go_on_after_a_refusal(ranks):
    """Nobody is left waiting in a collective of a refused call: the next call works."""
    one = rf.token_stats(*ranks.exact_problem)
    for rank in ranks.answers("after the refusals"):
        assert within(rank["logp"], one.logp, rtol=1e-6)


def test_a_shard_needs_torch_distributed():
    with pytest.raises(ValueError, match=r"call torch.distributed.init_process_group first"):
        rf.VocabularyShard(0, 3, 3)
    with pytest.raises(ValueError, match=r"call torch.distributed.init_process_group first"):
        rf.VocabularyShard.even(3)


@pytest.mark.parametrize("call", [rf.token_stats, rf.linear_logprob])
def test_what_is_no_shard_is_refused(call):
    hidden, weight, tokens, _ = HeadProblem(33, 5, 3).tensors()
    with pytest.raises(TypeError, match=r"vocabulary must be rlvr_fast.VocabularyShard or None, got tuple"):
        call(hidden, weight, tokens, vocabulary=(0, 33))


def test_gap_refuses_what_is_no_shard(generator):
    rollouts = random_rollouts(4, 2, 33, generator)
    hidden, weight = torch.ones(rollouts.n_tokens, 5), torch.ones(33, 5)
    with pytest.raises(TypeError, match=r"vocabulary must be rlvr_fast.VocabularyShard or None, got int"):
        rf.gradient_gap(hidden, weight, rollouts, vocabulary=0)
    gradients = rf.gradient_gap(hidden, weight, rollouts, level="logits").gradients
    with pytest.raises(TypeError, match=r"vocabulary must be rlvr_fast.VocabularyShard or None, got int"):
        rf.gap_from_gradients(gradients, level="logits", length_norm=True, vocabulary=3)

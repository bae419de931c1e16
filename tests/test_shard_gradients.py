"""Each shard's share of the gradients, given the pass over the whole vocabulary: the shares make up the whole."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from kernel_cases import BF16, EPS, FP16, Case
from policies import HeadProblem, within
from vocabulary_shards import local_ids, splits_of

import rlvr_fast.reference as ref
from rlvr_fast import backends
from rlvr_fast.backends import TokenPass
from rlvr_fast.head import Head
from rlvr_fast.merge_passes import merge_passes

CPU = torch.device("cpu")
BACKENDS = ("torch", "native")
GRADIENT_PROBLEMS = (
    HeadProblem(33, 5, 19, bias="random", temperature=0.7),
    HeadProblem(67, 24, 18, FP16, temperature=2.0, softcap=5.0),
    HeadProblem(131, 40, 300, BF16, bias="masked", spread=8.0),
)


class KnownMerge:
    """A ``backends.Merge`` for one process: hands out the merged pass, chunk by chunk, and counts the chunks."""

    def __init__(self, whole: TokenPass, mass: torch.Tensor, largest_shard: int):
        self.whole, self.mass, self.largest_shard = torch.stack(whole), mass, largest_shard
        self.chunks: list[int] = []

    def __call__(self, local: TokenPass) -> tuple[TokenPass, torch.Tensor]:
        start = sum(self.chunks)
        self.chunks.append(len(local.logp))
        rows = slice(start, start + len(local.logp))
        return TokenPass(*self.whole[:, rows].unbind(0)), self.mass[rows]


def shards_of(problem: HeadProblem, bounds: Sequence[int]) -> list[tuple[torch.Tensor, Head]]:
    """Per shard its token ids and its head."""
    _, weight, tokens, bias = problem.tensors()
    return [(local_ids(tokens, a, b), Head(weight[a:b], None if bias is None else bias[a:b], **problem.options))
            for a, b in itertools.pairwise(bounds)]


def whole_pass(problem: HeadProblem) -> TokenPass:
    hidden, weight, tokens, bias = problem.tensors()
    return backends.select("head_pass", "torch", CPU)(hidden, tokens, Head(weight, bias, **problem.options))


@pytest.mark.parametrize("problem", GRADIENT_PROBLEMS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_gradients_of_the_shards_add_up(backend, problem):
    hidden, weight, *_ = problem.tensors()
    case, run, whole = Case(problem, CPU), backends.select("hidden_gradient", backend, CPU), whole_pass(problem)
    for bounds in splits_of(problem.vocabulary):
        parts = [run(hidden, ids, head, whole) for ids, head in shards_of(problem, bounds)]
        terms = case.score.abs() @ weight.double().abs()
        excess = (sum(parts).double() - ref.hidden_gradient(case.score, weight)).abs()
        assert (excess <= (4 * case.error + 16 * EPS) * terms).all(), bounds


@pytest.mark.parametrize("problem", GRADIENT_PROBLEMS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_score_sums_of_the_shards_stand_side_by_side(backend, problem):
    """And every shard, however small, asks for the same chunks: each of them is a collective."""
    hidden, *_ = problem.tensors()
    case, n, whole = Case(problem, CPU), problem.n_tokens, whole_pass(problem)
    cu_seqlens, coefficients = torch.tensor([0, 0, n // 3, n // 3, n, n]), torch.linspace(-1.0, 2.0, n)
    expected = ref.response_gradients_logits(case.score, coefficients.double(), cu_seqlens)
    terms = ref.response_gradients_logits(case.score.abs(), coefficients.double().abs(), cu_seqlens)
    run, head_pass = (backends.select(name, backend, CPU) for name in ("head_pass_with_sums", "head_pass"))
    for bounds in splits_of(problem.vocabulary):
        shards = shards_of(problem, bounds)
        planes = torch.stack([torch.stack(head_pass(hidden, ids, head)) for ids, head in shards])
        _, mass = merge_passes(planes, **problem.options)
        merges = [KnownMerge(whole, own, max(b - a for a, b in itertools.pairwise(bounds))) for own in mass]
        results = [run(hidden, ids, head, coefficients, cu_seqlens, merge=merge)
                   for (ids, head), merge in zip(shards, merges, strict=True)]
        assert all(torch.equal(torch.stack(result[0]), torch.stack(whole)) for result in results)
        sums = torch.cat([result[1] for result in results], 1)
        assert ((sums.double() - expected).abs() <= (4 * case.error + 16 * EPS) * terms + 1e-37).all(), bounds
        assert all(merge.chunks == merges[0].chunks for merge in merges)
        assert sum(merges[0].chunks) == n


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_merge_raises_comes_out_of_the_pass(backend):
    """Also out of the native one, whose threads must not be left at a barrier: enough work for two of them."""
    problem = HeadProblem(1009, 65, 300)
    hidden, weight, tokens, _ = problem.tensors()

    class Broken(KnownMerge):
        def __call__(self, local):
            if self.chunks:
                raise ConnectionError("a rank is gone")
            return super().__call__(local)

    run = backends.select("head_pass_with_sums", backend, CPU)
    merge = Broken(whole_pass(problem), torch.ones(300), 1009)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(ConnectionError, match="a rank is gone"):
            run(hidden, tokens, Head(weight), torch.ones(300), torch.tensor([0, 300]), merge=merge)
    finally:
        torch.set_num_threads(threads)
    assert merge.chunks == [128]


@pytest.mark.parametrize("level_width", [40, 500])  # tokens more and fewer than D: by tiles and by pairs
@pytest.mark.parametrize("backend", BACKENDS)
def test_gram_matrices_of_the_shards_add_up(backend, level_width):
    problem = HeadProblem(67, level_width, 100, bias="random", softcap=5.0)
    hidden, *_ = problem.tensors()
    case, run, whole = Case(problem, CPU), backends.select("head_gram", backend, CPU), whole_pass(problem)
    coefficients, spans = torch.linspace(0.5, 1.5, 100), [[(0, 30), (30, 30), (60, 100)], [(30, 60)]]
    gradients = ref.response_gradients_head(case.score, hidden, coefficients.double(), [0, 30, 60, 100])
    for bounds in splits_of(67)[:4]:
        parts = [run(hidden, ids, head, whole, coefficients, spans) for ids, head in shards_of(problem, bounds)]
        first, second = (sum(grams) for grams in zip(*parts, strict=True))
        assert within(second, gradients[1:2] @ gradients[1:2].T, rtol=2e-5)
        rows = torch.stack([gradients[0], torch.zeros_like(gradients[0]), gradients[2]])
        assert within(first, rows @ rows.T, atol=2e-5 * first.max().item())


@pytest.mark.parametrize("problem", GRADIENT_PROBLEMS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_of_the_shards_adds_up(backend, problem):
    """Against the unsharded backward, whose own test is float64 autograd; summed before anything is rounded."""
    hidden, weight, tokens, bias = problem.tensors()
    run, whole = backends.select("linear_logprob_backward", backend, CPU), whole_pass(problem)
    upstream = torch.linspace(-1, 2, problem.n_tokens), torch.linspace(1, -0.5, problem.n_tokens)
    needs = (True, True, bias is not None)
    expected = run(*upstream, hidden, tokens, Head(weight, bias, **problem.options), whole, needs)
    for bounds in splits_of(problem.vocabulary):
        parts = [run(*upstream, hidden, ids, head, whole, needs) for ids, head in shards_of(problem, bounds)]
        joined = [sum(part[0] for part in parts), torch.cat([part[1] for part in parts])]
        joined += [torch.cat([part[2] for part in parts])] if needs[2] else []
        for actual, whole_gradient in zip(joined, expected, strict=False):
            assert actual.dtype == torch.float32
            assert within(actual, whole_gradient, atol=1e-5 * whole_gradient.abs().max().item())

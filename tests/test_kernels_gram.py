"""The Triton backend's response Gram matrices at level "head": on the GPU where there is one, else interpreted."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from kernel_cases import BF16, FP16, PROBLEMS, Case, assert_grams, assert_pass, peaked, random_coefficients
from policies import HeadProblem

from rlvr_fast.backends import triton_backend, triton_gram
from rlvr_fast.kernels import config

pytestmark = [pytest.mark.interpreter, pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")]


def both_ways(case: Case, coefficients: torch.Tensor, cu_seqlens: list[int], groups: list[list[int]]) -> None:
    """With the pass and after it, against the specification."""
    spans = list(pairwise(cu_seqlens))
    arguments = (coefficients.to(case.inputs[0].device), [[spans[i] for i in group] for group in groups])
    token_pass, grams = triton_backend.head_pass_with_gram(*case.inputs, *arguments)
    assert_pass(token_pass, case.expected, case.error)
    assert_grams(grams, case, coefficients, cu_seqlens, groups)
    assert_grams(triton_backend.head_gram(*case.inputs, case.token_pass(), *arguments), case, coefficients, cu_seqlens,
                 groups)


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_gram_matrices_match_the_reference(problem, device, generator):
    """An empty response, unequal ones; pairs or slices, whichever the problem's N and D make cheaper."""
    n = problem.n_tokens
    both_ways(Case(problem, device), random_coefficients(n, generator), [0, n // 3, n // 3, n], [[0, 1, 2]])


@pytest.mark.parametrize("dtype", [torch.float32, BF16, FP16], ids=str)
@pytest.mark.parametrize("block_tokens", [1, 12, 4096], ids=["prompt by prompt", "some prompts", "all prompts"])
def test_blocks_of_prompts_rows_and_vocabulary(block_tokens, dtype, device, generator, monkeypatch):
    """Interleaved responses of four prompts, one of a single empty response; vocabulary slices of one tile, token pairs
    in blocks of 4 rows; a prompt of more than 2 D tokens takes the other way."""
    monkeypatch.setattr(config, "CHUNK_BYTES", 512)
    monkeypatch.setattr(triton_gram, "PAIR_ROWS", 4)
    monkeypatch.setattr(triton_gram, "BLOCK_TOKENS", block_tokens)
    case = Case(HeadProblem(101, 4, 24, dtype, temperature=0.7, softcap=9.0, bias="random"), device)
    both_ways(case, random_coefficients(24, generator), [0, 3, 3, 8, 10, 14, 24], [[0, 2], [1], [5], [3, 4]])


@pytest.mark.parametrize("dtype", [torch.float32, BF16, FP16], ids=str)
def test_tokens_sampled_twice(dtype, device, generator):
    """Where two tokens agree their target entries meet; where one's target is another's alternative they do not."""
    hidden, weight, tokens, _ = HeadProblem(67, 16, 12, dtype).tensors()
    tokens[:] = torch.tensor([5, 5, 66, 66, 5, 0, 1, 0, 5, 66, 2, 3])
    case = Case(HeadProblem(67, 16, 12, dtype), device, (hidden, weight, tokens, None))
    both_ways(case, random_coefficients(12, generator), [0, 5, 12], [[0, 1]])


@pytest.mark.parametrize("dtype", [torch.float32, BF16, FP16], ids=str)
def test_nearly_certain_tokens_keep_their_digits(dtype, device, generator):
    """Derivatives from 5e-4 down to 5e-11 in one prompt, each response to its own relative accuracy."""
    both_ways(peaked(device, dtype), random_coefficients(4, generator), [0, 1, 2, 3, 4], [[0, 1, 2, 3]])

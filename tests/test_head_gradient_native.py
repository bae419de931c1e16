"""The native backward of the head pass against float64, on every instruction set that this processor has.

Tolerances: a logit of magnitude z has an error of a few 2^-24 z, which every probability inherits relatively; sums of
random signs over at most 20,000 entries and 400 tokens add less. 3e-7 of the largest entry times 1 + the largest logit
covers both twice.
"""

from __future__ import annotations

import pytest
import torch
from policies import HeadProblem, within, worst

import rlvr_fast as rf
import rlvr_fast.reference as ref
from rlvr_fast import backends
from rlvr_fast.backends import TokenPass, native_backend, torch_backend
from rlvr_fast.head import Head

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(native_backend.unavailable(CPU) is not None, reason="the native extension is not built")
BF16, FP16 = torch.bfloat16, torch.float16
PROBLEMS = (
    HeadProblem(1, 1, 1),
    HeadProblem(33, 5, 1, bias="random"),
    HeadProblem(191, 33, 193),  # one entry short of a block, one token more than a chunk
    HeadProblem(193, 31, 192, bias="masked", temperature=0.7),
    HeadProblem(1299, 40, 400, bias="random", softcap=5.0),
    HeadProblem(769, 70, 33, temperature=2.0, softcap=30.0, bias="masked", spread=20.0),
    HeadProblem(257, 577, 37, spread=10.0),
    HeadProblem(20011, 7, 20, bias="random"),  # two blocks to a part of the vocabulary, many parts
    HeadProblem(401, 48, 200, BF16, bias="random"),
    HeadProblem(130, 64, 35, FP16, bias="masked", softcap=4.0),
)


def instruction_sets() -> list[str]:
    names = []
    for name in ("avx512", "avx2", "baseline"):
        try:
            native_backend._native.instruction_set(name)
        except (ValueError, AttributeError):
            continue
        names.append(name)
    return names


def exact(hidden, weight, bias, tokens, upstream, temperature, softcap):
    """(for hidden, weight, bias) in float64 by the specification's formulas, and the largest logit."""
    options = (bias, temperature, softcap)
    z, slope = ref.logits(hidden, weight, *options), ref.logit_slope(hidden, weight, *options)
    log_p = torch.log_softmax(z, 1)
    spread = log_p.exp() * (log_p.masked_fill(log_p == -torch.inf, 0.0) + ref.entropy(z)[:, None])
    draw = upstream[0].double()[:, None] * ref.score(z, tokens, slope)
    draw = draw - upstream[1].double()[:, None] * spread * slope
    return (draw @ weight.double(), draw.T @ hidden.double(), draw.sum(0)), z[z.isfinite()].abs().max().item()


def upstream_of(n_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Different for every token, never both zero."""
    return torch.linspace(-1, 2, n_tokens) + 0.01, torch.linspace(1.5, -0.5, n_tokens)


def forward(hidden, weight, bias, tokens, temperature=1.0, softcap=None) -> tuple[Head, TokenPass]:
    head = Head(weight, bias, temperature, softcap)
    return head, native_backend.head_pass(hidden, tokens, head)


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@pytest.mark.parametrize("instruction_set", instruction_sets())
def test_gradients_of_log_probs_and_entropies(instruction_set, problem):
    hidden, weight, tokens, bias = problem.tensors()
    upstream, needs = upstream_of(len(tokens)), (True, True, bias is not None)
    head, token_pass = forward(hidden, weight, bias, tokens, **problem.options)
    found = native_backend._run_backward(*upstream, hidden, tokens, head, token_pass, needs, instruction_set)
    expected, largest = exact(hidden, weight, bias, tokens, upstream, **problem.options)
    for name, needed, own, true in zip(("hidden", "weight", "bias"), needs, found, expected, strict=True):
        if not needed:
            assert own is None
            continue
        assert own.dtype == torch.float32
        tolerance = 3e-7 * (1 + largest) * true.abs().max().item()
        assert within(own, true, atol=tolerance + 1e-7), f"{name}: {worst(own, true)}"


def test_a_nearly_certain_token_keeps_the_digits_of_its_gradient():
    """1 - p down to 1e-20, where a float32 p is 1: relative to each token's own largest entry."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 64, generator=generator)
    tokens = torch.randint(500, (300,), generator=generator)
    weight = torch.randn(500, 64, generator=generator) / 8
    hidden += torch.linspace(0, 50, 300)[:, None] * weight[tokens]
    upstream = torch.ones(300), torch.zeros(300)
    head, token_pass = forward(hidden, weight, None, tokens)
    assert token_pass.off_mass.min() < 1e-20
    (true, true_weight, _), largest = exact(hidden, weight, None, tokens, upstream, 1.0, None)
    own, own_weight, _ = native_backend.linear_logprob_backward(*upstream, hidden, tokens, head, token_pass,
                                                                (True, True, False))
    relative = (own.double() - true).abs().amax(1) / true.abs().amax(1)
    assert relative.max() <= 6e-7 * largest
    assert within(own_weight, true_weight, atol=2e-7 * largest * true_weight.abs().max().item())
    assert torch.equal(own, native_backend.hidden_gradient(hidden, tokens, head, token_pass))


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_impossible_and_certain_tokens_give_no_nan(softcap):
    """A sampled token of probability 0 (bias -inf) and one that is certain: what torch's backend says, all finite."""
    hidden, weight, tokens, _ = HeadProblem(70, 9, 40).tensors()
    bias = torch.zeros(70)
    bias[tokens[3]] = -torch.inf
    bias[tokens[5]] = 3e4
    upstream = upstream_of(40)
    head, token_pass = forward(hidden, weight, bias, tokens, softcap=softcap)
    assert token_pass.logp[3] == -torch.inf
    own = native_backend.linear_logprob_backward(*upstream, hidden, tokens, head, token_pass, (True, True, True))
    torchs = torch_backend.linear_logprob_backward(*upstream, hidden, tokens, head, token_pass, (True, True, True))
    for one, other in zip(own, torchs, strict=True):
        assert torch.isfinite(one).all()
        assert within(one, other, atol=2e-5 * other.abs().max().item())
    assert own[2].abs().max() > 0.1


def test_tokens_without_an_upstream_gradient_are_left_out():
    """Their rows are exactly zero, the others as if they were alone; none of the weights' gradient comes from them."""
    hidden, weight, tokens, bias = HeadProblem(401, 33, 250, bias="random").tensors()
    head, token_pass = forward(hidden, weight, bias, tokens)
    grad_logp, grad_entropy = (gradient.clone() for gradient in upstream_of(250))
    silent = torch.arange(250) % 3 == 1
    grad_logp[silent] = grad_entropy[silent] = 0.0
    grad_logp[0] = grad_entropy[2] = 0.0  # one of the two is enough
    needs = (True, True, True)
    full = native_backend._run_backward(grad_logp, grad_entropy, hidden, tokens, head, token_pass, needs)
    own = native_backend.linear_logprob_backward(grad_logp, grad_entropy, hidden, tokens, head, token_pass, needs)
    assert not own[0][silent].any()
    assert own[0][~silent].abs().amax(1).min() > 0
    for one, other in zip(own, full, strict=True):
        assert within(one, other, atol=1e-6 * other.abs().max().item())
    nothing = native_backend.linear_logprob_backward(None, None, hidden, tokens, head, token_pass, needs)
    assert [tuple(gradient.shape) for gradient in nothing] == [(250, 33), (401, 33), (401,)]
    assert not any(gradient.any() for gradient in nothing)


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_one_gradient_alone_is_the_same_bits(needs):
    hidden, weight, tokens, bias = HeadProblem(401, 33, 250, bias="random").tensors()
    head, token_pass = forward(hidden, weight, bias, tokens)
    arguments = (*upstream_of(250), hidden, tokens, head, token_pass)
    everything = native_backend.linear_logprob_backward(*arguments, (True, True, True))
    alone = native_backend.linear_logprob_backward(*arguments, needs)
    for one, other, needed in zip(alone, everything, needs, strict=True):
        assert one is None if not needed else torch.equal(one, other)


def test_no_bit_depends_on_the_number_of_threads():
    """66 parts of the vocabulary and 3 chunks of tokens, whose order the sums into hidden's gradient must keep."""
    hidden, weight, tokens, bias = HeadProblem(12600, 17, 400, bias="random").tensors()
    head, token_pass = forward(hidden, weight, bias, tokens)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 16, 16):
            torch.set_num_threads(threads)
            found.append(native_backend.linear_logprob_backward(*upstream_of(400), hidden, tokens, head, token_pass,
                                                                (True, True, True)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(one, again) for one, again in zip(found[0], other, strict=True))


def test_strided_operands_and_columns():
    hidden, weight, tokens, bias = HeadProblem(193, 31, 70, bias="random").tensors()
    head, token_pass = forward(hidden, weight, bias, tokens)
    upstream, needs = upstream_of(70), (True, True, True)

    def spread_out(x):
        return torch.stack([x, torch.full_like(x, 7)], -1)[..., 0]

    plain = native_backend.linear_logprob_backward(*upstream, hidden, tokens, head, token_pass, needs)
    strided = native_backend.linear_logprob_backward(
        *map(spread_out, upstream), spread_out(hidden), spread_out(tokens), Head(spread_out(weight), spread_out(bias)),
        TokenPass(*map(spread_out, token_pass)), needs)
    assert all(torch.equal(one, other) for one, other in zip(plain, strided, strict=True))


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_central_differences_along_a_random_direction(softcap):
    """Of the float64 specification, step 1e-5: its own error is 1e-10, that of the fp32 gradient 1e-6 of its norm."""
    hidden, weight, tokens, bias = HeadProblem(97, 13, 50, bias="random", temperature=0.8).tensors()
    coefficients, generator = upstream_of(50), torch.Generator().manual_seed(1)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    logp, entropy = rf.linear_logprob(leaves[0], leaves[1], tokens, bias=leaves[2], temperature=0.8, softcap=softcap,
                                      backend="native")
    (coefficients[0] * logp + coefficients[1] * entropy).sum().backward()

    def value(step):
        moved = [x.double() + step * along for x, along in zip((hidden, weight, bias), directions, strict=True)]
        z = ref.logits(*moved, 0.8, softcap)
        return (coefficients[0] * ref.log_prob(z, tokens) + coefficients[1] * ref.entropy(z)).sum()

    for mine in range(3):  # a direction in one operand, then in another
        directions = [torch.randn(x.shape, generator=generator, dtype=torch.float64) * (i == mine)
                      for i, x in enumerate((hidden, weight, bias))]
        slope = (value(1e-5) - value(-1e-5)) / 2e-5
        own = (leaves[mine].grad.double() * directions[mine]).sum()
        assert abs(own - slope) <= 2e-6 * leaves[mine].grad.double().norm() * directions[mine].norm()


def test_auto_takes_the_native_backward_on_a_cpu(monkeypatch):
    for operation in ("linear_logprob_backward", "hidden_gradient"):
        assert backends.select(operation, "auto", CPU) is getattr(native_backend, operation)
    calls, run = [], native_backend.linear_logprob_backward
    monkeypatch.setattr(native_backend, "linear_logprob_backward", lambda *a: calls.append(a[-1]) or run(*a))
    hidden, weight, tokens, _ = HeadProblem(33, 5, 9).tensors()
    rf.linear_logprob(hidden.requires_grad_(), weight, tokens)[0].sum().backward()
    assert calls == [(True, False, False)]  # the lm_head is frozen: no product for it

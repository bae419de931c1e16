"""``linear_logprob``: gradients against float64 autograd, torch.library's own checks, torch.compile, memory."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from policies import HeadProblem, within, worst

import rlvr_fast as rf
from rlvr_fast.backends import native_backend

BACKENDS = ("torch", "native", pytest.param("triton", marks=pytest.mark.gpu))
HEADS = (
    HeadProblem(33, 5, 9),
    HeadProblem(1, 3, 4),
    HeadProblem(33, 5, 0),
    HeadProblem(1009, 65, 33, bias="random", temperature=0.7),
    HeadProblem(1009, 17, 33, bias="random", temperature=1.5, softcap=5.0),
    HeadProblem(4097, 9, 17, bias="masked"),
)


def place_of(backend: str) -> torch.device:
    if backend == "native" and (reason := native_backend.unavailable(torch.device("cpu"))):
        pytest.skip(reason)
    return torch.device("cuda" if backend == "triton" else "cpu")


def exact_outputs(hidden, weight, bias, tokens, temperature, softcap):
    """(logp, entropy) by torch's softmax in float64; masked entries have p log p = 0 and no gradient."""
    raw = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    z = (raw if softcap is None else softcap * torch.tanh(raw / softcap)) / temperature
    log_p = torch.log_softmax(z, 1)
    kept = log_p.masked_fill(log_p == -torch.inf, 0.0)
    return log_p.gather(1, tokens[:, None])[:, 0], -(log_p.exp() * kept).sum(1)


def loss(logp: torch.Tensor, entropy: torch.Tensor, weights: tuple[float, float]) -> torch.Tensor:
    """A different weight for every token, so that no row's gradient can stand in for another's."""
    ramp = torch.linspace(-1.0, 2.0, logp.numel(), dtype=logp.dtype, device=logp.device)
    return (weights[0] * ramp * logp.flatten() + weights[1] * ramp.flip(0) * entropy.flatten()).sum()


def gradients(function, tensors, weights):
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in tensors]
    outputs = function(*leaves)
    wanted = [x for x in leaves if x is not None]
    found = iter(torch.autograd.grad(loss(*outputs, weights), wanted))
    return outputs, [None if x is None else next(found) for x in leaves]


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (1.0, -0.3)], ids=["logp", "entropy", "both"])
@pytest.mark.parametrize("problem", HEADS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_match_float64_autograd(backend, problem, weights):
    """1e-5 of the largest entry (fp32 logits of magnitude 10 leave each p a relative 5e-6), 1e-6 where all are zero."""
    place, (hidden, weight, tokens, bias) = place_of(backend), problem.tensors()
    options = problem.options

    def fast(h, w, b):
        return rf.linear_logprob(h, w, tokens.to(place), bias=b, backend=backend, **options)

    def exact(h, w, b):
        return exact_outputs(h, w, b, tokens, **options)

    tensors = (hidden, weight, bias)
    outputs, grads = gradients(fast, [None if x is None else x.to(place) for x in tensors], weights)
    true_outputs, true_grads = gradients(exact, [None if x is None else x.double() for x in tensors], weights)
    for column, expected in zip(outputs, true_outputs, strict=True):
        assert column.dtype == torch.float32
        assert within(column.detach().cpu(), expected.detach(), atol=1e-5)
    for name, grad, expected in zip(("hidden", "weight", "bias"), grads, true_grads, strict=True):
        if expected is None or expected.numel() == 0:
            assert grad is None or grad.shape == expected.shape
            continue
        scale = expected.abs().max().item()
        assert within(grad.cpu(), expected, atol=1e-5 * scale + 1e-6), f"{name}: {worst(grad.cpu(), expected)}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_is_rounded_once_at_the_end(backend, dtype):
    """Exact on the rounded operands up to half a unit in the last place: 2^-8 for bf16, 2^-11 for fp16.

    Triton also rounds each derivative that the products add up; their magnitudes exceed the largest result less than
    eight times here.
    """
    problem = HeadProblem(1009, 65, 33, dtype, bias="random")
    place, (hidden, weight, tokens, bias) = place_of(backend), problem.tensors()
    bias = bias.to(dtype)
    outputs, grads = gradients(
        lambda h, w, b: rf.linear_logprob(h, w, tokens.to(place), bias=b, backend=backend),
        [x.to(place) for x in (hidden, weight, bias)], (1.0, -0.3))
    exact, true = gradients(lambda h, w, b: exact_outputs(h, w, b, tokens, 1.0, None),
                            [x.double() for x in (hidden, weight, bias)], (1.0, -0.3))
    assert within(outputs[0].detach().cpu(), exact[0].detach(), atol=1e-5)
    half_unit = torch.finfo(dtype).eps / 2
    for grad, expected in zip(grads, true, strict=True):
        assert grad.dtype == dtype
        error = 1e-5 + 8 * half_unit if backend == "triton" else 1e-5
        floor = error * expected.abs().max().item() + torch.finfo(dtype).tiny
        assert within(grad.cpu(), expected, rtol=1.01 * half_unit, atol=floor), worst(grad.cpu(), expected)


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3)))
def test_only_what_is_needed_gets_a_gradient(needs):
    hidden, weight, tokens, bias = HeadProblem(33, 5, 9, bias="random").tensors()
    leaves = [x.requires_grad_(needed) for x, needed in zip((hidden, weight, bias), needs, strict=True)]
    logp, entropy = rf.linear_logprob(*leaves[:2], tokens, bias=leaves[2])
    assert logp.requires_grad == entropy.requires_grad == any(needs)
    if not any(needs):
        return
    (logp.sum() + 2 * entropy.sum()).backward()
    everything = [x.detach().clone().requires_grad_() for x in leaves]
    logp, entropy = rf.linear_logprob(*everything[:2], tokens, bias=everything[2])
    (logp.sum() + 2 * entropy.sum()).backward()
    for leaf, full, needed in zip(leaves, everything, needs, strict=True):
        assert (leaf.grad is not None) == needed
        if needed:
            assert torch.equal(leaf.grad, full.grad)


def test_batched_shapes():
    hidden, weight, tokens, bias = HeadProblem(33, 5, 12, bias="random").tensors()
    flat = rf.linear_logprob(hidden, weight, tokens, bias=bias)
    cube = hidden.view(3, 4, 5).clone().requires_grad_()
    batched = rf.linear_logprob(cube, weight, tokens.view(3, 4), bias=bias)
    assert batched[0].shape == batched[1].shape == (3, 4)
    for one, other in zip(flat, batched, strict=True):
        assert torch.equal(one, other.flatten())
    batched[0].sum().backward()
    assert cube.grad.shape == (3, 4, 5)
    empty = rf.linear_logprob(torch.zeros(0, 4, 5), weight, torch.zeros(0, 4, dtype=torch.int64))
    assert empty[0].shape == (0, 4)


def test_layout_of_inputs_and_of_incoming_gradients():
    """Transposed weight, every other row of a buffer, an expanded incoming gradient: the same numbers."""
    hidden, weight, tokens, _ = HeadProblem(33, 5, 9).tensors()
    plain = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    rf.linear_logprob(*plain, tokens)[0].sum().backward()
    wide = torch.stack([hidden, -hidden], 1)
    strided = [wide[:, 0].requires_grad_(), weight.T.contiguous().T.requires_grad_()]
    assert not any(x.is_contiguous() for x in strided)
    logp, _ = rf.linear_logprob(*strided, tokens.int())
    logp.backward(torch.ones(()).expand(9))
    for one, other in zip(plain, strided, strict=True):
        assert within(other.grad, one.grad, rtol=1e-6, atol=1e-6)


def test_second_derivatives_are_refused_rather_than_wrong():
    hidden, weight, tokens, _ = HeadProblem(33, 5, 9).tensors()
    hidden.requires_grad_()
    logp, _ = rf.linear_logprob(hidden, weight, tokens)
    (first,) = torch.autograd.grad(logp.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_logprob_backward"):
        first.sum().backward()


def test_outputs_agree_with_token_stats():
    hidden, weight, tokens, bias = HeadProblem(1009, 65, 33, bias="random").tensors()
    logp, entropy = rf.linear_logprob(hidden, weight, tokens, bias=bias, temperature=0.7, softcap=5.0)
    stats = rf.token_stats(hidden, weight, tokens, bias=bias, temperature=0.7, softcap=5.0)
    assert torch.equal(logp, stats.logp)
    assert torch.equal(entropy, stats.entropy)


@pytest.mark.parametrize("with_bias", [False, True])
def test_opcheck(with_bias):
    """torch's own checks of a custom operator: schema, fake tensors, autograd registration, AOT with dynamic shapes."""
    hidden, weight, tokens, bias = HeadProblem(33, 5, 9, bias="random").tensors()
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    bias = leaves[2] if with_bias else None
    torch.library.opcheck(torch.ops.rlvr_fast.linear_logprob.default, (*leaves[:2], tokens, bias, 0.7, 5.0, "auto"))
    columns = [x.detach() for x in torch.ops.rlvr_fast.linear_logprob(*leaves[:2], tokens, bias, 0.7, 5.0, "auto")]
    upstream = torch.ones(9), torch.full((9,), 0.5)
    plain = [x.detach() for x in leaves]
    arguments = (*upstream, *plain[:2], tokens, plain[2] if with_bias else None, columns, 0.7, 5.0, "auto",
                 [True, True, with_bias])
    torch.library.opcheck(torch.ops.rlvr_fast.linear_logprob_backward.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_equals_eager(dynamic):
    """One graph, no break; the operator is opaque, so the numbers are the same bits."""
    weight, bias = torch.randn(33, 5, generator=torch.Generator().manual_seed(1)), torch.linspace(-1, 1, 33)

    def step(hidden, weight, bias, tokens):
        logp, entropy = rf.linear_logprob(hidden, weight, tokens, bias=bias, temperature=0.7, softcap=5.0)
        return (logp * torch.linspace(-1, 2, logp.shape[0])).sum() - 0.1 * entropy.sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n_tokens in (9, 4):
        hidden, _, tokens, _ = HeadProblem(33, 5, n_tokens).tensors()
        results = []
        for function in (step, compiled):
            leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
            value = function(*leaves, tokens)
            results.append((value, *torch.autograd.grad(value, leaves)))
        for eager, traced in zip(*results, strict=True):
            assert within(traced.detach(), eager.detach(), rtol=1e-6, atol=1e-7)


MEMORY_SCRIPT = """
import os
import sys
import torch
import rlvr_fast as rf
from rlvr_fast.backends import torch_backend

# A sixteenth of the usual tiles, so that small N and V are many of them.
torch_backend.TILE_ROWS, torch_backend.TILE_COLUMNS, torch_backend.SUM_ROWS = 256, 1024, 16
torch_backend.GRAM_TILE_FLOATS >>= 4

def resident(field):
    fields = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
    return int(fields[field].split()[0]) * 1024

torch.set_num_threads(1)
N, V, D, R = 2048, 8192, 4, 16
backend = sys.argv[1]
generator = torch.Generator().manual_seed(0)

def run(name, n, v):
    hidden, weight = (torch.randn(k, D, generator=generator).requires_grad_() for k in (n, v))
    tokens = torch.randint(0, v, (n,), generator=generator)
    if name == "plain":
        return torch.log_softmax(hidden @ weight.T, 1).gather(1, tokens[:, None])
    if name == "token_stats":
        return rf.token_stats(hidden, weight, tokens, hidden_grad=True, backend=backend)
    if name == "linear_logprob":
        logp, entropy = rf.linear_logprob(hidden, weight, tokens, backend=backend)
        return (logp + entropy).sum().backward()
    rewards = (torch.arange(R) % 2).float()
    rollouts = rf.Rollouts.from_padded(tokens.view(R, -1), None, rewards, group_size=R // 2)
    return rf.gradient_gap(hidden, weight, rollouts, level=name, backend=backend)

for name in sys.argv[2:]:
    if (child := os.fork()) == 0:  # a child's peak starts at what is resident now
        run(name, 64, 128)  # first-call allocations
        before = resident("VmRSS")
        run(name, N, V)
        print(name, (resident("VmHWM") - before) / (4 * N * V), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""
CALLS = ("token_stats", "linear_logprob", "logits", "hidden", "head")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak resident set from /proc")
@pytest.mark.parametrize("backend", ["torch", "native"])
def test_no_buffer_of_all_logits(backend):
    """Peak growth as a share of N·V·4 bytes (64 MiB here): below a quarter everywhere, above 1 for the plain formula.

    Temporaries belong to a tile, of which there are 64, or to the rows whose sums are being made, a sixteenth.
    """
    place_of(backend)
    command = [sys.executable, "-c", MEMORY_SCRIPT, backend, *CALLS, "plain"]
    # glibc keeps freed blocks below a threshold that adapts; fixing it makes the peak the same on every run.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    shares = {name: float(share) for name, share in map(str.split, output.splitlines())}
    assert shares.keys() == {*CALLS, "plain"}
    assert shares.pop("plain") > 1.0  # the measurement sees such a buffer
    assert max(shares.values()) < 0.25, shares

"""Compile and load every kernel that a training loop will call, before the loop begins.

Triton compiles one version of a kernel per combination of what it can exploit: which optional arguments are absent,
which integers are multiples of 16 and which pointers are aligned. Which combinations occur depends on where responses
begin in a batch, so no list of them is kept here: the real operations run on ragged batches of the loop's own size
until several in a row have compiled nothing.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from rlvr_fast import _validate as check
from rlvr_fast import backends
from rlvr_fast.gap import LEVELS, gradient_gap
from rlvr_fast.head import Head
from rlvr_fast.linear_logprob import linear_logprob
from rlvr_fast.synthetic import SyntheticBatch, whole
from rlvr_fast.token_stats import token_stats

TOKENS_PER_RESPONSE, GROUP_SIZE = 64, 8
QUIET_BATCHES = 4  # two with a multiple of 16 tokens, two without
MOST_BATCHES = 24
TOKENS_WITHOUT_COMPILER = 32


@dataclass(frozen=True)
class WarmedOperation:
    """Seconds of an operation's first and last call, and the kernels that its calls compiled or loaded, by name."""

    name: str
    first_seconds: float
    last_seconds: float
    compiled: dict[str, int]


@dataclass(frozen=True, repr=False)
class WarmUpReport:
    """What was made ready.

    Attributes:
        backend, device: which served the calls.
        operations: one entry per call.
        batches: how many batches were run.
        settled: the last ``QUIET_BATCHES`` batches compiled nothing, so that none is to be expected from the next.
    """

    backend: str
    device: torch.device
    operations: tuple[WarmedOperation, ...]
    batches: int
    settled: bool

    @property
    def compiled(self) -> int:
        """Kernel versions compiled, or loaded from Triton's cache on disk."""
        return sum(sum(operation.compiled.values()) for operation in self.operations)

    def __repr__(self) -> str:
        state = f"{self.compiled} kernel versions made ready" if self.compiled else "loaded; nothing to compile"
        warning = "" if self.settled else "; STILL COMPILING at the last batch: later batches may stall"
        lines = [f"WarmUpReport({self.backend} on {self.device}: {state} in {self.batches} batches{warning})"]
        for operation in self.operations:
            kernels = ", ".join(f"{name} x{count}" for name, count in sorted(operation.compiled.items()))
            lines.append(f"  {operation.name:<24} first {operation.first_seconds:8.3f} s, then "
                         f"{operation.last_seconds:8.4f} s  {kernels}".rstrip())
        return "\n".join(lines)


def warm_up(weight: torch.Tensor, *, bias: torch.Tensor | None = None, temperature: float = 1.0,
            softcap: float | None = None, levels: Sequence[str] = ("hidden",), differentiable: bool = False,
            n_tokens: int = 8192, backend: str = "auto") -> WarmUpReport:
    """Make ``token_stats``, ``gradient_gap`` and ``linear_logprob`` ready for a head, so that no training step waits.

    Call it once per process, after ``load_tiles`` if that is used. Needs the memory of the calls themselves. On a CPU
    backend, which compiles nothing, it loads the library and runs each call once on a few tokens.

    Args:
        weight, bias, temperature, softcap, backend: as the loop will pass them to ``token_stats``.
        levels: of ``gradient_gap``, those that the loop will ask for; may be empty.
        differentiable: the loop calls ``linear_logprob`` and its backward, with gradients for hidden and weight.
        n_tokens: tokens of the loop's batches; the largest if they differ.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    check.tensor("weight", weight, ndim=2, dtypes=check.FLOAT_DTYPES)
    Head.checked(weight[:0], weight, bias, temperature, softcap)
    if isinstance(levels, str) or not isinstance(levels, Sequence):
        raise TypeError(f"levels must be a sequence of levels, got {check.describe(levels)}")
    for level in levels:
        check.choice("levels", level, LEVELS)
    check.flag("differentiable", differentiable)
    whole("n_tokens", n_tokens)
    name = backends.resolve(backend, weight.device)
    # The kernels see whether there is a bias, not what it holds; zeros keep every random token in the vocabulary.
    bias = None if bias is None else torch.zeros_like(bias)
    options = {"bias": bias, "temperature": temperature, "softcap": softcap, "backend": backend}
    calls = _calls(tuple(dict.fromkeys(levels)), differentiable, options)

    compiles = name == "triton"
    size = n_tokens if weight.is_cuda else min(n_tokens, TOKENS_WITHOUT_COMPILER)
    most = MOST_BATCHES if compiles else 1
    seconds: dict[str, list[float]] = {call: [] for call in calls}
    compiled: dict[str, Counter[str]] = {call: Counter() for call in calls}
    batches = quiet = 0
    while batches < most and quiet < QUIET_BATCHES:
        batch = _batch(weight, size, batches)
        before = sum(map(Counter.total, compiled.values()))
        for call, run in calls.items():
            with count_compilations() as found:
                seconds[call].append(_seconds(run, batch))
            compiled[call].update(found)
        batches += 1
        quiet = quiet + 1 if sum(map(Counter.total, compiled.values())) == before else 0
    operations = tuple(WarmedOperation(call, times[0], times[-1], dict(compiled[call]))
                       for call, times in seconds.items())
    return WarmUpReport(name, weight.device, operations, batches, quiet >= min(QUIET_BATCHES, most))


def _calls(levels: tuple[str, ...], differentiable: bool, options: dict[str, Any]
           ) -> dict[str, Callable[[SyntheticBatch], None]]:
    """Every call that the loop will make, as a function of a batch."""

    def stats(batch: SyntheticBatch) -> None:
        token_stats(batch.hidden, batch.weight, batch.rollouts.tokens, **options)

    def gap(level: str, batch: SyntheticBatch) -> None:
        gradient_gap(batch.hidden, batch.weight, batch.rollouts, level=level, **options)

    def forward_and_backward(batch: SyntheticBatch) -> None:
        hidden, weight = (x.detach().requires_grad_() for x in (batch.hidden, batch.weight))
        with torch.enable_grad():
            logp, entropy = linear_logprob(hidden, weight, batch.rollouts.tokens, **options)
            torch.autograd.grad(logp.sum() + entropy.sum(), (hidden, weight))

    calls: dict[str, Callable[[SyntheticBatch], None]] = {"token_stats": stats}
    for level in levels:
        calls[f"gradient_gap {level}"] = partial(gap, level)
    if differentiable:
        calls["linear_logprob fwd+bwd"] = forward_and_backward
    return calls


def _batch(weight: torch.Tensor, n_tokens: int, index: int) -> SyntheticBatch:
    """Ragged batches with, by turns, a multiple of 16 tokens and not."""
    whole_blocks = max(n_tokens // 16 * 16, 1)
    n_tokens = whole_blocks if index % 2 == 0 else max(whole_blocks - 1 - 2 * index, 1)
    n_responses = max(n_tokens // TOKENS_PER_RESPONSE // GROUP_SIZE, 1) * GROUP_SIZE
    return SyntheticBatch.draw(vocabulary_size=weight.shape[0], hidden_size=weight.shape[1], n_tokens=n_tokens,
                               n_responses=n_responses, group_size=GROUP_SIZE, dtype=weight.dtype,
                               device=weight.device, seed=index, weight=weight.detach())


def _seconds(run: Callable[[SyntheticBatch], None], batch: SyntheticBatch) -> float:
    started = time.perf_counter()
    run(batch)
    if batch.weight.is_cuda:
        torch.cuda.synchronize(batch.weight.device)
    return time.perf_counter() - started


@contextlib.contextmanager
def count_compilations() -> Iterator[Counter[str]]:
    """Counts, by kernel name, what Triton compiles or loads from its disk cache inside the block."""
    found: Counter[str] = Counter()
    try:
        from triton import knobs
    except ImportError:
        yield found
        return
    other = knobs.compilation.listener

    def listen(*, src: Any, **details: Any) -> None:
        found[src.name] += 1
        if other is not None:
            other(src=src, **details)

    knobs.compilation.listener = listen
    try:
        yield found
    finally:
        knobs.compilation.listener = other

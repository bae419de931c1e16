"""The per-response sums of log-ratios: Triton kernel against exact sums."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from itertools import pairwise

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
triton = pytest.importorskip("triton")

from rlvr_fast import Rollouts  # noqa: E402
from rlvr_fast.kernels.log_ratio_moments import BLOCK_TOKENS, log_ratio_sums  # noqa: E402
from rlvr_fast.step.measure import measure_step  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.interpreter


def make_batch(lengths, dtypes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    logps = [(-5 * torch.rand(int(cu_seqlens[-1]), generator=generator)).to(dtype) for dtype in dtypes]
    return logps, cu_seqlens


def exact_sums(before, after, cu_seqlens):
    """Correctly rounded sums of the exact differences."""
    before, after, bounds = before.double().tolist(), after.double().tolist(), cu_seqlens.tolist()
    return [math.fsum([*after[start:stop], *(-x for x in before[start:stop])])
            for start, stop in pairwise(bounds)]


def on_device(*tensors):
    return [tensor.to(DEVICE) for tensor in tensors]


@pytest.mark.parametrize("lengths", [
    [1], [0], [0, 0, 3, 0], [BLOCK_TOKENS], [BLOCK_TOKENS - 1, BLOCK_TOKENS + 1, 5], [3 * BLOCK_TOKENS + 7, 0, 1],
], ids=str)
@pytest.mark.parametrize("dtypes", [
    (torch.float32,) * 3, (torch.bfloat16,) * 3, (torch.float16,) * 3, (torch.float64,) * 3,
    (torch.bfloat16, torch.float32, torch.float64),
], ids=str)
def test_sums_are_exact_to_double_rounding(lengths, dtypes):
    (before, after, reverse), cu_seqlens = make_batch(lengths, dtypes)
    sums = log_ratio_sums(*on_device(before, after, reverse, cu_seqlens)).cpu()
    assert sums.dtype == torch.float64
    assert sums.shape == (len(lengths), 2)
    for column, x in enumerate((after, reverse)):
        expected = torch.tensor(exact_sums(before, x, cu_seqlens), dtype=torch.float64)
        # 4,000 additions of terms below 5: 4,000 * 5 * 2^-53 at the very most
        torch.testing.assert_close(sums[:, column], expected, rtol=0, atol=2e-12)


def test_without_the_reversed_step_the_second_column_is_zero():
    (before, after), cu_seqlens = make_batch([3, 2000, 0], (torch.float32,) * 2)
    sums = log_ratio_sums(*on_device(before, after), None, *on_device(cu_seqlens)).cpu()
    torch.testing.assert_close(sums[:, 0].tolist(), exact_sums(before, after, cu_seqlens), rtol=0, atol=2e-12)
    assert (sums[:, 1] == 0).all()


def test_no_responses():
    empty = torch.zeros(0, device=DEVICE)
    assert log_ratio_sums(empty, empty, empty, torch.zeros(1, dtype=torch.int64, device=DEVICE)).shape == (0, 2)


def test_small_change_of_a_long_response_survives():
    """Log-probs near -20, a change of 1e-6 per token: float32 sums of the log-probs would lose it entirely."""
    n = 100_000
    before = torch.full((n,), -20.0, dtype=torch.float64)
    sums = log_ratio_sums(*on_device(before, before + 1e-6), None, *on_device(torch.tensor([0, n])))
    assert sums[0, 0].item() == pytest.approx(n * 1e-6, rel=1e-8)


def test_measure_step_agrees_between_backends_on_strided_input():
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(12, 40, generator=generator) < 0.6
    rollouts = Rollouts.from_padded(torch.ones(12, 40, dtype=torch.int64), mask,
                                    (torch.rand(12, generator=generator) < 0.5).float(), group_size=4).to(DEVICE)
    logps = [-torch.rand(rollouts.n_tokens, 2, generator=generator)[:, 0].to(DEVICE) for _ in range(3)]
    by_triton, by_torch = (measure_step(logps[0], logps[1], rollouts, logp_reverse=logps[2], backend=backend)
                           for backend in ("triton", "torch"))
    for name in ("log_odds_gain", "stderr", "alignment", "curvature", "ess", "success_gain", "success_curvature"):
        torch.testing.assert_close(getattr(by_triton, name), getattr(by_torch, name), rtol=1e-10, atol=1e-12,
                                   equal_nan=True)


@pytest.mark.skipif(DEVICE == "cuda", reason="needs tensors that are not on a GPU")
def test_triton_without_a_gpu_or_interpreter_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    rollouts = Rollouts.from_packed(torch.ones(2, dtype=torch.int64), torch.tensor([0, 1, 2]), torch.tensor([0.0, 1.0]),
                                    group_size=2)
    with pytest.raises(ValueError, match=r"GPU.*TRITON_INTERPRET"):
        measure_step(-torch.ones(2), -torch.ones(2), rollouts, backend="triton")


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from rlvr_fast.kernels.log_ratio_moments import aot_specializations

chosen = [s for s in aot_specializations() if s["hot"] or s["name"] == "log_ratio_bf16_one_way"]
assert len(chosen) == 2
for target in (GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("cuda", 100, 32),
               GPUTarget("hip", "gfx942", 64)):
    for s in chosen:
        source = ASTSource(s["fn"], signature=s["signature"], constexprs=s["constexprs"])
        options = {"num_warps": s["num_warps"], "num_stages": s["num_stages"]}
        binary = triton.compile(source, target=target, options=options)
        assert binary.asm["hsaco" if target.backend == "hip" else "cubin"]
print("compiled")
"""


def test_compiles_ahead_of_time_for_every_target():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True,
                            timeout=120)
    assert result.stdout.strip() == "compiled", result.stderr


@pytest.mark.gpu
def test_measure_step_does_not_synchronise_and_repeats_bitwise():
    (before, after, reverse), cu_seqlens = make_batch([700] * 512, (torch.float32,) * 3)
    rewards = (torch.rand(512, generator=torch.Generator().manual_seed(2)) < 0.5).float()
    rollouts = Rollouts.from_packed(torch.ones(len(before), dtype=torch.int64), cu_seqlens, rewards, group_size=8)
    rollouts, (before, after, reverse) = rollouts.to(DEVICE), on_device(before, after, reverse)
    first = measure_step(before, after, rollouts, logp_reverse=reverse)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = measure_step(before, after, rollouts, logp_reverse=reverse)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name in ("log_odds_gain", "stderr", "alignment", "curvature", "success_gain", "success_curvature", "ess"):
        assert torch.equal(getattr(first, name), getattr(again, name))

"""Rows of logits, what float64 says of them, and every implementation of the row pass as one function of CPU tensors.

The CUDA kernel runs on the CPU too: its source, compiled by g++ with tests/cuda_on_cpu in place of CUDA's headers.

Tolerances: the logits are given, so fp32 errs by one rounding of the largest scaled logit, ``error``; the statistics
inherit it as ``kernel_cases`` tells. A derivative adds the rounding to the block's dtype: an ulp, since Triton's
interpreter truncates.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from kernel_cases import BF16, EPS, FP16, HALF_ULP, assert_pass

import rlvr_fast.reference as ref
from rlvr_fast.backends import TokenPass, cuda_rows, row_pass
from rlvr_fast.kernels.row_stats import N_RESULTS, row_stats

ROOT = Path(__file__).resolve().parent.parent
FP32 = torch.float32
DTYPES = (FP32, BF16, FP16)
SMALLEST = {FP32: 1e-37, BF16: 1e-37, FP16: 6e-8}  # of magnitude below it a dtype keeps no digits
SENTINEL = 77.0  # what lies around the rows; exact in every dtype
CODES = {FP32: 0, BF16: 1, FP16: 2}
ON_CPU = ("torch-cpu", pytest.param("triton-cpu", marks=pytest.mark.interpreter),
          "cuda on cpu-streaming", "cuda on cpu-clusters")
ON_GPU = tuple(pytest.param(f"{name}-cuda", marks=pytest.mark.gpu) for name in row_pass.NAMES)
ALL = (*ON_CPU, *ON_GPU)


@dataclass(frozen=True)
class Rows:
    """Logits that fp32 and the dtype hold exactly, a third of them at -inf if ``masked``."""

    vocabulary: int
    dtype: torch.dtype = FP32
    temperature: float = 1.0
    softcap: float | None = None
    masked: bool = False
    n: int = 3
    spread: float = 3.0

    def __str__(self) -> str:
        options = [f"T{self.temperature:g}"] * (self.temperature != 1) + ["cap"] * bool(self.softcap)
        return "-".join([f"V{self.vocabulary}", str(self.dtype).removeprefix("torch."), *options,
                         *["masked"] * self.masked])

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.vocabulary)
        logits = self.spread * torch.randn(self.n, self.vocabulary, generator=generator)
        tokens = torch.randint(0, self.vocabulary, (self.n,), generator=generator)
        if self.masked:
            gone = torch.rand(self.n, self.vocabulary, generator=generator) < 1 / 3
            logits[gone.scatter(1, tokens[:, None], False)] = -torch.inf
        return logits.to(self.dtype), tokens

    @property
    def options(self) -> dict:
        return {"temperature": self.temperature, "softcap": self.softcap}


class Truth:
    """What float64 says of some rows."""

    def __init__(self, logits, tokens, temperature=1.0, softcap=None):
        raw = logits.double()
        capped = raw if softcap is None else torch.where(raw == -torch.inf, raw, softcap * torch.tanh(raw / softcap))
        slope = torch.ones_like(raw) if softcap is None else 1 / torch.cosh(raw / softcap) ** 2
        z = capped / temperature
        self.score = ref.score(z, tokens, slope / temperature)
        self.fields = {"logp": ref.log_prob(z, tokens), "lse": z.logsumexp(1), "entropy": ref.entropy(z),
                       "sum_p_sq": ref.sum_p_sq(z), "score_sq": ref.score_sq(z, tokens, slope / temperature),
                       "off_mass": ref.off_target_mass(z, tokens)}
        self.error = 2 * EPS * (z[z.isfinite()].abs().max().item() + (softcap or 0.0) / temperature)

    def check(self, actual: TokenPass, block: torch.Tensor | None = None) -> None:
        assert_pass(actual, self.fields, self.error)
        if block is not None:
            rtol = 4 * self.error + 16 * EPS + 2 * HALF_ULP[block.dtype]
            excess = (block.double() - self.score).abs() - rtol * self.score.abs()
            assert (excess <= SMALLEST[block.dtype]).all(), f"derivatives beyond what is allowed by {excess.max():.3g}"


@functools.cache
def emulated(directory: Path) -> ctypes.CDLL:
    """The CUDA row pass as a shared library for the CPU, compiled once per session into ``directory``."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++ to compile the CUDA kernel for the CPU")
    library = directory / "row_pass_on_cpu.so"
    shim = ROOT / "tests" / "cuda_on_cpu"
    # Shared memory is thread_local without initialisers, also where it is declared extern.
    done = subprocess.run([compiler, "-std=c++20", "-O1", "-Wall", "-Wno-unknown-pragmas", "-fno-extern-tls-init",
                           "-fPIC", "-shared", "-pthread", f"-I{shim}", f"-I{ROOT / 'csrc' / 'cuda'}",
                           str(shim / "row_pass_on_cpu.cpp"), "-o", str(library)],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


class RowPass:
    """One implementation on one device.

    ``run`` puts logits and block between sentinels, ``offset`` elements into a buffer whose rows are ``padding`` wider,
    and checks that the sentinels are still there.
    """

    def __init__(self, name: str, directory: Path):
        self.implementation, _, place = name.partition("-")
        self.device = torch.device(place if place in ("cpu", "cuda") else "cpu")
        self.layout = place
        if self.implementation == "cuda":
            reason = cuda_rows.unavailable(self.device)
            if reason is not None:
                pytest.skip(reason)
        if self.implementation == "cuda on cpu":
            self.library = emulated(directory)

    def run(self, logits, tokens, temperature=1.0, softcap=None, block=None, offset=0, padding=0, **options):
        """(TokenPass, block), both on the CPU. ``block``: None, a dtype, or "in place"."""
        buffer, inside = self._framed(logits.shape, logits.dtype, offset, padding)
        inside.copy_(logits)
        frames, target = [(buffer, inside)], None
        if block == "in place":
            target = inside
        elif block is not None:
            frames.append(self._framed(logits.shape, block, offset, padding))
            target = frames[-1][1]
        results = self._call(inside, tokens.to(self.device), temperature, softcap, target, **options)
        written = None if target is None else target.cpu().clone()
        for frame, content in frames:
            content.fill_(SENTINEL)
            assert (frame == SENTINEL).all(), "wrote outside the rows"
        return TokenPass(*(column.cpu() for column in results)), written

    def _framed(self, shape, dtype, offset, padding):
        """(buffer, its [C, V] inside): adjacent elements, row stride V + padding."""
        rows, width = shape
        buffer = torch.full((64 + offset + rows * (width + padding),), SENTINEL, dtype=dtype, device=self.device)
        return buffer, buffer[offset:].as_strided((rows, width), (width + padding, 1), offset)

    def _call(self, logits, tokens, temperature, softcap, block, **options):
        if self.implementation == "cuda on cpu":
            return self._emulate(logits, tokens, temperature, softcap, block, **options)
        if self.implementation == "triton" and self.device.type == "cpu":
            results = torch.empty(N_RESULTS, len(logits))
            row_stats(logits, tokens, temperature, softcap, block, results, lanes=16)  # small rows cross tile borders
            return results
        if options:
            return cuda_rows.logits_pass(logits, tokens, temperature, softcap, block, **options)
        return row_pass.logits_pass(logits, tokens, temperature, softcap, block, backend=self.implementation)

    def _emulate(self, logits, tokens, temperature, softcap, block, smallest_cluster=1, backward=False):
        results = torch.full((N_RESULTS, len(logits)), torch.nan)
        n_vectors = -(-logits.shape[1] * logits.element_size() // 16)
        # Room for a quarter of the row: four thread blocks share it.
        limit = 0 if self.layout == "streaming" else 16 * -(-n_vectors // 4)
        clusters = self.library.row_pass_on_cpu(
            CODES[logits.dtype], ctypes.c_void_p(logits.data_ptr()), ctypes.c_int64(logits.stride(0)),
            ctypes.c_void_p(tokens.data_ptr()), CODES[logits.dtype if block is None else block.dtype],
            ctypes.c_void_p(None if block is None else block.data_ptr()),
            ctypes.c_int64(0 if block is None else block.stride(0)), ctypes.c_int64(len(logits)), logits.shape[1],
            ctypes.c_float(1.0 / temperature), ctypes.c_float(softcap or 0.0), ctypes.c_void_p(results.data_ptr()),
            ctypes.c_int64(limit), smallest_cluster, 8, 64, ctypes.c_bool(backward))
        assert clusters > 0
        return results

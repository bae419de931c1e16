"""Warm-up: it runs what it was asked for, stops when nothing compiles any more, and says what it did."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest
import torch

import rlvr_fast as rf
from rlvr_fast.backends import native_backend, triton_backend

warm_up_module = importlib.import_module("rlvr_fast.warm_up")
WEIGHT = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off where there is a GPU")


@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=pytest.mark.skipif(
    native_backend.unavailable(torch.device("cpu")) is not None, reason="the native extension is not built"))])
def test_a_cpu_backend_runs_every_call_once_and_says_that_nothing_compiles(backend):
    report = rf.warm_up(WEIGHT, levels=("logits", "hidden", "head"), differentiable=True, backend=backend)
    assert [operation.name for operation in report.operations] == [
        "token_stats", "gradient_gap logits", "gradient_gap hidden", "gradient_gap head", "linear_logprob fwd+bwd"]
    assert (report.backend, report.batches, report.compiled, report.settled) == (backend, 1, 0, True)
    assert all(operation.first_seconds > 0 for operation in report.operations)
    assert f"{backend} on cpu: loaded; nothing to compile" in repr(report)


def test_only_what_is_asked_for_runs():
    assert [operation.name for operation in rf.warm_up(WEIGHT, levels=()).operations] == ["token_stats"]
    names = [operation.name for operation in rf.warm_up(WEIGHT, levels=("head", "head")).operations]
    assert names == ["token_stats", "gradient_gap head"]


def test_the_head_is_left_alone():
    weight, bias = WEIGHT.clone().requires_grad_(), torch.zeros(50)
    bias[3] = -torch.inf
    rf.warm_up(weight, bias=bias, temperature=0.7, softcap=5.0, differentiable=True)
    assert weight.grad is None
    assert weight.requires_grad
    assert torch.equal(weight.detach(), WEIGHT)
    assert bias[3] == -torch.inf


@on_cpu
@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
def test_the_triton_backend_sees_batches_of_both_kinds(monkeypatch):
    """Token counts that are multiples of 16 and that are not, with the head's own options."""
    sizes = []
    head_pass = triton_backend.head_pass

    def spy(hidden, tokens, head):
        sizes.append(len(hidden))
        assert head.softcap == 5.0
        assert head.bias is not None
        return head_pass(hidden, tokens, head)

    monkeypatch.setattr(triton_backend, "head_pass", spy)
    report = rf.warm_up(WEIGHT, bias=torch.ones(50), softcap=5.0, levels=(), backend="triton", n_tokens=20)
    assert report.settled
    assert report.batches == warm_up_module.QUIET_BATCHES == len(sizes)
    assert sum(size % 16 == 0 for size in sizes) == sum(size % 16 != 0 for size in sizes) == 2


def with_compilations(monkeypatch, compiles_at) -> rf.WarmUpReport:
    """A warm-up whose one call compiles a kernel at the batches of ``compiles_at``."""
    from triton import knobs

    class Source:
        name = "kernel"

    batches = iter(range(10**6))

    def call(_):
        if next(batches) in compiles_at:
            knobs.compilation.listener(src=Source, cache_hit=False)

    monkeypatch.setattr(warm_up_module, "_calls", lambda *_: {"token_stats": call})
    return rf.warm_up(WEIGHT, backend="triton", n_tokens=16)


@on_cpu
def test_it_goes_on_until_four_batches_in_a_row_compile_nothing(monkeypatch):
    report = with_compilations(monkeypatch, {0, 1, 4})
    assert report.batches == 4 + 1 + warm_up_module.QUIET_BATCHES
    assert report.settled
    assert report.operations[0].compiled == {"kernel": 3}
    assert "3 kernel versions made ready" in repr(report)
    assert "kernel x3" in repr(report)


@on_cpu
def test_it_gives_up_and_says_so(monkeypatch):
    report = with_compilations(monkeypatch, range(10**6))
    assert report.batches == warm_up_module.MOST_BATCHES
    assert not report.settled
    assert "STILL COMPILING" in repr(report)


REAL_COMPILER = """
import triton
from triton import knobs
from compile_kernels import compile_one, specializations
from rlvr_fast.warm_up import count_compilations

heard = []
mine = lambda **details: heard.append(details["cache_hit"])
knobs.compilation.listener = mine
entry = next(e for e in specializations() if e["name"] == "combine_stats")
with count_compilations() as found:
    for _ in range(2):
        assert compile_one(entry, "sm90").failure is None
assert found == {"combine_stats_kernel": 2}, found
assert heard == [False, True], heard
assert knobs.compilation.listener is mine
compile_one(entry, "sm80")
assert found == {"combine_stats_kernel": 2}, found
"""


def test_the_counter_hears_the_real_compiler_and_passes_on_to_other_listeners(tmp_path):
    """In a process without the interpreter, from an empty cache: one compilation, one load from the cache."""
    bench = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "bench")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join([bench, environment.get("PYTHONPATH", "")]),
                    "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", REAL_COMPILER], env=environment, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"weight": [1.0]}, TypeError, "weight must be"),
    ({"weight": WEIGHT.double()}, TypeError, "weight must have dtype"),
    ({"bias": torch.zeros(3)}, ValueError, "bias must have shape"),
    ({"levels": "hidden"}, TypeError, "levels must be a sequence"),
    ({"levels": ("model",)}, ValueError, "levels must be one of"),
    ({"differentiable": 1}, TypeError, "differentiable must be a bool"),
    ({"n_tokens": 0}, ValueError, "n_tokens must be at least 1"),
    ({"temperature": 0.0}, ValueError, "temperature must be positive"),
    ({"backend": "cuda"}, ValueError, "backend must be one of"),
])
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        rf.warm_up(**{"weight": WEIGHT} | change)


@pytest.mark.gpu
def test_after_a_warm_up_a_gpu_compiles_nothing():
    weight = torch.randn(5000, 256, device="cuda", dtype=torch.bfloat16)
    report = rf.warm_up(weight, levels=("logits", "hidden", "head"), differentiable=True, n_tokens=2048)
    assert report.settled
    assert report.compiled > 0
    again = rf.warm_up(weight, levels=("logits", "hidden", "head"), differentiable=True, n_tokens=2048)
    assert again.compiled == 0

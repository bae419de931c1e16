"""Which backend serves a call, and what is said when one cannot."""

from __future__ import annotations

import pytest
import torch
from policies import HeadProblem, within

import rlvr_fast as rf
from rlvr_fast import backends
from rlvr_fast.backends import native_backend, torch_backend, triton_backend

CPU = torch.device("cpu")
NATIVE_BUILT = native_backend.unavailable(CPU) is None
OPERATIONS = ("head_pass", "head_pass_with_sums", "head_pass_with_gradient", "head_pass_with_gram", "through_head",
              "hidden_gradient", "linear_logprob_backward", "head_gram")


@pytest.fixture
def without_native(monkeypatch):
    """As on a machine where the extension could not be built."""
    monkeypatch.setattr(native_backend, "_native", None)
    monkeypatch.setattr(native_backend, "IMPORT_ERROR", "no module named rlvr_fast._native", raising=False)


def test_available_gives_a_reason_for_every_backend_that_cannot_run():
    reasons = rf.available_backends()
    assert tuple(reasons) == backends.NAMES
    assert reasons["torch"] is None
    assert all(reason is None or reason for reason in reasons.values())
    for device in ("cuda", "meta"):
        assert "native backend runs on the CPU" in backends.available(device)["native"]
        assert backends.available(torch.device(device))["torch"] is None


def test_torch_implements_every_operation():
    for operation in OPERATIONS:
        assert callable(getattr(torch_backend, operation))


def test_no_module_has_an_operation_that_is_not_in_the_list():
    """``select`` finds operations by name: a misspelt one would silently fall back to torch."""
    for module in (native_backend, triton_backend):
        public = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")
                  and getattr(value, "__module__", None) == module.__name__]
        assert set(public) <= {*OPERATIONS, "unavailable"}


@pytest.mark.skipif(not NATIVE_BUILT, reason="the native extension is not built")
def test_auto_takes_native_on_a_cpu():
    assert backends.select("head_pass", "auto", CPU) is native_backend.head_pass
    assert backends.select("head_pass_with_sums", "auto", CPU) is native_backend.head_pass_with_sums


def test_auto_falls_back_to_torch_without_the_extension(without_native):
    assert backends.select("head_pass", "auto", CPU) is torch_backend.head_pass
    hidden, weight, tokens, _ = HeadProblem(33, 5, 9).tensors()
    assert torch.equal(rf.token_stats(hidden, weight, tokens).logp,
                       rf.token_stats(hidden, weight, tokens, backend="torch").logp)


def test_a_missing_extension_is_explained(without_native):
    assert "not built (no module named rlvr_fast._native)" in rf.available_backends()["native"]
    hidden, weight, tokens, _ = HeadProblem(33, 5, 9).tensors()
    with pytest.raises(ValueError, match=r"backend 'native' cannot run: the native extension is not built \(no module"):
        rf.token_stats(hidden, weight, tokens, backend="native")


def test_auto_takes_triton_on_a_gpu_and_torch_elsewhere(monkeypatch):
    """Decided from the device alone, so it can be asked without one."""
    monkeypatch.setattr(triton_backend, "unavailable", lambda device: None)
    assert backends.select("head_pass", "auto", torch.device("cuda")) is triton_backend.head_pass
    monkeypatch.setattr(triton_backend, "unavailable", lambda device: "no kernels here")
    assert backends.select("head_pass", "auto", torch.device("cuda")) is torch_backend.head_pass
    assert backends.select("head_pass", "auto", torch.device("meta")) is torch_backend.head_pass


def test_an_operation_that_a_backend_leaves_out_is_served_by_torch(monkeypatch):
    monkeypatch.setattr(native_backend, "unavailable", lambda device: None)
    assert backends.select("head_gram", "native", CPU) is torch_backend.head_gram


@pytest.mark.parametrize("backend", [name for name in backends.NAMES if name != "torch"])
def test_a_named_backend_never_falls_back_silently(backend, monkeypatch):
    module = {"native": native_backend, "triton": triton_backend}[backend]
    monkeypatch.setattr(module, "unavailable", lambda device: "it is away")
    for operation in OPERATIONS:
        with pytest.raises(ValueError, match=f"backend '{backend}' cannot run: it is away"):
            backends.select(operation, backend, CPU)


def test_backends_agree():
    hidden, weight, tokens, bias = HeadProblem(1009, 65, 33, bias="random").tensors()
    results = {name: rf.token_stats(hidden, weight, tokens, bias=bias, softcap=9.0, hidden_grad=True, backend=name)
               for name in ("torch", "native") if rf.available_backends()[name] is None}
    for stats in results.values():
        for name in ("logp", "lse", "entropy", "sum_p_sq", "score_sq", "hidden_grad"):
            assert within(getattr(stats, name), getattr(results["torch"], name), rtol=1e-4, atol=1e-5), name


@pytest.mark.skipif(not NATIVE_BUILT, reason="the native extension is not built")
def test_native_instruction_sets_are_named():
    native = native_backend._native
    assert native.instruction_set("baseline") == "baseline"
    assert native.instruction_set("auto") in ("baseline", "avx2", "avx512")
    with pytest.raises(ValueError, match="instruction_set mmx cannot run"):
        native.instruction_set("mmx")

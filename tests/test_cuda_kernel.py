"""What is CUDA's own in the row pass: clusters on the CPU, the layout, the extension and the compile gate."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import BF16
from row_passes import CODES, FP32, RowPass, Rows, Truth, emulated

from rlvr_fast.backends import cuda_rows

GATE = Path(__file__).parent.parent / "bench" / "compile_cuda.py"


@pytest.fixture(scope="session")
def directory(tmp_path_factory) -> Path:
    """The same for every test of the session, so that what is compiled there is compiled once."""
    return tmp_path_factory.getbasetemp()


@pytest.mark.parametrize("smallest_cluster", [1, 2, 8])
def test_a_cluster_agrees_whatever_its_size_and_order(directory, smallest_cluster):
    """More blocks than vectors included: V = 20 has five vectors for eight blocks."""
    clusters = RowPass("cuda on cpu-clusters", directory)
    for rows in (Rows(20), Rows(1001, n=2)):
        logits, tokens = rows.tensors()
        options = {"block": FP32, "smallest_cluster": smallest_cluster}
        actual, derivatives = clusters.run(logits, tokens, **options)
        Truth(logits, tokens).check(actual, derivatives)
        reordered, others = clusters.run(logits, tokens, backward=True, **options)
        assert torch.equal(torch.stack(actual), torch.stack(reordered))
        assert torch.equal(derivatives, others)


@pytest.mark.parametrize("layout", ["streaming", "clusters"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_threads_that_take_many_vectors(directory, layout, dtype):
    """Several rounds of loads, the last one partly beyond the row, and a vector that the row ends in."""
    logits, tokens = Rows(5003, dtype, n=2).tensors()
    tokens[1] = 5002
    actual, derivatives = RowPass(f"cuda on cpu-{layout}", directory).run(logits, tokens, block="in place", padding=5)
    Truth(logits, tokens).check(actual, derivatives)


@pytest.mark.parametrize(("vocabulary", "dtype", "limit", "largest", "expected"), [
    (152064, FP32, 227 << 10, 8, (4, 152064)),
    (152064, BF16, 227 << 10, 8, (2, 152064)),
    (262144, FP32, 227 << 10, 8, (8, 131072)),
    (49152, FP32, 227 << 10, 8, (1, 196608)),
    (33, FP32, 227 << 10, 8, (1, 144)),
    (40000, FP32, 163 << 10, 1, (1, 160000)),
    (152064, FP32, 163 << 10, 1, (1, 0)),  # no clusters: swept twice
    (2000000, FP32, 227 << 10, 8, (1, 0)),
])
def test_a_row_takes_the_fewest_blocks_that_hold_it(directory, vocabulary, dtype, limit, largest, expected):
    def layout(second_sweep: bool) -> tuple[int, ...]:
        result = (ctypes.c_int64 * 2)()
        emulated(directory).row_layout_of(CODES[dtype], ctypes.c_int64(vocabulary), second_sweep,
                                          ctypes.c_int64(limit), 1, largest, result)
        return tuple(result)

    assert layout(True) == expected
    assert layout(False) == (1, 0)  # statistics alone never look twice


@pytest.mark.skipif(importlib.util.find_spec("rlvr_fast._cuda_rows") is None, reason="the extension is not built")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_extension_imports_without_a_gpu_and_says_what_failed():
    with pytest.raises(RuntimeError, match=r"row pass: asking .* failed: cudaError"):
        cuda_rows.row_layout(FP32, 152064, True, torch.device("cuda", 0))


# -- the compile gate --------------------------------------------------------------------------------------------------

REPORT = """
ptxas info    : Compiling entry function '_Z4goodv' for 'sm_90a'
ptxas info    : Function properties for _Z4goodv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 54 registers, used 1 barriers, 640 bytes smem
ptxas info    : Compiling entry function '_Z3badv' for 'sm_90a'
ptxas info    : Function properties for _Z3badv
    8 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 8 bytes cumulative stack size
"""


@pytest.fixture
def gate(monkeypatch):
    """The gate as a module."""
    monkeypatch.syspath_prepend(str(GATE.parent))
    return importlib.import_module("compile_cuda")


def test_the_gate_tells_spills_from_none(gate):
    good, bad = gate.parse(REPORT)
    assert (good.kernel, good.target, good.registers, good.shared) == ("_Z4goodv", "sm_90a", 54, 640)
    assert good.failure is None
    assert (bad.spills, bad.failure) == (12, "spills")
    with pytest.raises(ValueError, match="no figures"):
        gate.parse(REPORT.replace("registers", "Register"))


def test_the_gate_needs_nvcc(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "CUDA_HOME"} | {"PATH": str(tmp_path)}
    for arguments, status in (((), 2), (("--skip-without-nvcc",), 0)):
        done = subprocess.run([sys.executable, GATE, *arguments], env=environment, capture_output=True, text=True,
                              check=False)
        assert done.returncode == status
        assert "no nvcc" in done.stderr

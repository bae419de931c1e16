"""The benchmark runner on a tiny shape: every provider measured or listed with the reason. No time is asserted."""

import csv
import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"
KERNELS = {"token_stats", "gradient_gap hidden", "gradient_gap logits", "gradient_gap head", "linear_logprob fwd+bwd",
           "advantages + loss_weights", "measure_step"}
HAS_TRL = importlib.util.find_spec("trl") is not None


def run(output, *options):
    environment = {**os.environ, "TORCH_COMPILE_DISABLE": "1"}  # compiling takes longer than everything else here
    command = [sys.executable, str(BENCH / "run.py"), "--threads", "1", "--output", str(output), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    if importlib.util.find_spec("pytest_benchmark") is None:
        pytest.skip("pytest-benchmark is not installed")
    output = tmp_path_factory.mktemp("bench")
    result = run(output, "--shape", "64,300,16", "--rounds", "2")
    assert result.returncode == 0, result.stdout + result.stderr
    with (output / "cpu_64x300x16.csv").open() as file:
        return result.stdout, list(csv.DictReader(file))


@pytest.fixture(scope="module")
def rows(finished):
    return finished[1]


def test_every_kernel_has_its_floor_and_this_package(rows):
    for kernel in KERNELS:
        providers = [row["provider"] for row in rows if row["kernel"] == kernel and row["metric"] == "milliseconds"]
        assert providers[0] == "gemm"
        assert any(name.startswith("rlvr_fast") for name in providers)
        assert len(set(providers)) == len(providers) >= 4
    assert {row["kernel"] for row in rows} == KERNELS


def test_measured_rows_are_complete_and_finite(rows):
    measured = [row for row in rows if row["median"]]
    assert measured
    for row in measured:
        assert 0 < float(row["p20"]) <= float(row["median"]) <= float(row["p80"])
        assert 0 < float(row["ratio_to_gemm"]) < math.inf
        assert math.isfinite(float(row["extra_memory_share"])) or row["note"]
        assert row["rounds"] == "2"
        if row["provider"] == "gemm":
            assert float(row["ratio_to_gemm"]) == 1.0


def test_every_provider_answers_the_question(rows):
    """1e-5 is 25 to 80 times the float32 errors seen here; a wrong formula errs by 1e-2 and more."""
    answers = [row for row in rows if row["median"] and row["provider"] != "gemm"]
    for row in answers:
        assert 0 <= float(row["error"]) < 1e-5, row


def test_what_cannot_run_is_listed_with_the_reason(rows):
    reasons = {row["provider"]: row["note"] for row in rows if not row["median"]}
    assert "TORCH_COMPILE_DISABLE" in reasons["torch.compile"]
    assert all(reasons.values())
    if not HAS_TRL:
        assert "trl" in reasons["trl chunked"]


def test_provenance_is_in_every_row(rows):
    for row in rows:
        assert row["shape"] == "64x300x16"
        assert row["dtype"] == "float32"
        assert row["threads"] == "1"
        assert row["device"]
        assert row["git_sha"]
        assert "torch " in row["versions"]
        assert row["date"][:2] == "20"


def test_the_table_shows_every_kernel(finished):
    for kernel in KERNELS:
        assert kernel in finished[0]


@pytest.mark.parametrize("shape", ["64,300", "63,300,16", "64,1,16", "64,300,0", "a,b,c"])
def test_a_bad_shape_is_refused(monkeypatch, shape):
    monkeypatch.syspath_prepend(BENCH)
    from workload import Shape

    with pytest.raises(ValueError, match=f"^shape must.*{shape}"):
        Shape.parse(shape)


def test_input_sets_differ_and_have_both_classes(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    from workload import N_INPUT_SETS, Shape, Workload

    workloads = [Workload.draw(Shape(128, 300, 16), index) for index in range(N_INPUT_SETS)]
    assert len({workload.hidden.sum().item() for workload in workloads}) == N_INPUT_SETS == 3
    for workload in workloads:
        for prompt in workload.rollouts.members:
            assert len(prompt) == 8
            assert 0 < workload.rollouts.correct[list(prompt)].sum() < 8


def test_the_runner_stops_at_a_bad_argument(tmp_path):
    result = run(tmp_path, "--shape", "63,300,16")
    assert result.returncode == 2
    assert "shape must have N a multiple of 64" in result.stderr
    assert not list(tmp_path.iterdir())

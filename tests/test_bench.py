"""The benchmark runner on a tiny shape: every provider measured or listed with the reason. No time is asserted."""

import csv
import importlib.util
import json
import math
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from rlvr_fast import command_line
from rlvr_fast.bench import resident_memory, timings
from rlvr_fast.bench.timings import measure
from rlvr_fast.bench.workload import N_INPUT_SETS, Shape, Workload
from rlvr_fast.cli import app

KERNELS = {"token_stats", "gradient_gap hidden", "gradient_gap logits", "gradient_gap head", "linear_logprob fwd+bwd",
           "advantages + loss_weights", "measure_step"}
HAS_TRL = importlib.util.find_spec("trl") is not None


def run(output, *options):
    environment = {**os.environ, "TORCH_COMPILE_DISABLE": "1"}  # compiling takes longer than everything else here
    command = [sys.executable, "-m", "rlvr_fast", "bench", "--threads", "1", "--output", str(output), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    if importlib.util.find_spec("pytest_benchmark") is None:
        pytest.skip("pytest-benchmark is not installed")
    output = tmp_path_factory.mktemp("bench")
    result = run(output, "--shape", "64,300,16", "--rounds", "2", "--json", str(output / "rows.json"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""  # progress is for terminals
    with (output / "cpu_64x300x16.csv").open() as file:
        rows = list(csv.DictReader(file))
    return result.stdout, rows, json.loads((output / "rows.json").read_text(), parse_constant=pytest.fail)


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
        assert "pip install 'rlvr-fast[bench]'" in reasons["trl chunked"]


def test_json_holds_the_rows_of_the_csv_and_who_is_missing(finished):
    stdout, rows, content = finished
    assert [row["provider"] for row in content["rows"]] == [row["provider"] for row in rows]
    for row, line in zip(content["rows"], rows, strict=True):
        if line["median"]:
            assert row["median"] == pytest.approx(float(line["median"]), rel=1e-5)
    for reason, names in content["missing"].items():
        assert f"not measured ({reason}): {'; '.join(names)}" in stdout
    assert sum(map(len, content["missing"].values())) == sum(not row["median"] for row in rows)


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
def test_a_bad_shape_is_refused(shape):
    with pytest.raises(ValueError, match=f"^shape must.*{shape}"):
        Shape.parse(shape)


def test_input_sets_differ_and_have_both_classes():
    workloads = [Workload.draw(Shape(128, 300, 16), index) for index in range(N_INPUT_SETS)]
    assert len({workload.hidden.sum().item() for workload in workloads}) == N_INPUT_SETS == 3
    for workload in workloads:
        for prompt in workload.rollouts.members:
            assert len(prompt) == 8
            assert 0 < workload.rollouts.correct[list(prompt)].sum() < 8


@pytest.mark.parametrize(("arguments", "message"), [
    (["--shape", "63,300,16"], "shape must have N a multiple of 64"),
    (["--kernel", "made_up"], "--kernel must be one of token_stats, "),
    (["--rounds", "0"], "--rounds"),
    (["--threads", "0"], "--threads"),
    (["--json", "/nowhere/at/all.json"], "--json must name a file in an existing folder"),
])
def test_the_command_stops_at_a_bad_argument(monkeypatch, tmp_path, arguments, message):
    monkeypatch.setitem(command_line.NEEDS, "bench", ((), ""))
    done = CliRunner().invoke(app, ["bench", "--output", str(tmp_path / "out"), *arguments])
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())
    assert not (tmp_path / "out").exists()


def test_every_turn_is_announced_in_the_order_that_interleaves_providers():
    pytest.importorskip("pytest_benchmark")
    seen = []
    timed = measure(["advantages + loss_weights"], "64,300,16", 2, 1, lambda done, whose: seen.append((done, whose)))
    assert timed.status == 0, timed.output
    providers = ("gemm", "rlvr_fast", "torch, grouped view", "torch, dict of groups")
    expected = [f"advantages + loss_weights-round{turn}-{name}" for turn in (0, 1) for name in providers]
    assert seen == [(at / 8, whose) for at, whose in enumerate(expected)]


def test_a_provider_that_fails_is_said_to_and_makes_the_exit_code_1(monkeypatch, tmp_path):
    """Of pytest's report, without measuring: everybody but the second provider has a time."""
    providers = ("gemm", "torch, grouped view", "torch, dict of groups")
    report = {"benchmarks": [{"extra_info": {"kernel": "advantages + loss_weights", "provider": name, "round": 0,
                                             "error": 0.0}, "stats": {"median": 1e-3}} for name in providers],
              "machine_info": {"cpu": {}}, "datetime": "2026-01-01"}
    monkeypatch.setitem(command_line.NEEDS, "bench", ((), ""))
    monkeypatch.setattr(timings, "measure", lambda *arguments: timings.Timings(1, "it went wrong", report))
    monkeypatch.setattr(resident_memory, "unavailable", lambda: "not measured here")
    done = CliRunner().invoke(app, ["bench", "--shape", "64,300,16", "--kernel", "advantages + loss_weights", "-o",
                                    str(tmp_path), "--json", "-"])
    assert done.exit_code == 1
    assert "it went wrong" in done.stderr
    assert json.loads(done.stdout)["missing"] == {
        "failed: see the messages above": ["advantages + loss_weights: rlvr_fast"]}


def test_where_nothing_was_timed_the_exit_code_is_1_and_says_why(monkeypatch, tmp_path):
    monkeypatch.setitem(command_line.NEEDS, "bench", ((), ""))
    monkeypatch.setattr(timings, "measure", lambda *arguments: timings.Timings(4, "no such plug-in", {}))
    done = CliRunner().invoke(app, ["bench", "--quick", "-o", str(tmp_path)])
    assert (done.exit_code, done.stdout) == (1, "")
    assert "no such plug-in" in done.stderr
    assert "nothing was timed" in done.stderr

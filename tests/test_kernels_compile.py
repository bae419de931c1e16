"""Every kernel compiles ahead of time without a GPU, without spills, onto the matrix unit; and the gate can say no."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
BENCH = Path(__file__).parent.parent / "bench"


def run(*arguments: str) -> subprocess.CompletedProcess:
    """A fresh process: one that imported the kernels under the interpreter cannot compile them."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(BENCH), environment.get("PYTHONPATH", "")])
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=600)


def test_hot_kernels_pass_the_gate(tmp_path):
    report = tmp_path / "kernels.json"
    finished = run(str(BENCH / "compile_kernels.py"), "--quick", "--json", str(report))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    rows = json.loads(report.read_text())["rows"]
    for row in rows:
        assert 0 < row["registers"] <= 255
        assert row["spill_bytes"] == 0
        assert (row["matrix_instructions"] > 0) == row["kernel"].startswith("head_")
    assert {"head_stats", "head_gradient", "column_sums"} <= {row["kernel"].split()[0] for row in rows}


BREAKAGES = """
import sys
from compile_kernels import compile_one, specializations

broken = {
    "no matrix instruction": ("combine_stats", {"expects_matrix": True}),
    "spills": ("head_stats bf16 bias softcap", {"num_warps": 4}),
    "too much shared memory": ("head_gradient bf16", {"num_stages": 7}),
    "does not compile": ("combine_stats", {"num_warps": 3}),
}
for failure, (name, change) in broken.items():
    entry = next(e for e in specializations() if e["name"] == name and "sm90" in e.get("targets", ("sm90",)))
    assert compile_one(entry, "sm90").failure is None, name
    assert (compile_one(entry | change, "sm90").failure or "").startswith(failure), failure
"""


def test_the_gate_refuses_spills_and_missing_matrix_instructions():
    finished = run("-c", BREAKAGES)
    assert finished.returncode == 0, finished.stdout + finished.stderr


def test_every_specialization_has_a_name_of_its_own_per_target():
    """The table and ``--only`` go by name."""
    finished = run("-c", "from compile_kernels import TARGETS, specializations\n"
                         "seen = [(e['name'], t) for e in specializations() for t in e.get('targets', TARGETS)]\n"
                         "assert len(seen) == len(set(seen)) > 100, len(seen)")
    assert finished.returncode == 0, finished.stdout + finished.stderr

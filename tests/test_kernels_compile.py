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
        assert (row["matrix_instructions"] > 0) == row["kernel"].startswith(("head_", "segmented_"))
    kernels = {row["kernel"].split()[0] for row in rows}
    assert {"head_stats", "head_gradient", "column_sums", "segmented_gradient"} <= kernels


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


CANDIDATES = """
from dataclasses import replace
from compile_kernels import specializations
from rlvr_fast.kernels.config import HEAD_TILE_CANDIDATES, HEAD_TILES

entries = [entry for entry in specializations() if "BLOCK_DEPTH" in entry["constexprs"]]
widths = {e["constexprs"]["BLOCK_COLUMNS"] for e in specializations() if e["name"].startswith("column_sums")}
for key, tiles in HEAD_TILE_CANDIDATES.items():
    for tile in tiles:
        for shape in (tile, tile.with_softcap()):
            assert shape.slice_columns in widths, shape
        if replace(tile, group=HEAD_TILES[key].group) == HEAD_TILES[key]:
            continue
        for kernel in ("head_stats", "head_gradient"):
            wanted = {"BLOCK_ROWS": tile.rows, "BLOCK_COLUMNS": tile.columns, "BLOCK_DEPTH": tile.depth,
                      "SLICES": tile.slices}
            found = [e for e in entries if e["name"].startswith(kernel) and e["candidate"] and e["targets"] == key[:1]
                     and e["num_warps"] == tile.num_warps and e["num_stages"] == tile.num_stages
                     and wanted.items() <= e["constexprs"].items()]
            assert found, (kernel, tile)
            assert all(e["hot"] for e in found)
"""


def test_every_candidate_tile_is_among_what_the_gate_compiles():
    finished = run("-c", CANDIDATES)
    assert finished.returncode == 0, finished.stdout + finished.stderr


def test_a_candidate_that_shares_a_multiprocessor_fits_twice(tmp_path):
    """128 x 128 on 4 warps is there for that: 113 KiB and 255 registers of 128 threads each."""
    report = tmp_path / "kernels.json"
    finished = run(str(BENCH / "compile_kernels.py"), "--only", "head_gradient bf16 128x128x64 warps=4", "--json",
                   str(report))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    content = json.loads(report.read_text())
    assert f"triton {content['triton']} from " in finished.stdout
    assert content["rows"]
    for row in content["rows"]:
        assert row["target"] == "sm90"
        assert row["shared_bytes"] <= 113 << 10
        assert row["registers"] <= 255


PROGRAMS = """
from compile_kernels import SHARED_MEMORY_LIMIT, compile_one
from rlvr_fast.kernels.segmented_gradient import TILES, aot_specializations

entry = next(e for e in aot_specializations() if e["name"] == "segmented_gradient bf16 16" and "sm90" in e["targets"])
row, programs = compile_one(entry, "sm90"), TILES["sm90", 2].programs
assert row.failure is None
assert programs * (row.shared_bytes + 1024) <= SHARED_MEMORY_LIMIT["sm90"] + 1024, row
assert programs * 32 * entry["num_warps"] * row.registers <= 65536, row
"""


def test_the_programs_of_a_segmented_gradient_fit_a_multiprocessor():
    """One's product is to run under the other's read-back."""
    finished = run("-c", PROGRAMS)
    assert finished.returncode == 0, finished.stdout + finished.stderr

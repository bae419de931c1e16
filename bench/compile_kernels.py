"""Compile every Triton kernel ahead of time, without a GPU, and report what the compiler made of it.

    python bench/compile_kernels.py [--json FILE] [--quick] [--only TEXT] [--processes N]

For each specialisation that a module of ``rlvr_fast.kernels`` lists and each target: registers per thread, bytes per
thread spilled to memory, shared memory, and the matrix instructions in the assembly. Exit status 1 if a hot kernel
spills, if a matrix kernel does not reach the matrix unit (``wgmma`` on sm90), if a kernel needs more shared memory than
the chip has, or if anything fails to compile. What a specialisation holds is told in ``rlvr_fast.kernels.aot``.

Another Triton than the installed one takes a folder and a path, for instance the oldest that is supported:

    pip install --no-deps --target .triton-3.6.0 triton==3.6.0
    PYTHONPATH=.triton-3.6.0 python bench/compile_kernels.py
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rlvr_fast import kernels

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# What a matrix kernel must contain, by target: PTX or AMD assembly mnemonics.
MATRIX_INSTRUCTIONS = {
    "sm80": r"\bmma\.sync\b",
    "sm90": r"\bwgmma\.mma_async\b",
    "sm100": r"\btcgen05\.mma\b",
    "gfx942": r"\bv_mfma_\w+",
}
SHARED_MEMORY_LIMIT = {"sm80": 163 << 10, "sm90": 227 << 10, "sm100": 227 << 10, "gfx942": 64 << 10}


@dataclass(frozen=True)
class Row:
    """One compiled kernel."""

    kernel: str
    target: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    matrix_instructions: int
    seconds: float
    failure: str | None


def specializations() -> list[dict]:
    """Everything the kernel modules ask to be compiled, in the order of the modules' names."""
    entries = []
    for module in sorted(info.name for info in pkgutil.iter_modules(kernels.__path__)):
        listed = getattr(importlib.import_module(f"rlvr_fast.kernels.{module}"), "aot_specializations", None)
        entries += listed() if listed else []
    return entries


def compile_one(entry: dict, target: str) -> Row:
    """Compile one specialisation and judge it."""
    started = time.perf_counter()
    names = entry["fn"].arg_names
    signature = {name: entry["signature"].get(name, "constexpr") for name in names}
    aligned = set(entry.get("divisible_by_16", ())) | {name for name, kind in signature.items() if kind[0] == "*"}
    attributes = {(index,): [["tt.divisibility", 16]] for index, name in enumerate(names) if name in aligned}
    source = ASTSource(fn=entry["fn"], signature=signature, constexprs=entry["constexprs"], attrs=attributes)
    options = {"num_warps": entry["num_warps"], "num_stages": entry["num_stages"]}
    try:
        compiled = triton.compile(source, target=TARGETS[target], options=options)
    except Exception as error:  # the compiler raises many kinds; each is a finding to report, not a crash
        reason = " ".join(str(error)[-300:].split())
        return Row(entry["name"], target, 0, 0, 0, 0, time.perf_counter() - started, f"does not compile: {reason}")
    registers, spills = (_amd_resources if target == "gfx942" else _nvidia_resources)(compiled)
    shared = compiled.metadata.shared
    assembly = compiled.asm["amdgcn" if target == "gfx942" else "ptx"]
    matrix = len(re.findall(MATRIX_INSTRUCTIONS[target], assembly))
    failure = None
    if entry["hot"] and spills:
        failure = "spills"
    elif entry["expects_matrix"] and not matrix:
        failure = "no matrix instruction"
    elif shared > SHARED_MEMORY_LIMIT[target]:
        failure = "too much shared memory"
    return Row(entry["name"], target, registers, spills, shared, matrix, time.perf_counter() - started, failure)


def _nvidia_resources(compiled) -> tuple[int, int]:
    """(registers per thread, bytes of local memory per thread) from the cubin."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run([tool, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    if not found:
        raise RuntimeError(f"cuobjdump reported no resource usage: {usage[:200]}")
    registers, stack, local = map(int, found.groups())
    return registers, max(stack, local)


def _amd_resources(compiled) -> tuple[int, int]:
    """(vector registers per lane, bytes of scratch per lane) from the assembly's metadata."""
    metadata = compiled.asm["amdgcn"]
    registers = int(re.search(r"\.vgpr_count:\s+(\d+)", metadata)[1])
    return registers, int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", metadata)[1])


def run(jobs: list[tuple[dict, str]], processes: int) -> list[Row]:
    """Compile all jobs. Entries hold functions, which do not travel between processes: workers look theirs up again."""
    if processes == 1:
        return [compile_one(entry, target) for entry, target in jobs]
    with ProcessPoolExecutor(processes) as pool:
        return list(pool.map(_compile_named, [entry["name"] for entry, _ in jobs], [target for _, target in jobs]))


def _compile_named(name: str, target: str) -> Row:
    return compile_one(next(entry for entry in specializations() if entry["name"] == name
                            and target in entry.get("targets", TARGETS)), target)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table as JSON too")
    parser.add_argument("--quick", action="store_true", help="hot kernels on sm90 only, without fp16 and candidates")
    parser.add_argument("--only", default="", metavar="TEXT", help="kernels whose name contains TEXT")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), metavar="N", help="default: one per core")
    arguments = parser.parse_args()

    jobs = [(entry, target) for entry in specializations() if arguments.only in entry["name"]
            for target in entry.get("targets", TARGETS)]
    if arguments.quick:
        jobs = [(entry, target) for entry, target in jobs
                if entry["hot"] and not entry.get("candidate") and "fp16" not in entry["name"] and target == "sm90"]
    rows = run(jobs, arguments.processes)

    width = max((len(row.kernel) for row in rows), default=0)
    print(f"triton {triton.__version__} from {Path(triton.__file__).parent}")
    print(f"{'kernel':<{width}}  target  registers  spill B  shared KiB  matrix  seconds")
    for row in rows:
        print(f"{row.kernel:<{width}}  {row.target:<6}  {row.registers:>9}  {row.spill_bytes:>7}  "
              f"{row.shared_bytes / 1024:>10.1f}  {row.matrix_instructions:>6}  {row.seconds:>7.1f}"
              f"{'  FAILED: ' + row.failure if row.failure else ''}")
    failed = sum(row.failure is not None for row in rows)
    print(f"{len(rows)} compiled, {failed} failed, {sum(row.seconds for row in rows):.0f} s")
    if arguments.json:
        arguments.json.write_text(json.dumps({"triton": triton.__version__, "rows": [asdict(row) for row in rows]},
                                             indent=1) + "\n")
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())

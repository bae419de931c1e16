"""Compile the CUDA kernels of csrc/cuda, without a GPU, and report what the compiler made of them.

    python bench/compile_cuda.py [--targets sm_90a ...] [--json FILE] [--skip-without-nvcc]

For each kernel and target: registers per thread, bytes of stack and of spills per thread, static shared memory. Exit
status 1 if a kernel spills or uses a stack, needs more shared memory than a block has without asking, or does not
compile; 2 if there is no nvcc, unless --skip-without-nvcc is given.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

SOURCES = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
TARGETS = ("sm_80", "sm_90a", "sm_100")
STATIC_SHARED_LIMIT = 48 << 10
ENTRY = re.compile(r"Compiling entry function '(?P<kernel>\w+)' for '(?P<target>\w+)'")
STACK = re.compile(r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill")
USED = re.compile(r"Used (?P<registers>\d+) registers")
SHARED = re.compile(r"(?P<shared>\d+) bytes smem")


@dataclass(frozen=True)
class Row:
    """One compiled kernel; sizes in bytes, registers per thread."""

    kernel: str
    target: str
    registers: int
    stack: int
    spills: int
    shared: int

    @property
    def failure(self) -> str | None:
        """Why the gate refuses it; None if it does not."""
        if self.spills:
            return "spills"
        if self.stack:
            return "uses a stack"
        return "too much static shared memory" if self.shared > STATIC_SHARED_LIMIT else None


def nvcc() -> str | None:
    """The CUDA compiler: in CUDA_HOME if that is set, else on PATH."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")


def parse(report: str) -> list[Row]:
    """The kernels in what ``ptxas -v`` printed.

    Raises:
        ValueError: an entry without its figures, as when the compiler's wording changes.
    """
    pieces = re.split(r"(?=Compiling entry function)", report)[1:]
    rows = []
    for piece in pieces:
        entry, stack, used = ENTRY.search(piece), STACK.search(piece), USED.search(piece)
        if not (entry and stack and used):
            raise ValueError(f"ptxas reported no figures in: {piece[:300]}")
        shared = SHARED.search(piece)
        rows.append(Row(entry["kernel"], entry["target"], int(used["registers"]), int(stack["stack"]),
                        int(stack["stores"]) + int(stack["loads"]), int(shared["shared"]) if shared else 0))
    return rows


def readable(names: list[str]) -> list[str]:
    """Kernel names as in the source where c++filt can tell, without what all share."""
    if not names or shutil.which("c++filt") is None:
        return names
    plain = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout.splitlines()
    return [re.sub(r"^void |rlvr::|\(.*\)$", "", name) for name in plain]


def compile_for(target: str, source: Path, compiler: str) -> list[Row]:
    """Compile one file for one target.

    Raises:
        subprocess.CalledProcessError: it does not compile; the message is in ``stderr``.
    """
    number = target.removeprefix("sm_")
    with tempfile.TemporaryDirectory() as directory:
        done = subprocess.run(
            [compiler, "--options-file", str(SOURCES / "nvcc.options"), f"-gencode=arch=compute_{number},code={target}",
             "-Xptxas", "-v", "-cubin", "-o", str(Path(directory) / "out.cubin"), str(source)],
            capture_output=True, text=True, check=True)
    return parse(done.stdout + done.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", default=TARGETS, metavar="SM", help=f"default: {' '.join(TARGETS)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table as JSON too")
    parser.add_argument("--skip-without-nvcc", action="store_true", help="exit status 0 where there is no nvcc")
    arguments = parser.parse_args()

    compiler = nvcc()
    if compiler is None:
        print("the CUDA kernels were not compiled: no nvcc in CUDA_HOME/bin or on PATH", file=sys.stderr)
        return 0 if arguments.skip_without_nvcc else 2

    rows, failed, started = [], 0, time.perf_counter()
    for source in sorted(SOURCES.glob("*.cu")):
        for target in arguments.targets:
            try:
                rows += compile_for(target, source, compiler)
            except (subprocess.CalledProcessError, ValueError) as error:
                failed += 1
                print(f"{source.name} for {target} FAILED: {getattr(error, 'stderr', None) or error}", file=sys.stderr)
    names = readable([row.kernel for row in rows])
    width = max(map(len, names), default=0)
    print(f"{'kernel':<{width}}  target  registers  stack B  spill B  shared B")
    for name, row in zip(names, rows, strict=True):
        failed += row.failure is not None
        print(f"{name:<{width}}  {row.target:<6}  {row.registers:>9}  {row.stack:>7}  {row.spills:>7}  "
              f"{row.shared:>8}{'  FAILED: ' + row.failure if row.failure else ''}")
    print(f"{len(rows)} compiled, {failed} failed, {time.perf_counter() - started:.0f} s")
    if arguments.json:
        table = [asdict(row) | {"kernel": name} for name, row in zip(names, rows, strict=True)]
        arguments.json.write_text(json.dumps(table, indent=1) + "\n")
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())

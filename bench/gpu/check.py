"""Stage check: tiny shapes, the memory checker on them, then the GPU tests. python -m gpu.check OUTDIR [--dry-run]

Writes OUTDIR/check.md, one line per check: passed, failed, or not run and why. Exit status 1 if one failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(os.environ.get("RLVR_FAST_REPOSITORY", Path(__file__).resolve().parents[2]))
ROW_PASS = REPOSITORY / "bench" / "row_pass_memory.py"
GPU_WORDS = ("mark.gpu", "head_pass")  # the second is the fixture of tests/conftest.py with GPU parameters
# Every allocation its own, so that the checker sees an access behind a tensor's end.
CHECKED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


@dataclass(frozen=True)
class Check:
    """A command, its time limit in seconds (None: all that is left), and why it cannot run here, or None.

    ``checker``: it runs under the memory checker.
    """

    name: str
    command: list[str]
    seconds: float | None
    missing: str | None = None
    checker: bool = False


def checks(dry_run: bool) -> list[Check]:
    """In order; the longest last, with the time that the others leave."""
    python = [sys.executable, "-P", "-m"]
    pytest = [*python, "pytest", "-c", str(REPOSITORY / "pyproject.toml"), "--rootdir", str(REPOSITORY), "-p",
              "no:cacheprovider", "-m", "gpu"]
    tiny = [*python, "gpu.tiny", "--device", "cpu" if dry_run else "cuda"]
    checker = [shutil.which("compute-sanitizer") or "compute-sanitizer", "--error-exitcode", "9"]
    no_tests = None if _has("pytest") and _has("hypothesis") else "pytest or hypothesis is not installed"
    no_checker = None if shutil.which("compute-sanitizer") else "compute-sanitizer is not on the PATH"
    row_pass = [*checker, "--tool", "memcheck", sys.executable, "-P", str(ROW_PASS)]
    no_rows = no_checker or (None if ROW_PASS.exists() else f"no {ROW_PASS}")
    dry = "dry run" if dry_run else None
    return [
        Check("every kernel on tiny shapes against float64", tiny, 40),
        Check("memcheck of every kernel", [*checker, "--tool", "memcheck", *tiny], 90, no_checker or dry, True),
        Check("memcheck of the row pass", row_pass, 60, no_rows or dry, True),
        Check("racecheck of every kernel", [*checker, "--tool", "racecheck", *tiny], 50, no_checker or dry, True),
        Check("GPU tests against float64", [*pytest, *map(str, gpu_tests())], None, no_tests or dry),
    ]


def gpu_tests() -> list[Path]:
    """The files with tests for a GPU: the others may need packages that a bare machine lacks."""
    files = sorted((REPOSITORY / "tests").glob("test_*.py"))
    return [path for path in files if any(word in path.read_text() for word in GPU_WORDS)]


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def run(check: Check, left: float) -> tuple[bool, str]:
    """(whether nothing is wrong, what to say), in at most ``left`` seconds."""
    if check.missing is not None:
        return True, f"not run ({check.missing})"
    seconds = min(left, left if check.seconds is None else check.seconds)
    print(f"-- {check.name}: {' '.join(check.command)}", flush=True)
    environment = {**os.environ, **(CHECKED if check.checker else {})}
    # A group of its own, so that a memory checker that is stopped leaves nothing running on the GPU.
    process = subprocess.Popen(check.command, env=environment, process_group=0)
    try:
        status = process.wait(max(seconds, 0))
    except subprocess.TimeoutExpired:
        return False, f"failed (not finished after {seconds:.0f} s)"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return status == 0, "passed" if status == 0 else f"failed (exit status {status})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=480.0, help="for all of it")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    path, all_fine = options.out / "check.md", True
    path.write_text("")
    for check in checks(options.dry_run):
        fine, words = run(check, end - time.monotonic())
        all_fine &= fine
        with path.open("a") as file:  # at once: what is stopped leaves what it knows
            file.write(f"- {check.name}: {words}\n")
    print(path.read_text(), end="")
    return 0 if all_fine else 1


if __name__ == "__main__":
    sys.exit(main())

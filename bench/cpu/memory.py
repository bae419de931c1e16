"""Peak memory of one call in a process of its own, beyond the inputs: results, buffers and everything in between.

The process has made one call before, on a tiny shape, so that libraries are loaded and thread stacks exist; a compiled
provider has been called on the shape itself, because the compiler's memory is not the kernel's.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from rlvr_fast.bench.registry import SUITES
from rlvr_fast.bench.resident_memory import reset_high_water_mark, return_free_memory, status
from rlvr_fast.bench.workload import RESPONSES, Shape, Workload

PRELOAD = ("rlvr_fast.step.measure", "trl.trainer.utils", "pytest", "rich.table")


def peak_extra_bytes(requests: Sequence[tuple[str, int]], shape: Shape, threads: int,
                     progress: Callable[[float], None]) -> list[int | str]:
    """For every (suite, provider index) the bytes, or what went wrong. One fresh process each, one after another.

    ``progress`` gets the share done.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))  # imports once what is slow to import; absent modules are ignored
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        futures = [pool.submit(_measure, suite, provider, shape, threads) for suite, provider in requests]
        for done, future in enumerate(futures, 1):
            future.exception()  # waits
            progress(done / len(futures))
        return [future.result() if future.exception() is None else repr(future.exception()) for future in futures]


def _measure(suite: str, provider_index: int, shape: Shape, threads: int) -> int:
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    torch.set_num_threads(threads)
    provider = SUITES[suite].providers[provider_index]
    workload = Workload.draw(shape, 2)
    warm_up = workload if provider.compiled else Workload.draw(Shape(2 * RESPONSES, 512, min(shape.width, 64)), 2)
    provider.run(warm_up)
    gc.collect()
    return_free_memory()
    before = status("VmRSS")
    reset_high_water_mark()
    result = provider.run(workload)
    peak = status("VmHWM")
    del result
    return peak - before

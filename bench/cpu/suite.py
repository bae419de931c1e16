"""The vocabulary of the benchmarks: a suite is one question asked of several providers."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from rlvr_fast.bench.workload import Shape, Workload
from rlvr_fast.command_line import pip_line


@dataclass(frozen=True)
class Provider:
    """One implementation.

    Attributes:
        name: as in the table.
        run: what is timed; its result holds everything the suite asks for.
        missing: why it cannot run here, or None.
        compiled: built for the shape at its first call, so that memory is measured from the second on.
        check: overrides the suite's ``check``, for a floor that answers something else.
    """

    name: str
    run: Callable[[Workload], Any]
    missing: str | None = None
    compiled: bool = False
    check: Callable[[Any, Workload], float] | None = None


@dataclass(frozen=True)
class Suite:
    """One kernel and its peers.

    Attributes:
        name: the kernel.
        providers: the first is the floor, one bare product as torch does it.
        check: (result, workload) -> error against float64.
        error_of: what that number is.
        flops: floating point operations that the question requires; None where they do not matter.
        calls: per round, for kernels that take microseconds; the floor is called once.
    """

    name: str
    providers: tuple[Provider, ...]
    check: Callable[[Any, Workload], float]
    error_of: str
    flops: Callable[[Shape], float] | None = None
    calls: int = 1

    @property
    def floor(self) -> Provider:
        return self.providers[0]

    def calls_of(self, provider: Provider) -> int:
        return 1 if provider is self.floor else self.calls


def compiled(function: Callable) -> Callable:
    """torch.compile for fixed shapes, at the first call: importing inductor takes seconds that others need not wait."""
    build = cache(partial(torch.compile, function, dynamic=False))
    return lambda *arguments: build()(*arguments)


def _compiler_missing() -> str | None:
    """Why torch.compile cannot make CPU code here; None if it can."""
    if os.environ.get("TORCH_COMPILE_DISABLE") == "1":
        return "torch.compile is switched off (TORCH_COMPILE_DISABLE=1)"
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    return None if shutil.which(compiler) else f"torch.compile finds no C++ compiler {compiler}"


COMPILE_MISSING = _compiler_missing()

try:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as TRL_CHUNK_SIZE
except ImportError as error:
    ChunkedLogProbFunction = TRL_CHUNK_SIZE = None
    TRL_MISSING = f"trl >= 1.16 cannot be imported ({error}): {pip_line('bench')}"
else:
    TRL_MISSING = None

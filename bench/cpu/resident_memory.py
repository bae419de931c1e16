"""The peak of a process's resident memory, which Linux keeps (VmHWM) and lets the process reset."""

from __future__ import annotations

import ctypes
from pathlib import Path


def unavailable() -> str | None:
    """Why peak memory cannot be measured here; None if it can."""
    try:
        reset_high_water_mark()
    except OSError as error:
        return f"the high-water mark of resident memory cannot be reset here ({error})"
    return None


def reset_high_water_mark() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def return_free_memory() -> None:
    """Free blocks that the allocator keeps would hide what the call allocates (glibc; elsewhere a no-op)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def status(key: str) -> int:
    """Bytes of "VmRSS" (now) or "VmHWM" (at most since the last reset)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))

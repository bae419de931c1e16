"""Adapters to training frameworks, one module each; a module may need its framework, and is imported on first use."""

from __future__ import annotations

import importlib
from types import ModuleType

FRAMEWORKS = ("openrlhf", "packed", "prime_rl", "skyrl", "trl", "verl")


def __getattr__(name: str) -> ModuleType:
    if name in FRAMEWORKS:
        return importlib.import_module(f"rlvr_fast.integrations.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Adapters to training frameworks, one module each; a module needs its framework, and is imported on first use."""

import importlib

FRAMEWORKS = ("trl", "verl")


def __getattr__(name: str):
    if name in FRAMEWORKS:
        return importlib.import_module(f"rlvr_fast.integrations.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

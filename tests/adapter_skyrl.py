"""SkyRL for the tests of its adapter: its own modules where it is installed, stand-ins with the same names elsewhere.

``callbacks`` and ``batches`` need nothing but numpy and jaxtyping, so these two files are SkyRL's own even where the
rest of its requirements is not there; ``RayPPOTrainer`` is None then.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

CALLBACKS, BATCHES = "skyrl.train.utils.callbacks", "skyrl.backends.skyrl_train.training_batch"


@dataclass
class CallbackInput:
    """The fields of SkyRL 0.3.0's."""

    global_step: int
    epoch: int
    total_steps: int
    steps_per_epoch: int
    batch: Any = None
    metrics: dict[str, Any] | None = None
    logs: dict[str, Any] | None = None
    ckpt_path: str | None = None


class TrainingCallback:
    """The events that the adapter has no use for do nothing."""


class CallbackHandler:
    """Hands an event to every callback in turn."""

    def __init__(self, callbacks: list[TrainingCallback]) -> None:
        self.callbacks = callbacks

    def __getattr__(self, event: str):
        return lambda *args: [getattr(one, event)(*args) for one in self.callbacks]


class TrainingInputBatch(dict):
    """Tensors by name, with metadata beside them."""

    metadata: dict[str, Any] | None = None


def _module(name: str) -> ModuleType | SimpleNamespace | None:
    """SkyRL's module, by itself if its package cannot be imported as a whole."""
    try:
        return importlib.import_module(name)
    except Exception:  # something that it needs is missing, or refuses this Python
        package = importlib.util.find_spec("skyrl")
        if package is None or package.submodule_search_locations is None:
            return None
    path = Path(package.submodule_search_locations[0], *name.split(".")[1:]).with_suffix(".py")
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError:
        del sys.modules[name]
        return None
    return module


def _trainer() -> type | None:
    try:
        return importlib.import_module("skyrl.train.trainer").RayPPOTrainer
    except Exception:
        return None


callbacks, batches, RayPPOTrainer = _module(CALLBACKS), _module(BATCHES), _trainer()
if callbacks is None:
    callbacks = sys.modules[CALLBACKS] = SimpleNamespace(
        TrainingCallback=TrainingCallback, CallbackHandler=CallbackHandler, CallbackInput=CallbackInput)
if batches is None:
    batches = SimpleNamespace(TrainingInputBatch=TrainingInputBatch)

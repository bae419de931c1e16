"""Peers from other projects, one file each. A file declares a ``PEER`` and says what it computes less than we ask.

A peer is imported here whatever the device, so that a wheel that cannot be imported is known by name and reason; its
kernels are launched on a GPU only, except where they have a torch path.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from ..suite import Provider, Result


@dataclass(frozen=True)
class Answer:
    """One question answered: (the imported module, input set) -> tensors by name, and what is missing among them."""

    run: Callable[[Any, Any], Result]
    lacks: str = ""


@dataclass(frozen=True)
class Peer:
    """Another project's implementation.

    Attributes:
        name: as in the table. distribution: what pip calls it.
        load: imports it; raises whatever stands in the way.
        answers: by suite name.
        on_cpu: the suites that run without a GPU.
    """

    name: str
    distribution: str
    load: Callable[[], Any]
    answers: Mapping[str, Answer]
    on_cpu: tuple[str, ...] = ()

    @property
    def version(self) -> str:
        try:
            return version(self.distribution)
        except PackageNotFoundError:
            return "absent"

    def provider(self, question: str, device: torch.device) -> Provider:
        answer, reason, module = self.answers[question], None, None
        try:
            module = loaded(self.load)
        except Exception as error:  # whatever an import of foreign code may raise is the reason
            reason = f"cannot be imported ({type(error).__name__}: {error})"
        else:
            if device.type != "cuda" and question not in self.on_cpu:
                reason = "imported; its kernels need a GPU"
        return Provider(self.name, partial(answer.run, module), missing=reason, lacks=answer.lacks)


@cache
def loaded(load: Callable[[], Any]) -> Any:
    return load()


def all_peers() -> tuple[Peer, ...]:
    from . import cce, liger, quack, trl, verl
    return trl.PEER, liger.PEER, cce.PEER, verl.PEER, quack.PEER


def providers(question: str, device: torch.device) -> tuple[Provider, ...]:
    """Everybody who answers ``question``."""
    return tuple(peer.provider(question, device) for peer in all_peers() if question in peer.answers)


def stand_in(package: str, *subpackages: str, **modules: Mapping[str, Any]) -> None:
    """Packages whose __init__ is not executed, so that one file of them can be imported without all they need.

    Args:
        package: the installed top-level package. subpackages: those inside to be left empty too, outermost first.
        modules: attributes of modules to be made up, by dotted name with "__" for ".".

    Raises:
        ImportError: the package is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"no package {package!r}")
    root = spec.submodule_search_locations[0]
    for name in (package, *(f"{package}.{sub}" for sub in subpackages)):
        _insert(name, {"__path__": ["/".join((root, *name.split(".")[1:]))]})
    for name, attributes in modules.items():
        _insert(name.replace("__", "."), attributes)


def _insert(name: str, attributes: Mapping[str, Any]) -> None:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__dict__.update(attributes)
    sys.modules[name] = module

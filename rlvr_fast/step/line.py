"""The line θ + mΔ through the parameters, walked in place and always walked back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import torch

from rlvr_fast import _validate as check

Result = TypeVar("Result")


class StepLine:
    """Moves ``parameters`` along ``update`` while its ``with`` block lasts.

    The block holds one copy of the parameters and ends, whatever is raised, with the same bits in the same tensors:
    θ + mΔ − mΔ would not be θ in floating point. Autograd sees the writes, so a graph recorded before can no longer be
    run backward.

    Args:
        parameters: distinct floating-point tensors.
        update: Δ, one finite tensor of the same shape for each, on its device; or a dict {parameter: Δ} that has all.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """

    def __init__(self, parameters: Iterable[torch.Tensor],
                 update: Sequence[torch.Tensor] | Mapping[torch.Tensor, torch.Tensor]) -> None:
        self._parameters, self._update = _pairs(parameters, update)
        self._saved: list[torch.Tensor] = []

    @torch.no_grad()
    def __enter__(self) -> StepLine:
        self._saved = [parameter.clone() for parameter in self._parameters]
        return self

    @torch.no_grad()
    def at(self, multiple: float, function: Callable[[], Result]) -> Result:
        """``function()`` with the parameters at θ + multiple·Δ, without gradients."""
        for parameter, start, delta in zip(self._parameters, self._saved, self._update, strict=True):
            parameter.copy_(torch.add(start, delta, alpha=multiple))
        return function()

    @torch.no_grad()
    def __exit__(self, *_: object) -> None:
        for parameter, start in zip(self._parameters, self._saved, strict=True):
            parameter.copy_(start)
        self._saved = []


def _pairs(parameters: Iterable[torch.Tensor], update: Sequence[torch.Tensor] | Mapping[torch.Tensor, torch.Tensor]
           ) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    for name, value in (("parameters", parameters), ("update", update)):
        if isinstance(value, torch.Tensor) or not isinstance(value, Iterable):
            raise TypeError(f"{name} must be a sequence of tensors, got {check.describe(value)}")
    parameters = tuple(parameters)
    if isinstance(update, Mapping):
        missing = [i for i, parameter in enumerate(parameters) if parameter not in update]
        if missing:
            raise ValueError(f"update must have a tensor for every parameter, got none for parameters[{missing[0]}]")
        update = tuple(update[parameter] for parameter in parameters)
    update = tuple(update)
    if not parameters or len(parameters) != len(update):
        raise ValueError("parameters and update must hold the same number of tensors, at least one, "
                         f"got {len(parameters)} and {len(update)}")
    if len({id(parameter) for parameter in parameters}) < len(parameters):
        raise ValueError("parameters must be distinct tensors, got one twice")
    for i, (parameter, delta) in enumerate(zip(parameters, update, strict=True)):
        check.tensor(f"parameters[{i}]", parameter)
        check.tensor(f"update[{i}]", delta, shape=tuple(parameter.shape), device=parameter.device)
        for name, value in ((f"parameters[{i}]", parameter), (f"update[{i}]", delta)):
            if not value.is_floating_point():
                raise TypeError(f"{name} must be floating point, got {check.describe(value)}")
        if delta.device.type == "cpu" and not delta.isfinite().all():
            raise ValueError(f"update[{i}] must be finite, got {check.describe(delta)} with NaN or infinite entries")
    return parameters, update

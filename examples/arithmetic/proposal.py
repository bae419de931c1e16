"""Take the step an optimizer is about to make out of it, so that it can be judged before it is applied."""

from __future__ import annotations

from collections.abc import Sequence

import torch


@torch.no_grad()
def propose(optimizer: torch.optim.Optimizer, parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Let the optimizer step, rewind the parameters, and return what it would have added to each of them."""
    before = [parameter.clone() for parameter in parameters]
    optimizer.step()
    update = [parameter - start for parameter, start in zip(parameters, before, strict=True)]
    for parameter, start in zip(parameters, before, strict=True):
        parameter.copy_(start)
    return update


@torch.no_grad()
def apply(update: Sequence[torch.Tensor], parameters: Sequence[torch.Tensor]) -> None:
    for parameter, delta in zip(parameters, update, strict=True):
        parameter.add_(delta)

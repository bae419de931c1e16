"""The two ceilings of a device, which every rate is held against: a large square product and a copy."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch

from .suite import Provider, Result, Suite

SIZES = {"cuda": (8192, 1 << 30), "cpu": (64, 1 << 16)}  # side of the product, bytes of the copy


@cache
def _operands(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random, since zeros run faster than any real data does."""
    side, _ = SIZES[device.type]
    a, b = torch.randn(2, side, side, device=device).bfloat16()
    return a, b, torch.empty_like(a)


@cache
def _buffers(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.randn(SIZES[device.type][1] // 4, device=device)
    return source, torch.empty_like(source)


def _product(inputs: Any, device: torch.device) -> Result:
    a, b, out = _operands(device)
    torch.mm(a, b, out=out)
    return {}


def _copy(inputs: Any, device: torch.device) -> Result:
    source, target = _buffers(device)
    target.copy_(source)
    return {}


def product_floor(device: torch.device) -> Provider:
    side, _ = SIZES[device.type]
    return Provider(f"bf16 product {side}^3", partial(_product, device=device), "floor", work=2.0 * side**3)


def copy_floor(device: torch.device) -> Provider:
    """Bytes read plus bytes written."""
    return Provider("device copy", partial(_copy, device=device), "floor", work=2.0 * SIZES[device.type][1])


def ceilings(device: torch.device) -> tuple[Suite, Suite]:
    """Each alone, as the run's own ceilings."""
    def nothing(inputs: Any) -> dict:
        return {}
    return (Suite("ceiling product", (product_floor(device),), nothing, lambda inputs: 0.0),
            Suite("ceiling copy", (copy_floor(device),), nothing, lambda inputs: 0.0, unit="TB/s"))

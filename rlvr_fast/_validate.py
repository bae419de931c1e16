"""Argument checks with one message format: which argument, what came, what was expected."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from typing import Any

import torch

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def describe(value: Any) -> str:
    """Short form of a value for an error message: tensors by shape and dtype, the rest by repr."""
    if isinstance(value, torch.Tensor):
        return f"a {value.dtype} tensor of shape {list(value.shape)} on {value.device}"
    text = repr(value)
    return f"{text[:77]}..." if len(text) > 80 else text


def tensor(name: str, value: Any, *, ndim: int | None = None, shape: tuple[int | None, ...] | None = None,
           dtypes: Iterable[torch.dtype] | None = None, device: torch.device | None = None) -> torch.Tensor:
    """Return ``value`` if it is a tensor with the wanted rank, shape (None matches any size), dtype and device."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}: {describe(value)}")
    if ndim is not None and value.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimension(s), got {describe(value)}")
    if shape is not None:
        fits = value.ndim == len(shape) and all(
            want is None or want == have for want, have in zip(shape, value.shape, strict=True)
        )
        if not fits:
            wanted = ", ".join("*" if size is None else str(size) for size in shape)
            raise ValueError(f"{name} must have shape [{wanted}], got {describe(value)}")
    if dtypes is not None and value.dtype not in tuple(dtypes):
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must have dtype {names}, got {describe(value)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on {device}, got {describe(value)}")
    return value


def positive(name: str, value: Any) -> float:
    """Return ``value`` as a finite float above zero."""
    number = real(name, value)
    if number <= 0:
        raise ValueError(f"{name} must be positive, got {describe(value)}")
    return number


def real(name: str, value: Any) -> float:
    """Return ``value`` as a finite float."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}: {describe(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {describe(value)}")
    return number


def flag(name: str, value: Any) -> bool:
    """Return ``value`` if it is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}: {describe(value)}")
    return value


def choice(name: str, value: Any, options: Iterable[str]) -> str:
    """Return ``value`` if it is one of ``options``."""
    options = tuple(options)
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, one of {', '.join(options)}; got {describe(value)}")
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(options)}; got {value!r}")
    return value


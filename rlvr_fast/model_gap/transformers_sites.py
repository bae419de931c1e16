"""Layers that transformers has beside torch's: GPT-2's Conv1D, a linear layer whose weight is [d_in, d_out], and
embeddings times a constant (Gemma). Recognised by what they do, tried out on weights that take no memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from rlvr_fast.model_gap.micro_batch import MicroBatch, Spans
from rlvr_fast.model_gap.segmented import accumulation_dtype
from rlvr_fast.model_gap.tap import Contribution, EmbeddingSite, LinearSite, Tap, _autocast


class TransposedLinearSite(LinearSite):
    """y = x W + b with W [d_in, d_out]: the gradient is Σ_t a_t b_tᵀ."""

    def spread_sides(self, dim: int) -> tuple[bool, bool] | None:
        return None  # no tensor-parallel style of torch knows it

    def run(self, micro_batch: MicroBatch, spans: Spans, seen: torch.Tensor) -> torch.Tensor:
        seen = _autocast(seen)
        if not self.fused:
            return Tap.apply(self, micro_batch, spans, self.original(seen), seen, None)
        with parameters_of(self.module, weight=self.module.weight.detach()):
            output = self.original(seen)
        return Tap.apply(self, micro_batch, spans, output, seen, self.module.weight)

    def contributions(self, seen: torch.Tensor, gradient: torch.Tensor) -> Iterator[Contribution]:
        for kind, parameter, *factors in super().contributions(seen, gradient):
            yield kind, parameter, *reversed(factors)


class ScaledEmbeddingSite(EmbeddingSite):
    """Rows of a weight, times constants [D]."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.slope = _slope(self.module)

    def spread_sides(self, dim: int) -> tuple[bool, bool] | None:
        return None

    def contributions(self, seen: torch.Tensor, gradient: torch.Tensor) -> Iterator[Contribution]:
        yield from super().contributions(seen, gradient.to(accumulation_dtype(gradient.dtype)) * self.slope)


@contextmanager
def parameters_of(module: nn.Module, **values: torch.Tensor) -> Iterator[None]:
    """Inside, ``module`` computes with these in the place of its parameters."""
    parameters: dict[str, Any] = module._parameters
    before = dict(parameters)
    parameters.update(values)
    try:
        yield
    finally:
        parameters.update(before)


def _slope(module: nn.Embedding) -> torch.Tensor:
    """What the rows of the weight are multiplied with."""
    weight = module.weight
    ones = torch.ones(1, 1, dtype=weight.dtype, device=weight.device).expand(weight.shape)
    ids = torch.zeros(1, 1, dtype=torch.int64, device=weight.device)
    with torch.no_grad(), parameters_of(module, weight=ones):
        return module.forward(ids)[0, 0]


def is_scaled_embedding(module: nn.Embedding) -> bool:
    """Whether the output is that of a plain embedding times constants."""
    weight = module.weight
    ids = torch.arange(min(6, len(weight)), device=weight.device).view(1, -1)
    rows, columns = _rising(len(weight), weight)[:, None], _rising(weight.shape[1], weight)
    try:
        slope = _slope(module)
        for trial in (rows.expand(weight.shape), columns.expand(weight.shape)):
            with torch.no_grad(), parameters_of(module, weight=trial):
                output = module.forward(ids)
            if output.shape != (*ids.shape, weight.shape[1]) or not _close(output, slope * trial[ids]):
                return False
    except Exception:  # an unknown module may raise anything on an input it was not made for
        return False
    return True


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether the output is x W + b, for a module that says so by its name and the shapes of its parameters."""
    weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
    if type(module).__name__ != "Conv1D" or weight is None or bias is None or weight.ndim != 2:
        return False
    d_in, d_out = weight.shape
    x = torch.randn(2, 3, d_in, generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    inputs, outputs = _rising(d_in, weight), _rising(d_out, weight)
    trials = {inputs[:, None]: (x @ inputs)[..., None], outputs: x.sum(-1, keepdim=True) * outputs}
    try:
        for trial, expected in trials.items():
            with torch.no_grad(), parameters_of(module, weight=trial.expand(weight.shape), bias=outputs):
                output = module.forward(x)
            if output.shape != (2, 3, d_out) or not _close(output, expected + outputs):
                return False
    except Exception:
        return False
    return True


def _rising(n: int, like: torch.Tensor) -> torch.Tensor:
    """[n] numbers from 1 to 2."""
    return torch.linspace(1, 2, n, dtype=like.dtype, device=like.device)


def _close(output: torch.Tensor, expected: torch.Tensor) -> bool:
    rounding = torch.finfo(output.dtype).eps ** 0.75  # of a sum of thousands
    return bool((output - expected).abs().max() <= rounding * (1 + expected.abs().max()))

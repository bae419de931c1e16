"""Seeing a layer's input and the gradient of its output in the backward, whatever the training loop does with graphs.

``Tap`` is an identity on a layer's output that keeps the layer's input through ``save_for_backward`` alone: saved
tensors take part in activation checkpointing and offloading like a layer's own, and hooks that fire twice under
recomputation are not needed. The layer that saves its input anyway shares it with the tap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from rlvr_fast.model_gap.collect import weight_gradient
from rlvr_fast.model_gap.micro_batch import MicroBatch, Spans
from rlvr_fast.model_gap.segmented import accumulation_dtype
from rlvr_fast.model_gap.tensor_parallel.head import observe_spread_head
from rlvr_fast.model_gap.tensor_parallel.layers import TensorParallel

if TYPE_CHECKING:
    from rlvr_fast.model_gap.recording import Recording

Contribution = tuple[str, str, *tuple[torch.Tensor, ...]]


class Tap(torch.autograd.Function):
    """``Tap.apply(site, micro_batch, spans, output, seen, weight)``: output; the site returns the weight's gradient."""

    @staticmethod
    def forward(ctx: Any, site: Site, micro_batch: MicroBatch, spans: Spans, output: torch.Tensor, seen: torch.Tensor,
                weight: torch.Tensor | None) -> torch.Tensor:
        ctx.site, ctx.micro_batch, ctx.spans = site, micro_batch, spans
        ctx.save_for_backward(seen)
        return output.detach()  # not a view for autograd: in-place operations may follow

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (seen,) = ctx.saved_tensors
        wanted = ctx.needs_input_grad[5]
        with torch.no_grad():
            weight_gradient = ctx.site.arrive(ctx.micro_batch, ctx.spans, seen, gradient, wanted)
        return None, None, None, gradient, None, weight_gradient


class Site:
    """One tapped module. ``parameters`` maps its own names ("weight", "bias") to the names of tracked parameters.

    ``spread``: of a model whose layers are spread over ranks; then all below is about what is here of a layer.
    """

    module: nn.Module

    def __init__(self, recording: Recording, module: nn.Module, name: str, parameters: dict[str, str],
                 spread: TensorParallel | None = None) -> None:
        self.recording, self.module, self.name, self.parameters = recording, module, name, parameters
        self.spread = spread
        self.original = module.forward

    @property
    def weight(self) -> torch.Tensor:
        weight = self.module.weight
        assert isinstance(weight, torch.Tensor)
        return weight

    @property
    def bias(self) -> torch.Tensor | None:
        bias = self.module.bias
        assert bias is None or isinstance(bias, torch.Tensor)
        return bias

    def uses(self) -> list[tuple[str, str]]:
        """(parameter, kind) of what it reports."""
        raise NotImplementedError

    def leading(self, seen: torch.Tensor) -> torch.Size:
        return seen.shape[:-1]

    def spread_sides(self, dim: int) -> tuple[bool, bool] | None:
        """For a weight that is spread along ``dim``: whether the input and the output are, along their last one."""
        return None

    def run(self, micro_batch: MicroBatch, spans: Spans, seen: torch.Tensor) -> torch.Tensor:
        return Tap.apply(self, micro_batch, spans, self.original(seen), seen, None)

    def contributions(self, seen: torch.Tensor, gradient: torch.Tensor) -> Iterator[Contribution]:
        """(kind, parameter, tensors...) of what each row adds to the gradients, kinds as in ``collect``."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What stands in for the module's forward."""
        seen: Any = args[0] if len(args) == 1 and not kwargs else kwargs.get("input") if len(kwargs) == 1 else None
        place = self.recording.locate(self, seen)
        if place is None:
            return self.original(*args, **kwargs)
        micro_batch, spans, recomputed = place
        if self.spread is not None:
            reason = self.spread.admit(self, seen, spans, gram=self.recording.method != "sketch")
            if reason is not None:
                for name in self.parameters.values():
                    self.recording.skipped.setdefault(name, f"{type(self.module).__name__}: {reason}")
                return self.original(*args, **kwargs)
        if not recomputed:
            micro_batch.calls.update(self.uses())
            self.called(micro_batch, spans, seen)
        return self.run(micro_batch, spans, seen)

    def called(self, micro_batch: MicroBatch, spans: Spans, seen: torch.Tensor) -> None:
        """For sites that need to know of a use before its backward."""

    def arrive(self, micro_batch: MicroBatch, spans: Spans, seen: torch.Tensor, gradient: torch.Tensor, wanted: bool
               ) -> torch.Tensor | None:
        """A backward came through; returns the gradient of the module's weight when it is wanted."""
        captured = self.recording.captures(self, micro_batch)
        leading = seen.shape[:-1]
        if self.spread is not None:
            gradient = self.spread.local_output_gradient(self, seen, gradient)
            seen, spans = self.spread.local_input(self, seen, spans)
        if captured:
            micro_batch.arrived.update(self.uses())
            if self.spread is None:
                self.recording.observe_head(self, micro_batch, spans, seen, gradient)
            else:
                observe_spread_head(self, self.spread, micro_batch, leading, spans, seen, gradient)
        result = None
        for kind, parameter, *tensors in self.contributions(seen, gradient):
            if self.spread is not None:
                kind = self.spread.kind_of(parameter, kind)
            getattr(self.recording.witness, kind)(parameter, *tensors)
            for tensor in (seen, gradient):
                self.recording.witness.rounded(parameter, tensor.dtype)
            if captured:
                extra = (wanted,) if kind == "outer" else ()
                result = getattr(self.recording.collector, kind)(parameter, micro_batch, *tensors, spans, *extra)
            elif wanted and kind == "outer":
                result = weight_gradient(*tensors)
        if not wanted:
            return None
        assert result is not None  # wanted by a linear layer's own weight, of which the last contribution is
        result = result.to(self.weight.dtype)
        return result if self.spread is None else self.spread.as_parameter(result, self.weight)


class LinearSite(Site):
    """nn.Linear. With method "segmented" its weight's gradient is formed here, response by response."""

    module: nn.Linear

    @property
    def fused(self) -> bool:
        return self.recording.method == "segmented" and "weight" in self.parameters

    def spread_sides(self, dim: int) -> tuple[bool, bool] | None:
        return (False, True) if dim == 0 else (True, False)

    def uses(self) -> list[tuple[str, str]]:
        kinds = {"weight": "outer", "bias": "vector"}
        return [(parameter, kinds[own]) for own, parameter in self.parameters.items()]

    def run(self, micro_batch: MicroBatch, spans: Spans, seen: torch.Tensor) -> torch.Tensor:
        seen = _autocast(seen)
        if not self.fused:
            return Tap.apply(self, micro_batch, spans, self.original(seen), seen, None)
        weight = self.module.weight
        output = F.linear(seen, weight.detach(), self.module.bias)
        return Tap.apply(self, micro_batch, spans, output, seen, weight)

    def contributions(self, seen: torch.Tensor, gradient: torch.Tensor) -> Iterator[Contribution]:
        a, b = seen.reshape(-1, seen.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        if "bias" in self.parameters:
            yield "vector", self.parameters["bias"], b
        if "weight" in self.parameters:
            yield "outer", self.parameters["weight"], b, a


class EmbeddingSite(Site):
    """nn.Embedding: ``seen`` are the ids."""

    module: nn.Embedding

    def uses(self) -> list[tuple[str, str]]:
        return [(self.parameters["weight"], "rows")]

    def leading(self, seen: torch.Tensor) -> torch.Size:
        return seen.shape

    def spread_sides(self, dim: int) -> tuple[bool, bool] | None:
        return False, dim == 1

    def called(self, micro_batch: MicroBatch, spans: Spans, seen: torch.Tensor) -> None:
        ids = seen.detach()
        if self.spread is not None:
            ids, spans = self.spread.local_input(self, ids, spans)
            ids, _ = self.spread.local_rows(self.parameters["weight"], self.module.weight, ids)
        micro_batch.embedding_ids.setdefault(self.parameters["weight"], []).append((ids.reshape(-1), spans))

    def contributions(self, seen: torch.Tensor, gradient: torch.Tensor) -> Iterator[Contribution]:
        ids, b = seen.reshape(-1), gradient.reshape(-1, gradient.shape[-1])
        if self.module.padding_idx is not None:
            b = b * (ids != self.module.padding_idx)[:, None]
        if self.spread is not None:
            ids, here = self.spread.local_rows(self.parameters["weight"], self.module.weight, ids)
            b = b if here is None else b * here[:, None]
        yield "rows", self.parameters["weight"], ids, b


class ScaleSite(Site):
    """A module whose output is affine in its [d] parameters, element by element (LayerNorm, RMSNorm of any make)."""

    def uses(self) -> list[tuple[str, str]]:
        return [(parameter, "vector") for parameter in self.parameters.values()]

    def contributions(self, seen: torch.Tensor, gradient: torch.Tensor) -> Iterator[Contribution]:
        for own, parameter in self.parameters.items():
            values = gradient if own == "bias" else gradient * scale_slope(self.module, self.original, seen)
            yield "vector", parameter, values.reshape(-1, values.shape[-1])


def scale_slope(module: nn.Module, forward: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """∂ output / ∂ weight of an elementwise affine module at ``x``: output(weight = 1) − output(weight = 0).

    The latter is 0 unless the module multiplies by (1 + weight). On a CPU one row that is not constant tells which, and
    saves a forward; on a device the question would wait for it.
    """
    x = x.to(accumulation_dtype(x.dtype))
    slope = _at_weight(1.0, module, forward, x)
    if x.device.type == "cpu" and x.shape[-1] > 1:
        row = torch.linspace(-1.0, 2.0, x.shape[-1], dtype=x.dtype).reshape(*(1 for _ in x.shape[:-1]), -1)
        if not _at_weight(0.0, module, forward, row).any():
            return slope
    return slope - _at_weight(0.0, module, forward, x)


def _at_weight(value: float, module: nn.Module, forward: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor
               ) -> torch.Tensor:
    """output(x) with every weight at ``value`` and without the bias; plain tensors, also where the module's are not."""
    parameters: dict[str, Any] = module._parameters
    before = dict(parameters)
    try:
        for name, own in before.items():
            if own is not None:
                parameters[name] = torch.full(own.shape, value if name == "weight" else 0.0, dtype=x.dtype,
                                              device=x.device)
        return forward(x)
    finally:
        parameters.update(before)


def _autocast(x: torch.Tensor) -> torch.Tensor:
    """``x`` as autocast would hand it to a linear layer."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or not x.is_floating_point() or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(kind))

"""Directions Δθ to hold a gradient gap against: the update to come, the last one, and what Adam makes of gradients.

Each is a dict {parameter: tensor of its shape and dtype}, as ``ModelGap(direction=...)`` takes it; ``scan_step`` takes
its keys and values. Which one to choose is a matter of self-influence: an update made from the very rollouts that
measure the gap agrees with their noise, too, and its alignment is an overestimate. The last step's update, Adam's
momentum before the new gradient, and updates from other rollouts are free of it; for plain gradient steps
``ModelGapResult.step_alignment`` takes it out.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable
from typing import Any

import torch

from rlvr_fast import _validate as check

Direction = dict[torch.Tensor, torch.Tensor]
PART_ELEMENTS = 1 << 20  # on a CPU near its caches; larger parameters make larger parts


@torch.no_grad()
def propose(optimizer: torch.optim.Optimizer, parameters: Iterable[torch.Tensor] | None = None) -> Direction:
    """The Δθ that ``optimizer.step()`` would add now: the step is taken, read off as θ' − θ, and taken back.

    Whatever the step does is part of Δθ: momentum, weight decay, step hooks. Whatever the caller does before a step is
    the caller's to do: clipping, unscaling, gradients of all micro-batches. Parameters, gradients, the optimizer's
    state and its options are the same bits in the same tensors afterwards, also if ``step`` raises. Not undone: side
    effects of hooks beyond these, and that autograd sees parameters written to, so a graph recorded before cannot be
    run backward any more.

    Memory while it runs, beyond Δθ: one copy of the parameters, of their gradients and of the state (Adam: four numbers
    per parameter), of which the latter two are gone when Δθ is made. torch's own SGD, Adam and AdamW without step hooks
    go through it PART_ELEMENTS elements at a time, which is the same to them: copies of that size, in memory that
    serves again. (On a CPU most of the time went into fresh pages: five numbers per parameter.)

    Args:
        optimizer: any that steps without a closure.
        parameters: those wanted, out of the optimizer's; by default all that require a gradient. Parameters that
            neither require nor have one are taken to stay as they are.

    Returns:
        {parameter: Δθ}, in the order of ``parameters``; 0 where the optimizer leaves one alone.

    Raises:
        TypeError: if ``optimizer`` is no torch optimizer. ValueError: if its step needs a closure (LBFGS), or one of
            ``parameters`` is not the optimizer's. Whatever ``step`` raises.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {check.describe(optimizer)}")
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(f"optimizer must step without a closure, {type(optimizer).__name__} evaluates the loss itself")
    owned = [p for group in optimizer.param_groups for p in group["params"]]
    movable = [p for p in owned if p.requires_grad or p.grad is not None]
    wanted = [p for p in owned if p.requires_grad] if parameters is None else _distinct(parameters)
    known = {id(p) for p in movable}
    for i, parameter in enumerate(wanted):
        if id(parameter) not in known:
            raise ValueError(f"parameters[{i}] must be one that the optimizer moves, got {check.describe(parameter)}")

    gradients, chosen = {p: p.grad for p in movable}, {id(p) for p in wanted}
    moved: Direction = {}
    parts = _independent_parts(optimizer, movable)
    try:
        for part in parts:
            if len(parts) > 1:
                for p in movable:
                    p.grad = None
                for p in part:
                    p.grad = gradients[p]
            moved |= _step_and_back(optimizer, part, owned, chosen)
    finally:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
    return {p: moved[p] for p in wanted}


def _independent_parts(optimizer: torch.optim.Optimizer, movable: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Sets of parameters that may step one after the other, bit for bit as together: else all of them are one.

    So for torch's own element-by-element optimizers, if nobody's code looks at the step and no memory is shared.
    """
    hooks = any(getattr(owner, name, None) for owner, names in (
        (optimizer, ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")),
        (importlib.import_module("torch.optim.optimizer"),
         ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks"))) for name in names)
    own_step = vars(optimizer).get("step")
    plain = type(optimizer) in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW) and not hooks and (
        own_step is None or getattr(own_step, "_wrapped_by_lr_sched", False))
    tensors = [tensor for p in movable for tensor in (p, p.grad) if tensor is not None]
    plain &= all(type(x) in (torch.Tensor, torch.nn.Parameter) and x.layout == torch.strided for x in tensors)
    if not plain or len({x.untyped_storage().data_ptr() for x in tensors}) < len(tensors):
        return [movable]
    parts: list[list[torch.Tensor]] = [[]]
    size = 0
    for p in movable:
        if parts[-1] and size + p.numel() > PART_ELEMENTS:
            parts.append([])
            size = 0
        parts[-1].append(p)
        size += p.numel()
    return parts


def _step_and_back(optimizer: torch.optim.Optimizer, part: list[torch.Tensor], owned: list[torch.Tensor],
                   chosen: set[int]) -> Direction:
    """Δθ of the ``chosen`` (by id) of ``part``, the parameters that may move now."""
    inside, state = {id(p) for p in part}, optimizer.state
    others = {id(state[p]) for p in owned if id(p) not in inside and p in state}
    before = {p: p.clone() for p in part}
    rest = _Snapshot(leave={id(p) for p in owned} | others)
    try:
        rest.keep(vars(optimizer))
        gradients = {p: p.grad for p in part}
        rest.keep(gradients)
        try:
            optimizer.step()
        finally:
            for parameter, gradient in gradients.items():
                parameter.grad = gradient
            rest.restore()  # before the differences are made: its memory is theirs
        return {p: p - before[p] for p in part if id(p) in chosen}
    finally:
        for parameter, start in before.items():
            parameter.copy_(start)


class _Snapshot:
    """Values of the tensors, and members of the dicts and lists, inside a nest of these."""

    def __init__(self, leave: set[int]) -> None:
        self._seen = set(leave)
        self._tensors: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._containers: list[tuple[dict[Any, Any] | list[Any], dict[Any, Any] | list[Any]]] = []

    def keep(self, value: object) -> None:
        if id(value) in self._seen:
            return
        if isinstance(value, torch.Tensor):
            self._seen.add(id(value))
            self._tensors.append((value, value.detach().clone()))
        elif isinstance(value, dict | list | tuple):
            members = value.values() if isinstance(value, dict) else value
            if not isinstance(value, tuple):
                self._seen.add(id(value))
                self._containers.append((value, dict(value) if isinstance(value, dict) else list(value)))
            for member in list(members):
                self.keep(member)
        elif isinstance(value, torch.optim.Optimizer):  # one made of several, or a wrapper
            self.keep(vars(value))

    def restore(self) -> None:
        while self._tensors:
            tensor, start = self._tensors.pop()
            tensor.detach().copy_(start)
        while self._containers:
            container, members = self._containers.pop()
            container.clear()
            container.update(members) if isinstance(container, dict) else container.extend(members)


class StepRecorder:
    """Δθ of the last step, to measure the next batch's gap against: an update that had no part in its rollouts.

    ::

        recorder = rf.StepRecorder(model.parameters())
        for rollouts in ...:
            with rf.ModelGap(model, rollouts, direction=recorder.update) as probe:
                loss(rollouts).backward()
            with recorder:
                optimizer.step()

    The block may take any number of steps: Δθ is what they add up to. ``start`` and ``finish`` do the same for loops
    that offer callbacks. Holds one copy of the parameters, before the step as θ and after it as Δθ, both for a moment.

    Args:
        parameters: those that require a gradient are recorded.

    Attributes:
        update: {parameter: Δθ} of the last finished block, each in the parameter's dtype; None before it, inside, and
            after one that raised.
    """

    def __init__(self, parameters: Iterable[torch.Tensor]) -> None:
        self.parameters = tuple(p for p in _distinct(parameters) if p.requires_grad)
        if not self.parameters:
            raise ValueError("parameters must hold one that requires a gradient, got none")
        self.update: Direction | None = None
        self._before: Direction | None = None

    @torch.no_grad()
    def start(self) -> None:
        if self._before is not None:
            raise RuntimeError("the recorder was started already")
        self.update = None
        self._before = {p: p.clone() for p in self.parameters}

    @torch.no_grad()
    def finish(self) -> None:
        if self._before is None:
            raise RuntimeError("the recorder was not started")
        before, self._before = self._before, None
        self.update = {p: torch.sub(p, start, out=start) for p, start in before.items()}

    def __enter__(self) -> StepRecorder:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.finish()
        self._before = None

    def __repr__(self) -> str:
        state = "recording" if self._before is not None else "no step yet" if self.update is None else "one step"
        return f"StepRecorder(parameters={len(self.parameters)}, {state})"


@torch.no_grad()
def adam_direction(optimizer: torch.optim.Adam, gradients: Direction | None = None) -> Direction:
    """−lr m̂ / (√v̂ + ε) from Adam's state as the last step left it: what the momentum alone asks for.

    Right after a step this is the step itself without its weight decay; before the next one it has seen nothing of the
    gradients to come, so an alignment measured with it is free of self-influence, at no cost in memory but the result.

    Args:
        optimizer: torch.optim.Adam or AdamW (with amsgrad v is the running largest one, as in its step).
        gradients: {parameter: g} of the loss, in place of m̂: −lr g / (√v̂ + ε), the preconditioner of the last step
            applied to a gradient. Linear in g, so its only self-influence is that of g.

    Returns:
        {parameter: tensor}, of parameters with a state (and a gradient, when given).

    Raises:
        TypeError: for other optimizers. ValueError: where there is no state yet, or a gradient does not fit.
    """
    if not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        raise TypeError(f"optimizer must be torch.optim.Adam or AdamW, got {type(optimizer).__name__}")
    if gradients is not None and (not isinstance(gradients, dict) or not gradients):
        raise TypeError(f"gradients must be a dict from parameters to tensors, got {check.describe(gradients)}")
    result = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            if not {"exp_avg", "exp_avg_sq", "step"} <= state.keys() or (gradients is not None and p not in gradients):
                continue
            beta1, beta2 = group["betas"]
            step = torch.as_tensor(state["step"]).double()  # a float32 tensor: β**step in float64 as in the step itself
            second = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
            if gradients is None:
                numerator = state["exp_avg"] / (1 - beta1**step)
            else:
                numerator = check.tensor("gradients[...]", gradients[p], shape=tuple(p.shape), device=p.device)
                numerator = -numerator if group["maximize"] else numerator
            root = (second / (1 - beta2**step)).sqrt_().add_(group["eps"])
            result[p] = numerator.to(root.dtype).div(root).mul_(-group["lr"])
    missing = [p for p in gradients or {} if p not in result]
    if missing or not result:
        raise ValueError("optimizer must have taken a step with the parameters in question, it has no state "
                         f"{'yet' if not missing else f'for {check.describe(missing[0])}'}")
    return result


def _distinct(parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    if isinstance(parameters, torch.Tensor) or not isinstance(parameters, Iterable):
        raise TypeError(f"parameters must be an iterable of tensors, got {check.describe(parameters)}")
    parameters = list(parameters)
    for i, parameter in enumerate(parameters):
        check.tensor(f"parameters[{i}]", parameter)
    if len({id(p) for p in parameters}) < len(parameters):
        raise ValueError("parameters must be distinct tensors, got one twice")
    return parameters

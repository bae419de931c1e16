"""Backward passes that leave no trace on ``param.grad``, and the slow trustworthy method made of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch

from rlvr_fast.model_gap.micro_batch import MicroBatch
from rlvr_fast.model_gap.tensor_parallel.layers import TensorParallel
from rlvr_fast.rollouts import Rollouts


@contextmanager
def isolated_gradients(parameters: dict[str, torch.nn.Parameter]) -> Iterator[None]:
    """Inside, every ``param.grad`` starts from None; afterwards each is the object it was.

    ``backward`` rather than ``torch.autograd.grad``, which reentrant checkpointing does not allow.

    Raises:
        ValueError: if a parameter has post-accumulate hooks, which would act (an optimizer in the backward, say).
    """
    for name, parameter in parameters.items():
        if getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise ValueError(f"{name} has post-accumulate-grad hooks, which a probe backward would set off: "
                             "remove them while probing")
    before = {name: parameter.grad for name, parameter in parameters.items()}
    try:
        for parameter in parameters.values():
            parameter.grad = None
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.grad = before[name]


class ExactCollector:
    """⟨G_i, G_j⟩ over all parameters from one backward per response. Keeps the gradients of unfinished prompts.

    Args:
        spread: of a model whose layers are spread over ranks; then gradients are what is here of them.

    Attributes: ``grams``, ``dots`` and ``vectors`` as in ``GramCollector``.
    """

    def __init__(self, rollouts: Rollouts, direction: dict[str, torch.Tensor],
                 spread: TensorParallel | None = None) -> None:
        self.rollouts, self.direction, self.spread = rollouts, direction, spread
        self.grams: dict[str, torch.Tensor] = {}
        self.vectors: dict[str, torch.Tensor] = {}
        self.dots: dict[str, torch.Tensor] = {}
        self._gradients: dict[int, dict[str, torch.Tensor]] = {}

    def collect(self, micro_batch: MicroBatch, totals: list[torch.Tensor],
                parameters: dict[str, torch.nn.Parameter]) -> None:
        """``totals``: log π(o_i) of the micro-batch's responses, each a scalar with a graph."""
        for response, total in zip(micro_batch.responses, totals, strict=True):
            with isolated_gradients(parameters):
                total.backward(retain_graph=True)
                self._gradients[response] = {name: gradient for name, p in parameters.items()
                                             if (gradient := self._taken(response, name, p)) is not None}
        for prompt, _ in micro_batch.groups:
            members = self.rollouts.members[prompt]
            if all(response in self._gradients for response in members):
                self._reduce(members, [self._gradients.pop(response) for response in members], parameters)

    def _taken(self, response: int, name: str, parameter: torch.nn.Parameter) -> torch.Tensor | None:
        gradient = parameter.grad
        if gradient is None:
            return None
        if self.spread is not None:
            partial = self.spread.is_partial(gradient)
            self.spread.hold(name, parameter, partial=partial)
            gradient = self.spread.local_gradient(name, parameter, gradient)
            if partial:
                rows = self.vectors.setdefault(name, torch.zeros(self.rollouts.n_responses, gradient.numel(),
                                                                 dtype=torch.float64, device=gradient.device))
                rows[response] = gradient.reshape(-1).double()
                return None
        return gradient.reshape(-1).double()

    def flush(self, micro_batch: MicroBatch) -> None:
        """Nothing waits but prompts with responses still to come."""

    def _reduce(self, members: Sequence[int], gradients: list[dict[str, torch.Tensor]], parameters: Iterable[str]
                ) -> None:
        width = max(len(prompt) for prompt in self.rollouts.members)
        for name in parameters:
            own = [gradient.get(name) for gradient in gradients]
            if all(vector is None for vector in own):
                continue
            some = next(vector for vector in own if vector is not None)
            flat = torch.stack([torch.zeros_like(some) if vector is None else vector for vector in own])
            n_responses = self.rollouts.n_responses
            gram = self.grams.setdefault(name, flat.new_zeros(n_responses, width))
            gram[list(members), :len(members)] = flat @ flat.T
            if name in self.direction:
                dots = self.dots.setdefault(name, flat.new_zeros(n_responses))
                along = self.direction[name]
                if self.spread is not None:
                    along = self.spread.parts[name].of(along)
                dots[list(members)] = flat @ along.double().reshape(-1)

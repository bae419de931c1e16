"""The witness of layers that are spread over tensor-parallel ranks: entries of what is here of their gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch

from rlvr_fast.model_gap.tensor_parallel.layers import TensorParallel, is_dtensor
from rlvr_fast.model_gap.witness import Witness, _spread
from rlvr_fast.rollouts import Rollouts


class ShardWitness(Witness):
    """As ``Witness``; the sampled entries of a spread parameter are among those of this rank."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter], rollouts: Rollouts, spread: TensorParallel) -> None:
        self.spread = spread
        super().__init__(parameters, rollouts)

    def watch(self, name: str, parameter: torch.Tensor) -> None:
        if not is_dtensor(parameter):
            super().watch(name, parameter)
        elif parameter not in self._hooks:
            sizes = self.spread.extent(name, parameter)[1]
            if 0 in sizes:  # nothing is here, and nothing of it is covered
                return
            self.entries[name] = tuple(_spread(n, step, parameter.device)
                                       for n, step in zip(sizes, (7, 3), strict=False))
            self._hooks[parameter] = parameter.register_hook(self._local_receiver(name, parameter))

    def _local_receiver(self, name: str, parameter: torch.Tensor) -> Callable[[torch.Tensor], None]:
        receive = self._receiver(name)
        return lambda gradient: receive(self.spread.local_gradient(name, parameter, gradient.detach()))

    def partial(self, name: str, values: torch.Tensor) -> None:
        """Partial sums here, and the gradient that arrives is a partial sum too."""
        self.vector(name, values)

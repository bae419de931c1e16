"""Whether a parameter's gradient came through its module: a few of its entries, computed a second way.

A weight that is also used outside its module (``F.linear(h, embedding.weight)``) has a gradient that no tap saw, and
inner products without that part are silently wrong. So a few entries of the gradient that reaches the parameter are
compared with what the taps account for. Everything stays on the device until ``strangers`` is asked.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from rlvr_fast.model_gap import native
from rlvr_fast.rollouts import Rollouts

N_ENTRIES = 8
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}


class Witness:
    """Sampled entries of each parameter's gradient: as received by the parameter, and as seen by the taps."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter], rollouts: Rollouts) -> None:
        self.entries: dict[str, tuple[torch.Tensor, ...]] = {}
        self.received: dict[str, torch.Tensor] = {}
        self.seen: dict[str, torch.Tensor] = {}
        self.size: dict[str, torch.Tensor] = {}  # sums of magnitudes, the scale of rounding errors
        self.low: dict[str, torch.dtype] = {}  # the coarsest dtype on the way
        self._hooks: dict[torch.Tensor, torch.utils.hooks.RemovableHandle] = {}
        for name, parameter in parameters.items():
            self.entries[name] = tuple(_spread(n, step, parameter.device)
                                       for n, step in zip(parameter.shape, (7, 3), strict=False))
            if parameter.ndim == 2 and rollouts.vocabulary_range[1] < len(parameter) and rollouts.n_tokens:
                # Half of the rows of anything as tall as a vocabulary are those of tokens that occur.
                rows = self.entries[name][0].clone()
                rows[::2] = rollouts.tokens[_spread(rollouts.n_tokens, 5, rollouts.device)[::2]].to(rows.device)
                self.entries[name] = (rows, self.entries[name][1])
            for store in (self.received, self.seen, self.size):
                store[name] = torch.zeros(N_ENTRIES, dtype=torch.float64, device=parameter.device)
            self.low[name] = parameter.dtype
            if not hasattr(parameter, "device_mesh"):  # of a shard the layer will show the whole, see ``watch``
                self.watch(name, parameter)

    def watch(self, name: str, parameter: torch.Tensor) -> None:
        """Note the gradients that reach ``parameter``, which is what a layer computes with for ``name``."""
        if parameter in self._hooks:
            return
        if hasattr(parameter, "device_mesh"):
            raise ValueError(f"{name} must be a plain tensor while its layer runs, got a DTensor: tensor-parallel "
                             "layers cannot be measured")
        self._hooks[parameter] = parameter.register_hook(self._receiver(name))

    def _receiver(self, name: str) -> Callable[[torch.Tensor], None]:
        def receive(gradient: torch.Tensor) -> None:
            self.received[name] += gradient.detach()[self.entries[name]].double()
        return receive

    def close(self) -> None:
        for hook in self._hooks.values():
            hook.remove()
        self._hooks = {}

    def outer(self, name: str, b: torch.Tensor, a: torch.Tensor) -> None:
        rows, columns = self.entries[name]
        if native.serves(a, b):
            native.outer_entries(b, a, rows, columns, self.seen[name], self.size[name])
        else:
            self._account(name, b[:, rows].double() * a[:, columns].double())

    def rows(self, name: str, ids: torch.Tensor, b: torch.Tensor) -> None:
        rows, columns = self.entries[name]
        self._account(name, (ids[:, None] == rows) * b[:, columns].double())

    def vector(self, name: str, values: torch.Tensor) -> None:
        self._account(name, values[:, self.entries[name][0]].double())

    def _account(self, name: str, terms: torch.Tensor) -> None:
        self.seen[name] += terms.sum(0)
        self.size[name] += terms.abs().sum(0)

    def rounded(self, name: str, dtype: torch.dtype) -> None:
        """A factor of the gradient of ``name`` came in ``dtype``."""
        if TOLERANCE.get(dtype, 0) > TOLERANCE.get(self.low[name], 0):
            self.low[name] = dtype

    def strangers(self) -> list[str]:
        """Parameters whose gradient is not what the taps saw. Synchronises."""
        names = []
        for name, received in self.received.items():
            difference = (received - self.seen[name]).abs()
            allowed = TOLERANCE.get(self.low[name], 0.1) * self.size[name].max().clamp(min=1e-30)
            if bool((difference > allowed).any()):
                names.append(name)
        return names


def _spread(n: int, step: int, device: torch.device) -> torch.Tensor:
    """N_ENTRIES places in [0, n), spread out."""
    return torch.tensor([(i * n // N_ENTRIES + step * i) % n for i in range(N_ENTRIES)], device=device)

"""What happens between entering and leaving a ``ModelGap``: which forward is under way, which backward counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rlvr_fast.model_gap import micro_batch
from rlvr_fast.model_gap.coefficients import HeadRows, observe
from rlvr_fast.model_gap.collect import GramCollector, SketchCollector
from rlvr_fast.model_gap.exact import ExactCollector
from rlvr_fast.model_gap.micro_batch import MicroBatch, Spans
from rlvr_fast.model_gap.witness import Witness
from rlvr_fast.rollouts import Rollouts

if TYPE_CHECKING:
    from rlvr_fast.model_gap.tap import Site


class Recording:
    """The state that the sites in a model's backward read and write.

    Attributes:
        collector, witness: where contributions go.
        forwards: the micro-batches so far. seen: their responses, in that order.
        observed: what the lm_head saw in training backwards.
        problems: what went wrong in a backward, where raising would break the training step.
        skipped: parameter -> reason, for layers whose rows belong to no response.
    """

    def __init__(self, rollouts: Rollouts, method: str, collector: GramCollector | SketchCollector | ExactCollector,
                 lm_head: nn.Module | None, temperature: float) -> None:
        self.rollouts, self.method, self.collector = rollouts, method, collector
        self.lm_head, self.temperature = lm_head, temperature
        self.witness: Witness  # set before the first forward
        self.forwards: list[MicroBatch] = []
        self.seen: list[int] = []
        self.observed: list[HeadRows] = []
        self.problems: list[str] = []
        self.skipped: dict[str, str] = {}
        self.open = True
        self._active: MicroBatch | None = None  # the forward under way
        self._pending: list[MicroBatch] = []  # forwards whose backward may still recompute activations
        self._stand_ins: set[MicroBatch] = set()  # for recomputations that could belong to several of these
        self._probing: MicroBatch | None = None  # the forward whose probe backward is under way

    # -- forwards -----------------------------------------------------------------------------------------------------

    def run_model(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of the model: a micro-batch of its own, unless one is open or no backward will follow."""
        if self._active is not None or not torch.is_grad_enabled() or _in_backward():
            return forward(*args, **kwargs)
        with self.forward(micro_batch.from_forward(self.rollouts, len(self.seen), args, kwargs)):
            return forward(*args, **kwargs)

    @contextmanager
    def forward(self, batch: MicroBatch) -> Iterator[None]:
        """The forward of ``batch``. Raises before anything is counted if its responses do not fit."""
        if self._active is not None:
            raise RuntimeError("a micro-batch is open already")
        known = set(self.seen)
        for response in batch.responses:
            if response in known:
                raise ValueError(f"responses must be in one forward only, response {response} comes again")
            known.add(response)
        if self.method in ("segmented", "ghost") and (prompt := batch.split_prompt()) is not None:
            raise ValueError(f"method {self.method!r} needs all responses of a prompt in one forward, prompt "
                             f"{self.rollouts.prompt_ids[prompt]!r} has some elsewhere: use method='sketch' "
                             "(packed rows: give position_ids that restart at 0, or cu_seqlens)")
        if any(earlier.captured for earlier in self._pending):
            self._pending = []
        self.seen += batch.responses
        self.forwards.append(batch)
        self._pending.append(batch)
        self._active = batch
        try:
            yield
        except BaseException:
            self.seen = self.seen[:-len(batch.responses)]
            self.forwards.remove(batch)
            self._pending.remove(batch)
            raise
        finally:
            self._active = None

    def locate(self, site: Site, seen: object) -> tuple[MicroBatch, Spans, bool] | None:
        """For a call of ``site`` on ``seen``: its micro-batch, the rows of each response, whether it is recomputed."""
        if not isinstance(seen, torch.Tensor):
            return None
        if self._active is not None:
            spans = self._active.spans(site.leading(seen))
            if spans is None:
                for name in site.parameters.values():
                    self.skipped.setdefault(name, f"{type(site.module).__name__}: rows of its input "
                                                  f"{list(seen.shape)} cannot be assigned to responses")
                return None
            for own, name in site.parameters.items():
                self.witness.watch(name, getattr(site.module, own))
            return self._active, spans, False
        if not _in_backward():
            return None
        fitting = [(batch, spans) for batch in self._pending if (spans := batch.spans(site.leading(seen))) is not None]
        if len(fitting) <= 1:
            return (*fitting[0], True) if fitting else None
        # Non-reentrant checkpointing wants the tensors that this forward saves, not its graph; reentrant does.
        batch, spans = fitting[0]
        stand_in = MicroBatch(self.rollouts, batch.responses, batch.bounds, batch.packed)
        self._stand_ins.add(stand_in)
        return stand_in, spans, True

    # -- backwards ----------------------------------------------------------------------------------------------------

    @contextmanager
    def probe(self, batch: MicroBatch) -> Iterator[None]:
        """The probe backward of ``batch``."""
        batch.probed, self._probing = True, batch
        try:
            yield
        finally:
            self._probing = None

    def captures(self, site: Site, batch: MicroBatch) -> bool:
        """Whether the backward that reached ``site`` is one to measure."""
        if batch in self._stand_ins:
            self.problems.append("with reentrant activation checkpointing the backward has to follow each forward "
                                 "(several forwards were open): use that order, or use_reentrant=False")
            return False
        if not self.open or self._probing is not (batch if batch.probed else None):
            return False
        uses = site.uses()
        if uses and all(batch.arrived[use] >= batch.calls[use] for use in uses):
            self.problems.append(f"a second backward came through {site.name or 'the model'} for the same forward: "
                                 "call probe.backward(logp) before them")
            return False
        batch.captured = True
        return True

    def observe_head(self, site: Site, batch: MicroBatch, spans: Spans, seen: torch.Tensor, gradient: torch.Tensor
                     ) -> None:
        """Note the coefficients of a training backward, if ``site`` is the lm_head."""
        if site.module is not self.lm_head or batch.probed:
            return
        hidden, flat = seen.reshape(-1, seen.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        self.observed.append(observe(batch, seen.shape[:-1], spans, hidden, flat, site.weight, site.bias,
                                     self.temperature))

    def flush(self) -> None:
        for batch in self.forwards:
            self.collector.flush(batch)

    @property
    def source(self) -> str:
        kinds = {batch.probed for batch in self.forwards}
        return "mixed" if len(kinds) == 2 else "probe" if kinds == {True} else "training"

    def check_complete(self) -> None:
        """Every response went through a forward and the backward that its method needs."""
        if self.problems:
            raise RuntimeError("; ".join(dict.fromkeys(self.problems)))
        if not self.forwards:
            raise RuntimeError("no forward of the model with gradients ran inside the with block: both the forward and "
                               "the backward have to (probe.micro_batch for loops that call parts of the model)")
        if len(self.seen) != self.rollouts.n_responses:
            raise RuntimeError(f"only {len(self.seen)} of {self.rollouts.n_responses} responses were in a forward")
        lost = [i for batch in self.forwards if not batch.captured for i in batch.responses]
        if lost:
            what = "probe.backward(logp)" if self.method == "exact" else "a backward"
            raise RuntimeError(f"{what} never came for {len(lost)} responses, response {lost[0]} the first")


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1

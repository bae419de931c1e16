"""What the responses of a step left behind, complete and checked: all that estimates are made of."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch

from rlvr_fast.model_gap.coefficients import HeadRows, NotConstant, response_coefficients
from rlvr_fast.model_gap.collect import SketchCollector
from rlvr_fast.model_gap.micro_batch import MicroBatch
from rlvr_fast.model_gap.recording import Recording
from rlvr_fast.model_gap.tensor_parallel.join import Join, Terms
from rlvr_fast.rollouts import Rollouts

ADVICE = "call probe.backward(logp) before the loss's backward"


@dataclass(frozen=True, eq=False, repr=False)
class JoinedResponses:
    """The responses of all ranks, in rank order; prompts with one id are one prompt. Attributes as in ``Rollouts``."""

    correct: torch.Tensor
    prompt_index: torch.Tensor
    prompt_ids: tuple[Hashable, ...]
    lengths: torch.Tensor
    members: tuple[tuple[int, ...], ...]

    @property
    def n_prompts(self) -> int:
        return len(self.prompt_ids)

    @property
    def n_responses(self) -> int:
        return self.correct.numel()

    @property
    def device(self) -> torch.device:
        return self.correct.device


@dataclass(frozen=True, eq=False, repr=False)
class Collected:
    """What a step left behind: of this rank's responses or, once joined, of those of all ranks.

    Attributes:
        rollouts: the R responses.
        source: "training", "probe" or "mixed".
        coefficients: [R] float64 on the host, c_i; 0 where the response was not measured.
        tables: covered parameter -> [R, n_max] inner products or [R, K] sketches.
        dots: covered parameter -> [R] float64, inner products with the direction.
        reasons: other trainable parameter -> why it is not covered.
        norm_sq: parameter -> squared norm of its gradient.
    """

    rollouts: Rollouts | JoinedResponses
    source: str
    coefficients: torch.Tensor
    tables: dict[str, torch.Tensor]
    dots: dict[str, torch.Tensor]
    reasons: dict[str, str]
    norm_sq: dict[str, torch.Tensor]

    @classmethod
    def of(cls, recording: Recording, parameters: list[str], reasons: dict[str, str], norm_sq: dict[str, torch.Tensor],
           *, gradients: dict[str, torch.Tensor] | None = None, join: Join | None = None) -> Collected:
        """What ``recording`` holds of the trainable ``parameters``; ``reasons`` as known before the step. Synchronises.

        With ``join``, to which ``gradients`` go (see ``Terms``), what all tensor-parallel ranks hold; collective.

        Raises:
            RuntimeError: if responses went through no backward, or the training backward says nothing about ∇log π.
        """
        collector, observed = recording.collector, recording.observed
        direction = collector.direction
        if join is None:
            own = _terms(recording, parameters, reasons, norm_sq, {})
        else:
            try:
                own = _terms(recording, parameters, reasons, norm_sq, gradients or {})
                join.check()
            except Exception as error:
                join.refuse(error)
                raise
            own = join.total(own, direction)
            observed = observed + join.heads()
        rollouts = recording.rollouts
        coefficients = torch.ones(rollouts.n_responses, dtype=torch.float64)
        if training := [batch for batch in recording.forwards if not batch.probed]:
            read = _coefficients(recording, training, observed)
            coefficients = torch.where(read.isnan(), coefficients, read)
        dots = collector.dots(own.tables) if isinstance(collector, SketchCollector) else own.dots
        return cls(rollouts, recording.source, coefficients, own.tables,
                   {name: value for name, value in dots.items() if name in own.tables}, own.reasons, own.norm_sq)

    def check_measured(self) -> None:
        """Raise if a prompt of both classes, on whatever ranks, has a response without a gradient."""
        for prompt, members in enumerate(self.rollouts.members):
            own, correct = self.coefficients[list(members)], self.rollouts.correct[list(members)].cpu()
            if bool((own == 0).any()) and bool(correct.any()) and not bool(correct.all()):
                raise RuntimeError(f"prompt {self.rollouts.prompt_ids[prompt]!r} has both classes, but response "
                                   f"{members[int((own == 0).nonzero()[0])]} has coefficient 0 in the loss: {ADVICE}")


def _terms(recording: Recording, parameters: list[str], reasons: dict[str, str], norm_sq: dict[str, torch.Tensor],
           gradients: dict[str, torch.Tensor]) -> Terms:
    """What this rank has."""
    recording.check_complete()
    collector = recording.collector
    reasons = {**recording.skipped, **reasons}
    for name in recording.witness.strangers():
        reasons.setdefault(name, "a part of its gradient came from outside its module, or its gradient was changed by "
                                 "a hook")
    vectors: dict[str, torch.Tensor] = {}
    dots: dict[str, torch.Tensor] = {}
    if isinstance(collector, SketchCollector):
        tables = collector.sketches
    else:
        tables, vectors, dots = collector.grams, collector.vectors, collector.dots
    for name in parameters:
        if name not in tables and name not in vectors:
            reasons.setdefault(name, "no gradient came to it")
    tables = {name: table for name, table in tables.items() if name not in reasons}
    if not tables and not vectors.keys() - reasons.keys():
        raise RuntimeError(f"no parameter is covered: {reasons}")
    return Terms(tables, dots, reasons, norm_sq, vectors, gradients)


def _coefficients(recording: Recording, training: list[MicroBatch], observed: list[HeadRows]) -> torch.Tensor:
    if {id(batch) for batch in training} - {id(rows.micro_batch) for rows in observed}:
        raise RuntimeError("the training backward was to be measured, but no gradient came through the lm_head module "
                           f"({'none was found' if recording.lm_head is None else 'a fused loss?'}): {ADVICE}")
    try:
        return response_coefficients(recording.rollouts, observed)
    except NotConstant as reason:
        raise RuntimeError(f"the training backward is not that of a pure policy gradient, {reason}: {ADVICE}") from None

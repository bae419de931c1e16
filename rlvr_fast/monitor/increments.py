"""What a window has brought so far, and its exchange between ranks: rows are joined, never states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from rlvr_fast import _validate as check
from rlvr_fast.distributed import carrier, gather
from rlvr_fast.monitor.gaps import PROMPT_COLUMNS, GradientRows, PromptRows
from rlvr_fast.monitor.inputs import COLUMNS, ResponseRows
from rlvr_fast.step.measure import StepMeasure

STEP_COLUMNS = ("step_slope", "step_curvature", "var_step_curvature", "step_rate", "steps")
SCALARS = ("bytes", "configuration", "window", "spent", "window_seconds", "responses", "gradients", "width", "prompts",
           "steps")
"""Head of a rank's buffer: its own size, a checksum of its settings, the counts of its rows, its costs."""


def no_steps() -> torch.Tensor:
    return torch.zeros(0, len(STEP_COLUMNS), dtype=torch.float64)


def step_rows(step: StepMeasure | None, learning_rate: float | None) -> torch.Tensor:
    """[0 or 1, len(STEP_COLUMNS)] float64, on the measure's device."""
    if (step is None) != (learning_rate is None):
        raise ValueError("step and learning_rate must be given together")
    if step is None:
        return no_steps()
    if not isinstance(step, StepMeasure):
        raise TypeError(f"step must be a StepMeasure, got {type(step).__name__}")
    learning_rate = check.positive("learning_rate", learning_rate)
    curvature = step.success_curvature
    rate, one = torch.full_like(curvature, learning_rate), torch.ones_like(curvature)
    return torch.stack([step.success_slope, curvature, step.success_curvature_stderr.square(), rate, one])[None]


@dataclass(frozen=True, eq=False)
class Increment:
    """The rows of one update, or of several joined.

    Attributes:
        responses: what is known of each response.
        gradients: None where no gradients were given.
        prompts: figures of whole prompts.
        steps: [S, len(STEP_COLUMNS)] float64, measured steps.
    """

    responses: ResponseRows
    gradients: GradientRows | None
    prompts: PromptRows
    steps: torch.Tensor

    @classmethod
    def join(cls, parts: Sequence[Increment]) -> Increment:
        """In a row; tables on the host, gradients where they are."""
        responses = [part.responses for part in parts] or [ResponseRows.none()]
        prompts = [part.prompts for part in parts] or [PromptRows.none()]
        return cls(ResponseRows(*_cat(responses)), GradientRows.cat([p.gradients for p in parts if p.gradients]),
                   PromptRows(*_cat(prompts)), torch.cat([no_steps(), *(part.steps.cpu() for part in parts)]))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything in it, for a checkpoint."""
        found = {"responses/keys": self.responses.keys, "responses/cells": self.responses.cells,
                 "prompts/keys": self.prompts.keys, "prompts/cells": self.prompts.cells,
                 "steps": self.steps}
        if self.gradients is not None:
            found |= {f"gradients/{name}": value for name, value in vars(self.gradients).items()}
        return found

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor]) -> Increment:
        gradients = None
        if "gradients/vectors" in tensors:
            gradients = GradientRows(*(tensors[f"gradients/{name}"]
                                       for name in ("keys", "correct", "advantage", "vectors")))
        return cls(ResponseRows(tensors["responses/keys"], tensors["responses/cells"]), gradients,
                   PromptRows(tensors["prompts/keys"], tensors["prompts/cells"]), tensors["steps"])


def _cat(parts: Sequence[ResponseRows] | Sequence[PromptRows]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat([part.keys.cpu() for part in parts]), torch.cat([part.cells.cpu() for part in parts])


class Exchange:
    """All ranks' increments, by one all-gather of a flat buffer.

    The buffer is as large as the largest that any rank has needed so far. Where one needs more, its head tells all, and
    the gather is made a second time.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.buffer_bytes = 8 * len(SCALARS)
        self.collectives = 0

    @property
    def device(self) -> torch.device:
        return carrier(self.group)

    def gather(self, own: Increment, scalars: dict[str, float]) -> tuple[Increment, list[dict[str, float]]]:
        """(the increments of all ranks joined, in rank order; each rank's scalars). Collective."""
        sections = self._sections(own)
        size = 8 * len(SCALARS) + sum(section.numel() for section in sections)
        width = 0 if own.gradients is None else own.gradients.vectors.shape[1]
        scalars = scalars | {"bytes": size, "responses": len(own.responses.keys), "width": width,
                             "gradients": 0 if own.gradients is None else len(own.gradients.keys),
                             "prompts": len(own.prompts.keys), "steps": len(own.steps)}
        head = torch.tensor([scalars[name] for name in SCALARS], dtype=torch.float64, device=self.device)
        flat = torch.cat([head.view(torch.uint8), *sections])
        while True:
            buffer = flat.new_zeros(self.buffer_bytes)
            kept = min(self.buffer_bytes, size)
            buffer[:kept] = flat[:kept]
            received = gather(buffer, self.group)
            self.collectives += 1
            heads = [dict(zip(SCALARS, row.tolist(), strict=True))
                     for row in received[:, :8 * len(SCALARS)].contiguous().view(torch.float64)]
            needed = -(-int(max(head["bytes"] for head in heads)) // 8) * 8
            if needed <= self.buffer_bytes:
                break
            self.buffer_bytes = needed
        parts = [self._unpack(row[8 * len(SCALARS):], head) for row, head in zip(received, heads, strict=True)]
        return Increment.join(parts), heads

    def _sections(self, own: Increment) -> list[torch.Tensor]:
        """The rows as bytes, wide dtypes first."""
        values = [own.responses.keys, own.responses.cells, own.prompts.keys, own.prompts.cells, own.steps]
        if (rows := own.gradients) is not None:
            values += [rows.keys, rows.correct, rows.advantage, rows.vectors]
        return [value.to(self.device).contiguous().view(-1).view(torch.uint8) for value in values]

    @staticmethod
    def _unpack(row: torch.Tensor, head: dict[str, float]) -> Increment:
        taken = 0

        def take(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            nonlocal taken
            start, taken = taken, taken + dtype.itemsize * torch.Size(shape).numel()
            return row[start:taken].view(dtype).view(shape)

        n, p, s, g, width = (int(head[name]) for name in ("responses", "prompts", "steps", "gradients", "width"))
        responses = ResponseRows(take(torch.int64, n), take(torch.float64, n, 1 + len(COLUMNS)))
        prompts = PromptRows(take(torch.int64, p), take(torch.float64, p, len(PROMPT_COLUMNS)))
        steps, gradients = take(torch.float64, s, len(STEP_COLUMNS)), None
        if g:
            gradients = GradientRows(take(torch.int64, g), take(torch.float64, g), take(torch.float64, g),
                                     take(torch.float32, g, width))
        return Increment(responses, gradients, prompts, steps)

"""What a ``ModelGap`` is asked to measure, checked, and agreed upon where ranks share the model's layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from rlvr_fast import _validate as check
from rlvr_fast.distributed import checksum
from rlvr_fast.model_gap import attach
from rlvr_fast.model_gap.collect import GramCollector, SketchCollector, sketch_columns
from rlvr_fast.model_gap.exact import ExactCollector
from rlvr_fast.model_gap.parallel import Ranks, refusals_told
from rlvr_fast.model_gap.tensor_parallel.group import layer_group
from rlvr_fast.model_gap.tensor_parallel.layers import TensorParallel, is_dtensor
from rlvr_fast.rollouts import Rollouts
from rlvr_fast.vocabulary_parallel import VocabularyShard

METHODS = ("segmented", "ghost", "sketch", "exact")


@dataclass(eq=False, repr=False)
class Arguments:
    """Attributes as the arguments of ``ModelGap``, and what they say of the model.

    Attributes:
        model: itself, out of its DistributedDataParallel; ``in_ddp`` if it was in one.
        parameters: the trainable ones, by name.
        layers: the ranks that share its layers, if any do; ``spread`` what is here of them.
        shapes: of the whole parameters. directions: ``direction`` by name, empty without one.
    """

    model: nn.Module
    rollouts: Rollouts
    method: str
    length_norm: bool
    temperature: float
    lm_head: nn.Module | None
    sketch_size: int
    seed: int
    direction: Mapping[Any, torch.Tensor] | None
    group: dist.ProcessGroup | None
    vocabulary: VocabularyShard | None

    def validate(self) -> Ranks | None:
        """Check everything; the ranks of ``group``. Collective over these, and over ranks that share layers.

        Raises:
            ValueError, TypeError: on every rank, naming what came and what was expected.
        """
        with refusals_told(self.group):
            self.in_ddp, self.model = attach.unwrapped(self.model) is not self.model, attach.unwrapped(self.model)
            attach.reshard(self.model)
            self.layers = layer_group(dict(self.model.named_parameters()), attach.gathered(self.model), self.group,
                                      self.vocabulary)
            with refusals_told(self.layers):
                self._check_alone()
            if self.spread is not None:
                self.spread.agree(self.rollouts, f"{self._options}, directions #{checksum(tuple(self.directions))}")
        if self.group is None:
            return None
        return Ranks(self.group, self.rollouts, self.parameters, columns=self.columns, directed=tuple(self.directions),
                     options=self._options)

    def _check_alone(self) -> None:
        attach.check_model(self.model)
        if not isinstance(self.rollouts, Rollouts):
            raise TypeError(f"rollouts must be rlvr_fast.Rollouts, got {type(self.rollouts).__name__}")
        if self.rollouts.n_responses == 0:
            raise ValueError("rollouts must hold at least one response, got none")
        device = next(self.model.parameters()).device
        if self.rollouts.device != device:
            raise ValueError(f"rollouts must be on {device}, where the model is, got {self.rollouts.device}")
        check.choice("method", self.method, METHODS)
        check.flag("length_norm", self.length_norm)
        self.temperature = check.positive("temperature", self.temperature)
        if isinstance(self.sketch_size, bool) or not isinstance(self.sketch_size, int) or self.sketch_size < 2:
            raise ValueError(f"sketch_size must be an int of at least 2, got {check.describe(self.sketch_size)}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed must be an int, got {check.describe(self.seed)}")
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.lm_head = attach.find_lm_head(self.model, self.lm_head)
        self.spread = self._spread()
        self.shapes = {name: tuple(p.shape) for name, p in self.parameters.items()}
        if self.spread is not None:
            self.shapes = self.spread.shapes
        self.directions = attach.check_direction(self.direction, self.parameters, self.shapes)
        if self.method == "exact" and (self.in_ddp or attach.gathered(self.model)):
            raise ValueError("method 'exact' runs a backward per response, each of which DistributedDataParallel or "
                             "fully_shard would take for the step's: pass another method, or a model without them")

    def _spread(self) -> TensorParallel | None:
        if self.layers is None:
            return None
        head = []
        if self.vocabulary is not None:
            if not isinstance(self.lm_head, nn.Linear) or is_dtensor(self.lm_head.weight):
                raise ValueError("vocabulary says which rows of the lm_head are here, a Linear of plain tensors; got "
                                 f"{'no lm_head' if self.lm_head is None else 'one with a DTensor or of another kind'}")
            self.vocabulary.check_rows(self.lm_head.weight)
            own = {id(p) for p in self.lm_head.parameters()}
            head = [name for name, p in self.parameters.items() if id(p) in own]
        return TensorParallel(self.layers, self.parameters, self.vocabulary, head)

    @property
    def columns(self) -> dict[str, int] | None:
        """Floats in the sketch of each parameter; None for other methods."""
        if self.method != "sketch":
            return None
        return {name: sketch_columns(shape, self.sketch_size) for name, shape in self.shapes.items()}

    @property
    def _options(self) -> str:
        return f"{self.method} size {self.sketch_size} seed {self.seed}, length_norm {self.length_norm}"

    def new_collector(self) -> GramCollector | SketchCollector | ExactCollector:
        """Where the contributions of a step go."""
        if self.method == "exact":
            return ExactCollector(self.rollouts, self.directions, self.spread)
        parts = None if self.spread is None else self.spread.parts
        if self.method == "sketch":
            return SketchCollector(self.rollouts, self.shapes, k=self.sketch_size, seed=self.seed,
                                   direction=self.directions, parts=parts)
        return GramCollector(self.rollouts, self.shapes, ghost=self.method == "ghost", direction=self.directions,
                             parts=parts)

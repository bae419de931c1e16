"""The exact success rate after every step of a trainer, and how long the steps took without that."""

from __future__ import annotations

import time
from typing import Any

import problems
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback


class Success(TrainerCallback):
    """Mean probability of the held-out prompts' right completions.

    Attributes:
        rates: before the first step and after each. wall, cpu: seconds of each step.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
                 held_out: list[tuple[str, str]]) -> None:
        self._model, self._batch = model, problems.batch(tokenizer, held_out)
        self._began = 0.0, 0.0
        self.rates: list[float] = []
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._measure()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        wall, cpu = self._began
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)
        self._measure()

    def _measure(self) -> None:
        training = self._model.training
        self._model.eval()
        self.rates.append(problems.success(self._model, *self._batch))
        self._model.train(training)
        self._began = time.perf_counter(), time.process_time()

"""Sampled training on a mixture of horizons, and what is measured on the way: success, gap and share per level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from rlvr_fast import _validate as check
from rlvr_fast.advantages import loss_weights
from rlvr_fast.gap import Gap, gap_from_gradients
from rlvr_fast.moments import ResponseGradients, Responses
from rlvr_fast.simulate.relay.task import StateTracking, rollouts

Tensor = torch.Tensor
EXACT_PROMPTS = 128  # over which exact success rates are averaged


@dataclass(frozen=True)
class Recipe:
    """Length-normalised REINFORCE with one baseline for all levels and plain gradient steps [paper B, 2nd].

    Attributes:
        learning_rate: η, constant. batch_size: responses per step, one per prompt, levels drawn uniformly.
        baseline_decay: of the moving average of batch rewards, from 0. entropy_weight: of the mean entropy per token.
    """

    learning_rate: float = 100.0
    batch_size: int = 512
    baseline_decay: float = 0.95
    entropy_weight: float = 1e-3

    def __post_init__(self) -> None:
        check.positive("learning_rate", self.learning_rate)
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if not 0 <= check.real("baseline_decay", self.baseline_decay) < 1:
            raise ValueError(f"baseline_decay must be in [0, 1), got {self.baseline_decay}")
        if check.real("entropy_weight", self.entropy_weight) < 0:
            raise ValueError(f"entropy_weight must be at least 0, got {self.entropy_weight}")


def check_mixture(task: StateTracking, lengths: Sequence[int]) -> tuple[int, ...]:
    lengths = tuple(task.check_length(length) for length in lengths)
    if not lengths or any(later <= earlier for earlier, later in pairwise(lengths)):
        raise ValueError(f"lengths must be at least one and increase, got {list(lengths)}")
    return lengths


def gradient(task: StateTracking, q: Tensor, lengths: Sequence[int], recipe: Recipe, baseline: float,
             generator: torch.Generator) -> tuple[Tensor, float]:
    """One batch's ascent direction [N, N] and its mean reward."""
    drawn = torch.randint(len(lengths), (recipe.batch_size,), generator=generator).bincount(minlength=len(lengths))
    levels, parts = [], []
    for length, size in zip(lengths, drawn.tolist(), strict=True):
        if size:
            prompts = task.prompts(length, size, generator)
            step = task.step(q, prompts)
            places = task.draw(step, generator)
            levels.append((step, places))
            parts.append((length, *task.states(prompts, places)))
    batch = rollouts(parts)
    weights = batch.unpack(loss_weights(batch, batch.rewards - baseline, "grpo"))
    direction, first = torch.zeros_like(q), 0
    for step, places in levels:
        size, length = places.shape
        own = weights[first:first + size, :length, None]
        by_logit = own * task.token_by_logit(step, places)
        if recipe.entropy_weight:
            by_logit += recipe.entropy_weight / (recipe.batch_size * length) * task.entropy_by_logit(step)
        direction += task.total(step, task.through_attention(step, by_logit))
        first += size
    return direction, float(batch.rewards.mean())


def level_gaps(task: StateTracking, q: Tensor, lengths: Sequence[int], n_responses: int,
               generator: torch.Generator) -> Gap:
    """The gap of every level from ``n_responses`` fresh responses each, by their exact scores; length-normalised."""
    parts, scores = [], []
    for length in lengths:
        prompts = task.prompts(length, n_responses, generator)
        step = task.step(q, prompts)
        places = task.draw(step, generator)
        parts.append((length, *task.states(prompts, places)))
        by_logit = task.token_by_logit(step, places)
        scores.append(task.response_scores(step, task.through_attention(step, by_logit)))
    batch = rollouts(parts)
    responses = Responses(batch.correct, batch.prompt_index, batch.prompt_ids)
    return gap_from_gradients(ResponseGradients(responses, torch.cat(scores)), level="Q", length_norm=True,
                              sizes=[n_responses] * len(lengths))


def signal(gap: Gap) -> Tensor:
    """[P]: p(1 − p)·‖gap‖, the norm of each level's part of the expected gradient (of a uniform mixture, times P).

    0 where the gap is not distinguishable from none, ‖gap‖² ≤ 2 standard errors, or a class is empty.
    """
    seen = gap.norm_sq > 2 * gap.stderr
    rate = gap.success_rate
    return torch.where(seen, rate * (1 - rate) * gap.norm_sq.clamp(min=0.0).sqrt(), 0.0)


def share(signals: Tensor) -> Tensor:
    """[..., P] norms to shares of their sum; 0 where there is no signal at all."""
    return signals / signals.sum(-1, keepdim=True).clamp(min=1e-300)


def train(task: StateTracking, lengths: Sequence[int], recipe: Recipe, n_steps: int, *, seed: int,
          measure_every: int, n_measured: int = 512, enough: Sequence[float] | None = None) -> dict[str, Tensor]:
    """One run from Q = 0, measured every so many steps and at both ends.

    Args:
        lengths: the mixture's horizons, increasing.
        n_measured: fresh responses per level and measurement, which do not touch the run's own random numbers. 0: exact
            success only.
        enough: one success rate per level; stop at the first measurement where all have been reached.

    Returns:
        step, concentration and spread, [M]: of Q's diagonal less the mean of the rest, its mean and standard deviation.
        success, [M, P]: exact, mean over prompts. If n_measured, also [M, P]: sampled and greedy success rates;
        gap_norm_sq and gap_stderr, length-normalised; signal, p(1 − p)‖gap‖.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    lengths = check_mixture(task, lengths)
    for name, value in (("n_steps", n_steps), ("measure_every", measure_every)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if enough is not None and len(enough) != len(lengths):
        raise ValueError(f"enough must have one success rate per level, {len(lengths)}, got {check.describe(enough)}")
    q, baseline = task.initial(), 0.0
    generator, observer = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(10_000 + seed)
    history = [measure(task, q, lengths, n_measured, 0, observer)]
    for step in range(1, n_steps + 1):
        direction, reward = gradient(task, q, lengths, recipe, baseline, generator)
        q = q + recipe.learning_rate * direction
        baseline = recipe.baseline_decay * baseline + (1 - recipe.baseline_decay) * reward
        if step % measure_every == 0 or step == n_steps:
            history.append(measure(task, q, lengths, n_measured, step, observer))
            if enough is not None and (history[-1]["success"] >= torch.tensor(enough).double()).all():
                break
    return {name: torch.stack([moment[name] for moment in history]) for name in history[0]}


def measure(task: StateTracking, q: Tensor, lengths: Sequence[int], n_responses: int, step: int,
            generator: torch.Generator) -> dict[str, Tensor]:
    diagonal = q.diagonal() - (q.sum() - q.trace()) / (q.numel() - len(q))
    exact = [task.success(q.double(), task.prompts(length, EXACT_PROMPTS, generator)).mean() for length in lengths]
    result = {"step": torch.tensor(step), "concentration": diagonal.mean(), "spread": diagonal.std(),
              "success": torch.stack(exact)}
    if n_responses:
        gap = level_gaps(task, q, lengths, n_responses, generator)
        result |= {"sampled": gap.success_rate, "greedy": greedy_success(task, q, lengths, n_responses, generator),
                   "gap_norm_sq": gap.norm_sq, "gap_stderr": gap.stderr, "signal": signal(gap)}
    return result


def greedy_success(task: StateTracking, q: Tensor, lengths: Sequence[int], n_responses: int,
                   generator: torch.Generator) -> Tensor:
    """[P] float64: share of right responses when every step takes the most attended action."""
    rates = []
    for length in lengths:
        prompts = task.prompts(length, n_responses, generator)
        rates.append(task.states(prompts, task.greedy(task.step(q, prompts)))[1].double().mean())
    return torch.stack(rates)

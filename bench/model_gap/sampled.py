"""Rollouts whose gap is compared: SmolLM2-135M-Instruct on one-digit sums, kept in a log; or random tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

import rlvr_fast as rf

from .language_model import SHAPES, LanguageModel
from .step import Step

GROUP_SIZE, SEED = 8, 0
MIN_PER_CLASS = 2  # so that no prompt borrows the noise of others
IGNORED = -100  # rf.Rollouts reads this label as padding


@dataclass(frozen=True)
class Prompt:
    """One prompt of the log: its tokens (few-shot prefix included), and n completions with their rewards."""

    question: str
    tokens: list[int]
    completions: list[list[int]]
    rewards: list[float]


@dataclass(eq=False)
class Sampled:
    """A model and rollouts of it.

    Attributes:
        source: what was sampled, and how prompts were chosen.
        model: maps ids [B, T] to logits. lm_head: its last module.
        rollouts: of all prompts, in the order of ``prompts``.
    """

    source: str
    model: nn.Module
    lm_head: nn.Module
    prompts: list[Prompt]
    rollouts: rf.Rollouts

    @classmethod
    def of(cls, source: str, model: nn.Module, lm_head: nn.Module, prompts: list[Prompt]) -> Sampled:
        completions = [torch.tensor(tokens) for prompt in prompts for tokens in prompt.completions]
        rewards = torch.tensor([reward for prompt in prompts for reward in prompt.rewards])
        identities = [prompt.question for prompt in prompts for _ in prompt.completions]
        padded = pad_sequence(completions, batch_first=True, padding_value=IGNORED)
        return cls(source, model, lm_head, prompts,
                   rf.Rollouts.from_padded(padded, None, rewards, prompt_ids=identities))

    def logp(self, ids: torch.Tensor) -> torch.Tensor:
        """[B, T]: log-prob of each token given those before it; 0 for the first."""
        logits = self.model(ids)
        logits = getattr(logits, "logits", logits)[:, :-1]
        logp = logits.gather(2, ids[:, 1:, None]).squeeze(2) - logits.logsumexp(-1)
        return F.pad(logp, (1, 0))

    def batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Per prompt ids and response mask [n, T], padded right: a causal model needs no attention mask there."""
        for prompt in self.prompts:
            rows = [torch.tensor(prompt.tokens + tokens) for tokens in prompt.completions]
            ids = pad_sequence(rows, batch_first=True)
            position, lengths = torch.arange(ids.shape[1]), torch.tensor([[len(row)] for row in rows])
            yield ids, (position >= len(prompt.tokens)) & (position < lengths)

    @torch.no_grad()
    def hidden(self) -> torch.Tensor:
        """[N, D], what the lm_head gets at the positions that predict the response tokens."""
        seen, found = [], []
        hook = self.lm_head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        try:
            for ids, mask in self.batches():
                self.model(ids)
                found.append(seen.pop()[:, :-1][mask[:, 1:]])
        finally:
            hook.remove()
        return torch.cat(found)


def tiny(n_prompts: int) -> Sampled:
    """Random tokens and a random model."""
    step = Step.draw(replace(SHAPES["tiny"], n_prompts=n_prompts))
    ids, start, n = step.ids, step.shape.prompt_tokens, step.shape.group_size
    prompts = [Prompt(f"prompt {p}", ids[p * n, :start].tolist(), ids[p * n:(p + 1) * n, start:].tolist(),
                      [float(i % 2) for i in range(n)]) for p in range(n_prompts)]
    model: LanguageModel = step.model
    return Sampled.of("random tokens, random weights", model, model.lm_head, prompts)


def smollm2(log: Path, n_prompts: int) -> Sampled:
    """The rollouts in ``log``; if there is none, or one of another number of prompts, they are sampled and written."""
    from smollm2 import task
    from smollm2.policy import Policy  # examples/

    policy = Policy()
    stored = json.loads(log.read_text()) if log.exists() else {"prompts": []}
    if len(stored["prompts"]) != n_prompts:
        prompts = _sample(policy, task, n_prompts)
        stored = {"source": f"SmolLM2-135M-Instruct (Q4_1 weights in float32), one-digit sums behind a few-shot "
                            f"prefix, temperature 1, seed {SEED}: of all sums the first {len(prompts)} with at least "
                            f"{MIN_PER_CLASS} right and {MIN_PER_CLASS} wrong of {GROUP_SIZE} responses",
                  "prompts": [asdict(prompt) for prompt in prompts]}
        log.write_text(_compact(stored))
    prompts = [Prompt(**entry) for entry in stored["prompts"]]
    return Sampled.of(stored["source"], policy.model.train(), policy.model.lm_head, prompts)


def _sample(policy, task, n_prompts: int) -> list[Prompt]:
    generator = torch.Generator().manual_seed(SEED)
    sums, _ = task.split(0, SEED)
    chosen: list[Prompt] = []
    while sums and len(chosen) < n_prompts:
        some, sums = sums[:32], sums[32:]
        batch = policy.sample(some, GROUP_SIZE, generator)
        correct = batch.rollouts.correct.view(-1, GROUP_SIZE)
        for p, item in enumerate(some):
            if len(chosen) < n_prompts and MIN_PER_CLASS <= int(correct[p].sum()) <= GROUP_SIZE - MIN_PER_CLASS:
                rows = slice(p * GROUP_SIZE, (p + 1) * GROUP_SIZE)
                tokens = policy.prefix[0].tolist() + batch.questions[rows][0].tolist()
                completions = [row[row != IGNORED].tolist() for row in batch.completions[rows]]
                chosen.append(Prompt(item.question, tokens, completions, correct[p].float().tolist()))
    if len(chosen) < n_prompts:
        raise SystemExit(f"only {len(chosen)} of the sums have responses of both classes: ask for fewer --prompts")
    return chosen


def _compact(stored: dict) -> str:
    """JSON, one prompt per line."""
    lines = ",\n  ".join(json.dumps(prompt) for prompt in stored["prompts"])
    return f'{{"source": {json.dumps(stored["source"])},\n "prompts": [\n  {lines}]}}\n'

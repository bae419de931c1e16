"""What the guarded runs train: a model, its tokenizer, prompts to train on, and held-out prompts with their answers."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import trl_grpo
from datasets import Dataset
from smollm2 import task
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

CHARACTERS = "0123456789+=\n"


@dataclass(frozen=True)
class Problem:
    """``held_out``: (prompt, its one right completion). ``config``: of GRPOConfig."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    training: Dataset
    held_out: list[tuple[str, str]]
    config: dict[str, Any]


def smollm2(seed: int) -> Problem:
    """SmolLM2-135M on one-digit sums after one example, bfloat16 autocast: 8 prompts x 8."""
    training, held_out = task.split(32, seed)
    return Problem(*trl_grpo.load("smollm2"), trl_grpo.questions([(s.a, s.b) for s in training * 8]),
                   [(trl_grpo.SHOT + s.question, s.answer) for s in held_out],
                   {"per_device_train_batch_size": 64, "max_completion_length": 6, "bf16": True})


def small(seed: int) -> Problem:
    """A Llama of 2 layers and width 64 on sums up to 99 + 9, after a supervised warm-up to 40 %: 32 prompts x 8."""
    sums = [(a, b) for a in range(100) for b in range(10)]
    random.Random(seed).shuffle(sums)
    texts = [(f"{a}+{b}=", f"{a + b}\n") for a, b in sums]
    tokenizer, held_out = _tokenizer(), texts[:256]
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id))
    _warm_up(model, tokenizer, texts[256:], held_out)
    return Problem(model, tokenizer, Dataset.from_dict({"prompt": [prompt for prompt, _ in texts[256:]],
                                                        "answer": [answer.strip() for _, answer in texts[256:]]}),
                   held_out, {"per_device_train_batch_size": 256, "max_completion_length": 4, "bf16": False})


PROBLEMS: dict[str, Callable[[int], Problem]] = {"small": small, "smollm2": smollm2}


def batch(tokenizer: PreTrainedTokenizerBase, texts: list[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(token ids [B, T], which of ids[:, 1:] are the completions' [B, T - 1]); padding follows."""
    rows = [(tokenizer.encode(prompt), tokenizer.encode(answer)) for prompt, answer in texts]
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids, own = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.bool)
    for i, (prompt, answer) in enumerate(rows):
        ids[i, :len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        own[i, len(prompt):len(prompt) + len(answer)] = True
    return ids, own[:, 1:]


def success(model: PreTrainedModel, ids: torch.Tensor, own: torch.Tensor) -> float:
    """Mean probability of the completions."""
    with torch.no_grad():
        logp = model(ids).logits[:, :-1].float().log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
    return float(torch.where(own, logp, 0.0).sum(1).exp().mean())


def _tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", *CHARACTERS]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="\n", padding_side="left")


def _warm_up(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[tuple[str, str]],
             held_out: list[tuple[str, str]], wanted: float = 0.4) -> None:
    optimizer, draw = torch.optim.AdamW(model.parameters(), lr=1e-3), random.Random(0)
    probe = batch(tokenizer, held_out)
    for i in range(4000):
        ids, own = batch(tokenizer, draw.sample(texts, 128))
        logp = model(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
        optimizer.zero_grad()
        (-logp[own].mean()).backward()
        optimizer.step()
        if i % 5 == 0 and success(model, *probe) >= wanted:
            return
    raise RuntimeError(f"the warm-up ended at {success(model, *probe):.0%}, wanted {wanted:.0%}")

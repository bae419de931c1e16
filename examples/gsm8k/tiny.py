"""A Qwen2 of a few thousand weights that can be trained on a CPU in seconds, to exercise the whole example anywhere."""

from __future__ import annotations

import random

import torch
from rich.progress import track
from torch.nn.functional import cross_entropy

from gsm8k.problems import Problem

CHARACTERS = [chr(code) for code in range(32, 127)] + ["\n"]


def tiny_qwen2(seed: int):
    """(model, tokenizer): the architecture of Qwen2 with random weights, and one token per character."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    special = ["<pad>", "<eos>", "<unk>"]
    vocabulary = {token: i for i, token in enumerate([*special, *CHARACTERS])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters, pad_token="<pad>", eos_token="<eos>",
                                        unk_token="<unk>", clean_up_tokenization_spaces=False)
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(vocabulary), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=False, pad_token_id=0, eos_token_id=1))
    return model, tokenizer


def warm_up(policy, problems: list[Problem], n_steps: int, seed: int, batch_size: int = 16) -> None:
    """Supervised steps on answers alone: the model learns the form of an answer and how often each one is right.

    A random model never boxes a number; without a success there is no gap and nothing to reinforce.
    """
    generator = random.Random(seed)
    optimizer = torch.optim.Adam(policy.parameters, lr=3e-3)
    tokenizer = policy.tokenizer
    for _ in track(range(n_steps), "supervised warm-up of the tiny model", transient=True):
        chosen = generator.sample(problems, min(batch_size, len(problems)))
        texts = [f"{policy.prompt(problem)}\\boxed{{{problem.answer}}}{tokenizer.eos_token}" for problem in chosen]
        encoded = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        logits = policy.model(**encoded).logits[:, :-1]
        answer = max(len(problem.answer) for problem in chosen) + len("\\boxed{}") + 1  # padding is on the left
        labels = encoded.input_ids[:, 1:].masked_fill(~_answers(encoded.input_ids, tokenizer, answer)[:, 1:], -100)
        optimizer.zero_grad()
        cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100).backward()
        optimizer.step()


def _answers(tokens: torch.Tensor, tokenizer, longest: int) -> torch.Tensor:
    """[B, S] bool: from the backslash of \\boxed, the only one within the last ``longest`` tokens, to the end."""
    backslash = tokens == tokenizer.convert_tokens_to_ids("\\")
    backslash[:, :-longest] = False
    return backslash.cumsum(1) > 0

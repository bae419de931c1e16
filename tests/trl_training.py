"""Real GRPOTrainer runs on a tiny random Qwen2 with a tokenizer made here, on the CPU: what the TRL tests share.

Run as a program it is one rank of a process group; see ``Ranks``.
"""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

import rlvr_fast as rf
from rlvr_fast.integrations.trl import instrument

LETTERS = "abcdefghijklmnopqrstuvwxyz"
GENERATIONS = 4
UNLIMITED = {"budget": None, "decay": None}
QUIET = {"report_to": "none", "use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True}
FLOAT32 = 1e-5  # forwards of other batch shapes


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", *LETTERS]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def model(**config: Any) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(LETTERS) + 2, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        initializer_range=0.3, **config))


def first_half(completions: list[str], **kwargs: Any) -> list[float]:
    """1 if the first letter is of the first half of the alphabet."""
    return [float(text[:1] in LETTERS[:13] and text != "") for text in completions]


def sometimes(completions: list[str], **kwargs: Any) -> list[float | None]:
    """No reward for a vowel."""
    return [None if text[:1] in "aeiou" else value
            for text, value in zip(completions, first_half(completions), strict=True)]


def trainer_of(folder: Path, *, own_model: Any = None, reward: Callable = first_half, optimizer: Any = None,
               instrumented: dict | None = None, **config: Any) -> GRPOTrainer:
    """Two optimizer steps on four prompts of four completions; ``instrumented``: with what, None for not at all."""
    options = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1, "num_generations": GENERATIONS,
               "max_completion_length": 6, "max_steps": 2, "learning_rate": 1e-2, "logging_steps": 1,
               "seed": 0, "output_dir": str(folder)} | QUIET | config
    torch.manual_seed(0)
    trainer = GRPOTrainer(own_model or model(), reward, args=GRPOConfig(**options), processing_class=tokenizer(),
                          optimizers=(optimizer, None),
                          train_dataset=Dataset.from_dict({"prompt": ["ab", "cd", "efg", "h", "ij", "k"] * 4}))
    return trainer if instrumented is None else instrument(trainer, **instrumented)


def train(folder: Path, **options: Any) -> GRPOTrainer:
    """``trainer_of``, trained."""
    trainer = trainer_of(folder, **options)
    trainer.train()
    return trainer


def entries(trainer: GRPOTrainer) -> list[dict[str, float]]:
    """What was logged with each step."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def logged(trainer: GRPOTrainer) -> list[dict[str, float]]:
    """The metrics of each step, without those of time."""
    return [{key: value for key, value in entry.items() if key.startswith("rlvr/") and "/time/" not in key}
            for entry in entries(trainer)]


# -- the same completions in every layout ------------------------------------------------------------------------------

LAYOUTS = {  # of three prompts of four completions; on two ranks the second group straddles them
    "one batch": {"per_device_train_batch_size": 12},
    "micro-batches": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4},
    "two ranks": {"per_device_train_batch_size": 6},
    "two ranks, micro-batches": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}}


def in_layout(folder: Path, layout: str) -> dict[str, list[dict[str, float]]]:
    """Three steps in one layout: what the monitor and what TRL itself logged.

    Sampling alone is replaced: a completion depends on the step and on its number among those of all ranks.
    """
    own = model()
    optimizer = torch.optim.SGD(own.parameters(), lr=0.05)  # Adam divides rounding errors by themselves
    trainer = trainer_of(folder, own_model=own, optimizer=optimizer, instrumented=UNLIMITED, max_steps=3,
                         **LAYOUTS[layout])

    def generate(prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> tuple[list[list[int]], None]:
        first = trainer.accelerator.process_index * len(prompt_ids)
        return [_completion(f"19 {trainer.state.global_step} {first + i}") for i in range(len(prompt_ids))], None

    trainer._generate_single_turn = generate
    trainer.train()
    theirs = [{key: entry[key] for key in ("loss", "grad_norm", "reward", "frac_reward_zero_std")}
              for entry in entries(trainer)]
    return {"metrics": logged(trainer), "theirs": theirs}


def _completion(seed: str) -> list[int]:
    draw = random.Random(seed)
    letters = [draw.randrange(2, 2 + len(LETTERS)) for _ in range(draw.randint(1, 6))]
    return letters if len(letters) == 6 else [*letters, 1]


# -- ranks -------------------------------------------------------------------------------------------------------------


def with_a_guard(folder: Path) -> dict[str, Any]:
    """Four steps with a guard of mode "scale" on this rank's share of the prompts."""
    own = model()
    guard = rf.StepGuard(torch.optim.SGD(own.parameters(), lr=0.5), "scale", share=None,
                         meter=rf.StepMeter(smoothing=0.5, reduce=torch.distributed.all_reduce))
    trainer = train(folder, own_model=own, optimizer=guard, instrumented=UNLIMITED | {"guard": guard}, max_steps=4,
                    per_device_train_batch_size=8)
    return {"scales": [entry["rlvr/step/guard/scale"] for entry in entries(trainer)], "measured": guard.n_measured,
            "weights": {name: value.clone() for name, value in trainer.model.state_dict().items()}}


def without_reduction(folder: Path) -> str:
    """What a guard whose ranks would decide for themselves is told."""
    own = model()
    guard = rf.StepGuard(torch.optim.SGD(own.parameters(), lr=0.5), "scale", share=None)
    try:
        trainer_of(folder, own_model=own, optimizer=guard, instrumented={"guard": guard},
                   per_device_train_batch_size=8)
    except ValueError as error:
        return str(error)
    return "accepted"


class Ranks:
    """What two processes found, by scenario: a list in rank order."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
                                    "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        ranks = [subprocess.Popen([sys.executable, __file__, str(folder)], stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT, text=True,
                                  env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]
        try:
            said = [rank.communicate(timeout=300)[0] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        if any(rank.returncode != 0 for rank in ranks):
            raise RuntimeError("\n".join(said))
        self._found = [torch.load(folder / f"{rank}.pt") for rank in range(2)]

    def __getitem__(self, scenario: str) -> list[Any]:
        return [found[scenario] for found in self._found]


def one_of_two_ranks(folder: Path) -> None:
    found: dict[str, Any] = {layout: in_layout(folder, layout) for layout in LAYOUTS if layout.startswith("two ranks")}
    found |= {"guard": with_a_guard(folder), "without reduction": without_reduction(folder)}
    torch.save(found, folder / f"{os.environ['RANK']}.pt")


if __name__ == "__main__":
    one_of_two_ranks(Path(sys.argv[1]))

"""GRPO with TRL on one-digit sums: the gradient gap in its logs and, on request, a guard on its steps.

    python examples/trl_grpo.py                                       # Qwen/Qwen2.5-0.5B-Instruct
    python examples/trl_grpo.py --model smollm2 --learning-rate 1e-4 --guard scale      # from the extra smollm2

Beside TRL's own metrics every measured step logs, among others:

    rlvr/group/frac_mixed        share of prompts that teach anything at this success rate
    rlvr/gap/norm ± stderr       how far correct and incorrect responses pull apart, noise taken off
    rlvr/signal_to_noise         below 1 the step is mostly noise: more responses per prompt, or other prompts
    rlvr/gap/cos_update          how well the update is aligned with the gap
    rlvr/sharpening/control_z    beyond ±3 the sampler is not the policy that is trained
    rlvr/step/guard/scale        share of the learning rate that the guard let pass; rlvr/step/meter/... say why
"""

from __future__ import annotations

import argparse
import copy
import random
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer

import rlvr_fast as rf
from rlvr_fast.integrations.trl import instrument

SHOT = "9 + 8 = 17\n"
NEWLINE = "Ċ"  # as byte-level vocabularies spell it


def sums(n: int, seed: int = 0) -> Dataset:
    draw = random.Random(seed)
    return questions([(draw.randint(0, 9), draw.randint(0, 9)) for _ in range(n)])


def questions(pairs: list[tuple[int, int]]) -> Dataset:
    return Dataset.from_dict({"prompt": [f"{SHOT}{a} + {b} =" for a, b in pairs],
                              "answer": [str(a + b) for a, b in pairs]})


def is_right(completions: list[str], answer: list[str], **kwargs: Any) -> list[float]:
    """1 if the first line of the completion is the sum."""
    return [float(text.strip().partition("\n")[0].strip() == right)
            for text, right in zip(completions, answer, strict=True)]


def smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct in float32. Rebuilt, because a Trainer refuses what was loaded from quantised weights."""
    from smollm2.policy import Policy  # here: it needs the extra smollm2

    policy = Policy()
    config = copy.deepcopy(policy.model.config)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(policy.model.state_dict())
    return model, policy.tokenizer


def load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer, with the end of a line as the end of a completion."""
    if name == "smollm2":
        model, tokenizer = smollm2()
    else:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.eos_token, tokenizer.padding_side = NEWLINE, "left"
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model, tokenizer


def train(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, guard: str | None = None,
          data: Dataset | None = None, **config: Any) -> GRPOTrainer:
    """``guard``: mode of a ``rf.StepGuard`` ("warn" or "scale"), None for a plain optimizer."""
    options = {"output_dir": "trl_grpo", "num_generations": 8, "per_device_train_batch_size": 64,
               "max_completion_length": 6, "max_steps": 20, "learning_rate": 1e-6, "logging_steps": 1,
               "report_to": "none"} | config
    args = GRPOConfig(**options)
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0)
    step_guard = None
    if guard is not None:
        optimizer = step_guard = rf.StepGuard(optimizer, mode=guard)
    trainer = GRPOTrainer(model, is_right, args=args, train_dataset=sums(512) if data is None else data,
                          processing_class=tokenizer, optimizers=(optimizer, None))
    instrument(trainer, guard=step_guard)  # the one line; measures as often as 3 % of the time allow
    trainer.train()
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B-Instruct", help="a model's name or folder, or smollm2")
    parser.add_argument("--guard", choices=("warn", "scale"), help="a StepGuard around AdamW; default none")
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=64, help="completions per step, 8 to a prompt")
    options = parser.parse_args()
    train(*load(options.model), guard=options.guard, learning_rate=options.learning_rate, max_steps=options.steps,
          per_device_train_batch_size=options.batch)


if __name__ == "__main__":
    main()

"""GRPO with TRL on one-digit sums, with the gradient gap in its logs.

    python examples/trl_grpo.py [model]        # Qwen/Qwen2.5-0.5B-Instruct unless another is named

Beside TRL's own metrics every step logs, among others:

    rlvr/group/frac_mixed        share of prompts that teach anything at this success rate
    rlvr/gap/norm ± stderr       how far correct and incorrect responses pull apart, noise taken off
    rlvr/signal_to_noise         below 1 the step is mostly noise: more responses per prompt, or other prompts
    rlvr/gap/cos_update          how well the update is aligned with the gap
    rlvr/sharpening/control_z    beyond ±3 the sampler is not the policy that is trained
"""

from __future__ import annotations

import random
import sys

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from rlvr_fast.integrations.trl import instrument

SHOTS = "2 + 3 = 5\n14 + 5 = 19\n7 + 4 = 11\n9 + 8 = 17\n"


def sums(n: int, seed: int = 0) -> Dataset:
    draw = random.Random(seed)
    pairs = [(draw.randint(0, 9), draw.randint(0, 9)) for _ in range(n)]
    return Dataset.from_dict({"prompt": [f"{SHOTS}{a} + {b} =" for a, b in pairs],
                              "answer": [str(a + b) for a, b in pairs]})


def is_right(completions: list[str], answer: list[str], **kwargs) -> list[float]:
    """1 if the first line of the completion is the sum."""
    return [float(text.strip().partition("\n")[0].strip() == right)
            for text, right in zip(completions, answer, strict=True)]


def main(model, tokenizer=None, **config) -> GRPOTrainer:
    options = {"output_dir": "trl_grpo", "num_generations": 8, "per_device_train_batch_size": 64,
               "max_completion_length": 8, "max_steps": 20, "learning_rate": 1e-6, "logging_steps": 1,
               "report_to": "none"} | config
    trainer = GRPOTrainer(model, is_right, args=GRPOConfig(**options), train_dataset=sums(512),
                          processing_class=tokenizer)
    instrument(trainer)  # the one line; measures as often as 3 % of the time allow
    trainer.train()
    return trainer


if __name__ == "__main__":
    main(*(sys.argv[1:2] or ["Qwen/Qwen2.5-0.5B-Instruct"]))

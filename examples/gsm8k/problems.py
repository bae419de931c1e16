"""Word problems and their verifier: GSM8K as published, or generated ones where it cannot be downloaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True)
class Problem:
    """A question and the short answer that earns the reward."""

    question: str
    answer: str

    def reward(self, completion: str) -> float:
        """1 if the last \\boxed{...} of the completion (or, without one, its last number) equals the answer, else 0."""
        from math_verify import parse, verify  # importing it takes a second

        found = parse(completion)
        return float(bool(found) and verify(_gold(self.answer), found))


@cache
def _gold(answer: str) -> list:
    from math_verify import parse

    return parse(f"\\boxed{{{answer}}}")


def gsm8k(source: str, split: str) -> list[Problem]:
    """GSM8K's ``split`` from the hub ("openai/gsm8k"), or all of a local JSONL file with its columns.

    The published answer ends in "#### 72"; what is before it is a worked solution, which the reward does not look at.
    """
    if Path(source).is_file():
        lines = Path(source).read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
    else:
        from datasets import load_dataset

        rows = load_dataset(source, "main", split=split)
    return [Problem(row["question"], row["answer"].rpartition("####")[2].strip().replace(",", "")) for row in rows]


def generated(task: str, size: int, seed: int) -> list[Problem]:
    """``size`` problems with distinct questions from one of reasoning-gym's generators, such as "gsm_symbolic"."""
    import reasoning_gym

    entries = reasoning_gym.create_dataset(task, size=2 * size, seed=seed)
    distinct = {entry["question"]: Problem(entry["question"].strip(), str(entry["answer"])) for entry in entries}
    if len(distinct) < size:
        raise SystemExit(f"reasoning-gym's {task} gave {len(distinct)} distinct questions, {size} are needed")
    return list(distinct.values())[:size]

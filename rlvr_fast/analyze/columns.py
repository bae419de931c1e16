"""Which column of a rollout dump holds what: the names that training frameworks use, or those that the caller gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

KNOWN: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt_id", "uid", "group_id", "problem_id", "prompt_index", "group", "prompt", "input", "question"),
    "reward": ("reward", "rewards", "score", "correct", "is_correct", "acc"),
    "step": ("step", "global_step", "training_step", "iteration"),
    "length": ("response_length", "completion_length", "length", "n_tokens", "num_tokens", "completion_ids",
               "response_ids", "output_ids", "completion", "response", "output"),
    "advantage": ("advantage", "advantages"),
    "logp": ("logp", "logprobs", "log_probs", "old_log_probs", "old_per_token_logps", "prev_logprobs"),
    "logp_after": ("logp_after", "new_logprobs", "new_log_probs"),
    "difficulty": ("difficulty", "level"),
}
"""Column names by what they hold, the first one present wins. verl dumps input, output, score, step; TRL step, prompt,
completion, advantage and one column per reward function, which has to be named."""
REQUIRED = ("prompt", "reward")


@dataclass(frozen=True)
class Columns:
    """The name of the column for each figure; None where the file has none."""

    prompt: str
    reward: str
    step: str | None = None
    length: str | None = None
    advantage: str | None = None
    logp: str | None = None
    logp_after: str | None = None
    difficulty: str | None = None

    @property
    def names(self) -> frozenset[str]:
        return frozenset(name for name in (getattr(self, field.name) for field in fields(self)) if name is not None)


def find_columns(present: list[str], given: Mapping[str, str | None], source: str) -> Columns:
    """Columns of a file that has those ``present``; ``given`` names override what is known.

    Raises:
        ValueError: if a given name is not there, or no column is known for prompts or rewards; lists those present.
    """
    chosen: dict[str, Any] = {}  # names; None only for roles that are not required
    for role, names in KNOWN.items():
        wanted = given.get(role)
        if wanted is not None and wanted not in present:
            raise ValueError(f"{source} has no column {wanted!r}, named by --{role.replace('_', '-')}; it has: "
                             f"{_list(present)}")
        chosen[role] = wanted or next((name for name in names if name in present), None)
    for role in REQUIRED:
        if chosen[role] is None:
            raise ValueError(f"{source} has no column that is known to hold the {role}; name it with --{role}. It has: "
                             f"{_list(present)}")
    return Columns(**chosen)


def _list(names: list[str]) -> str:
    return ", ".join(names) if names else "no columns"

"""All figures of a rollout dump as plain numbers: what ``rlvr-fast analyze`` prints and ``--json`` writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlvr_fast.analyze import figures
from rlvr_fast.analyze.responses import Responses, read_responses
from rlvr_fast.strict_json import plain

NO_GAP = ("successes alone do not tell a learnable prompt from a lucky guess: that takes a measured gap "
          "(rf.difficulty_spectrum)")


def analyze(path: str | Path, *, columns: Mapping[str, str | None] | None = None, threshold: float | None = None,
            prompts: int = 10, progress: Callable[[int], None] = lambda rows: None) -> dict[str, Any]:
    """Everything that a rollout dump tells, as plain numbers: summary, steps, spectrum, difficulty, prompts, notes.

    Args:
        path: JSONL (also gzipped), Parquet or npz file with one row per response, or a folder of them.
        columns: names of columns by role (prompt, reward, step, length, advantage, logp, logp_after, difficulty),
            where they are not among ``columns.KNOWN``.
        threshold: responses with at least this reward are correct; needed for rewards that are not 0 or 1.
        prompts: how many prompts to list.
        progress: called with the number of rows read, now and then.

    Raises:
        ValueError: naming the file and the row or column of what cannot be read.
    """
    if prompts < 0:
        raise ValueError(f"prompts must not be negative, got {prompts}")
    responses = read_responses(path, columns, progress)
    if len(responses.reward) == 0:
        raise ValueError(f"{path}: none of {responses.unscored} rows has a reward")
    correct = figures.classes(responses, threshold)
    groups = figures.Groups.of(responses, correct)
    rate = groups.rate
    difference, difference_stderr, n_mixed = figures.length_effect(groups)
    result = {
        "columns": asdict(responses.columns),
        "summary": {
            "responses": len(responses.reward), "unscored": responses.unscored, "prompts": len(responses.prompt_names),
            "steps": len(groups.step.unique()), "groups": len(rate), "success": correct.double().mean().item(),
            "success_stderr": figures.stderr(rate), "mixed": groups.mixed.mean().item(),
            "solved": (rate == 1).double().mean().item(), "failed": (rate == 0).double().mean().item(),
            "length_unit": responses.length_unit, "length_difference": difference,
            "length_difference_stderr": difference_stderr},
        "steps": figures.by_step(responses, correct, groups),
        "spectrum": figures.spectrum(groups),
        "difficulty": [] if responses.difficulty is None else figures.by_difficulty(
            responses.prompt, responses.difficulty, groups),
        "prompts": figures.by_prompt(responses, groups, prompts),
        "notes": _notes(responses, groups, n_mixed)}
    return plain(result)


def _notes(responses: Responses, groups: figures.Groups, n_mixed: int) -> list[str]:
    notes = [NO_GAP]
    if responses.unscored:
        notes.append(f"{responses.unscored} rows without a reward are left out")
    if responses.columns.step is None:
        notes.append("no column holds steps: everything counts as one step")
    if (groups.n == 1).all():
        notes.append("every prompt has one response per step: nothing in this dump can be compared within a prompt")
    if n_mixed == 0:
        notes.append("no group has both correct and incorrect responses: group-normalised advantages are all zero")
    if responses.logp is None or responses.logp_after is None:
        notes.append("the effect of each step needs log-probs of its responses before and after the update (columns "
                     "logp and logp_after)")
    else:
        notes.append("gains are as seen on the step's own responses: in sample, typically too optimistic by 2 times or "
                     "more, unless these responses had no part in the update")
    return notes

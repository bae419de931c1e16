"""What rewards, lengths and log-probs of a finished run tell, without the model: counts, intervals, step effects.

A *group* is a prompt's responses of one step. Without gradients a success cannot be told from a lucky guess; where a
prompt's successes come from is what ``difficulty_spectrum`` says of measured gaps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from rlvr_fast.analyze.responses import Responses
from rlvr_fast.rollouts import Rollouts
from rlvr_fast.spectrum.success_rates import effective_rollouts, wilson
from rlvr_fast.step.measure import measure_step

Z95 = 1.959963984540054
BIN_EDGES = torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.float64)
BIN_LABELS = ("0", "0 to 0.2", "0.2 to 0.4", "0.4 to 0.6", "0.6 to 0.8", "0.8 to 1", "1")
FEW_DIFFICULTIES = 12


@dataclass(frozen=True, eq=False)
class Groups:
    """G groups of P prompts, ordered by step and then by prompt. [G] int64 ``step``, ``prompt``; float64 counts.

    ``difference``: mean length of correct minus that of incorrect responses, NaN unless the group has both.
    """

    step: torch.Tensor
    prompt: torch.Tensor
    n: torch.Tensor
    n_correct: torch.Tensor
    difference: torch.Tensor
    n_prompts: int

    @classmethod
    def of(cls, responses: Responses, correct: torch.Tensor) -> Groups:
        steps, at = responses.step.unique(return_inverse=True)
        n_prompts = len(responses.prompt_names)
        keys, of_response = (at * n_prompts + responses.prompt).unique(return_inverse=True)
        class_of = 2 * of_response + correct
        n = torch.bincount(class_of, minlength=2 * len(keys)).double().view(-1, 2)
        if responses.length is None:
            difference = torch.full_like(n[:, 0], math.nan)
        else:
            total = torch.zeros(2 * len(keys), dtype=torch.float64).index_add_(0, class_of, responses.length)
            difference = (total.view(-1, 2) / n).diff(dim=1).squeeze(1)  # 0/0 is NaN: that class is empty
        return cls(steps[keys // n_prompts], keys % n_prompts, n.sum(1), n[:, 1], difference, n_prompts)

    @cached_property
    def rate(self) -> torch.Tensor:
        return self.n_correct / self.n

    @cached_property
    def mixed(self) -> torch.Tensor:
        """[G] float64, 1 where the group has both classes."""
        return ((self.n_correct > 0) & (self.n_correct < self.n)).double()

    @cached_property
    def of_prompts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """[P] float64 responses and correct responses of each prompt over the whole run."""
        return self.per_prompt(self.n), self.per_prompt(self.n_correct)

    def per_prompt(self, values: torch.Tensor) -> torch.Tensor:
        """Σ over the groups of each prompt: [G] -> [P]."""
        return values.new_zeros(self.n_prompts).index_add(0, self.prompt, values)


def classes(responses: Responses, threshold: float | None) -> torch.Tensor:
    """[R] bool, which responses are correct.

    Raises:
        ValueError: for rewards that are not 0 or 1, if no threshold says which ones are.
    """
    if threshold is not None:
        return responses.reward >= threshold
    odd = (responses.reward != 0) & (responses.reward != 1)
    if odd.any():
        values = responses.reward.unique()
        shown = ", ".join(f"{value:g}" for value in values[:5].tolist()) + (", ..." if len(values) > 5 else "")
        raise ValueError(f"rewards are not all 0 or 1 but {shown}: say with --threshold from which reward on a "
                         "response counts as correct")
    return responses.reward == 1


def by_step(responses: Responses, correct: torch.Tensor, groups: Groups) -> list[dict[str, float]]:
    """One dict per step: groups, responses, success ± standard error over groups, shares, lengths, step effect."""
    rows = []
    steps, counts = groups.step.unique_consecutive(return_counts=True)
    group_at, order = 0, torch.argsort(responses.step, stable=True)
    sizes = torch.bincount(torch.searchsorted(steps, responses.step), minlength=len(steps)).tolist()
    response_at = 0
    for step, n_groups, n in zip(steps.tolist(), counts.tolist(), sizes, strict=True):
        own = slice(group_at, group_at + n_groups)
        members = order[response_at:response_at + n]
        group_at, response_at = group_at + n_groups, response_at + n
        rate = groups.rate[own]
        row = {"step": step, "prompts": n_groups, "responses": n, "success": rate.mean().item(),
               "success_stderr": stderr(rate), "mixed": groups.mixed[own].mean().item(),
               "solved": (rate == 1).double().mean().item(), "failed": (rate == 0).double().mean().item()}
        if responses.length is not None:
            row["length"] = responses.length[members].mean().item()
            row["length_difference"] = _finite_mean(groups.difference[own])[0]
        if responses.logp is not None and responses.logp_after is not None:
            try:
                row |= step_effect(responses, responses.logp, responses.logp_after, correct, members)
            except ValueError as error:
                raise ValueError(f"step {step}: {error}") from None
        rows.append(row)
    return rows


def step_effect(responses: Responses, logp: torch.Tensor, logp_after: torch.Tensor, correct: torch.Tensor,
                members: torch.Tensor) -> dict[str, float]:
    """``measure_step`` on the responses of one step: what the update did, with the log-probs as the dump has them."""
    n = len(members)
    rollouts = Rollouts.from_packed(torch.zeros(n, dtype=torch.int64), torch.arange(n + 1), responses.reward[members],
                                    responses.prompt[members], correct=correct[members])
    measured = measure_step(logp[members], logp_after[members], rollouts)
    return {"gain": measured.success_gain.item(), "gain_stderr": measured.success_gain_stderr.item(),
            "log_odds_gain": _finite_mean(measured.log_odds_gain)[0], "ess_fraction": measured.ess_fraction.item(),
            "mean_ratio": measured.mean_ratio.item()}


def by_prompt(responses: Responses, groups: Groups, most: int) -> list[dict[str, object]]:
    """The prompts with the widest two-sided chance to learn, by p(1 − p) and then by rollouts: at most ``most``."""
    n, n_correct = groups.of_prompts
    mixed = groups.per_prompt(groups.mixed)
    n_groups = torch.bincount(groups.prompt, minlength=len(n))
    rate = n_correct / n
    low, high = wilson(n_correct, n, Z95)
    order = torch.sort(rate * (1 - rate) + 1e-9 * n / n.max(), descending=True, stable=True).indices[:most].tolist()
    return [{"prompt": responses.prompt_names[p], "rollouts": int(n[p]), "correct": int(n_correct[p]),
             "success": rate[p].item(), "low": low[p].item(), "high": high[p].item(), "groups": int(n_groups[p]),
             "mixed": (mixed[p] / n_groups[p]).item()} for p in order]


def spectrum(groups: Groups) -> list[dict[str, object]]:
    """Prompts binned by their success rate over the whole run."""
    n, n_correct = groups.of_prompts
    rate = n_correct / n
    index = 1 + torch.bucketize(rate, BIN_EDGES)
    index = torch.where(rate == 0, 0, torch.where(rate == 1, len(BIN_LABELS) - 1, index))
    return _bins(groups, index, list(BIN_LABELS))


def by_difficulty(prompt: torch.Tensor, given: torch.Tensor, groups: Groups) -> list[dict[str, object]]:
    """Prompts binned by the dump's own difficulty, ``given`` [R] for responses to ``prompt`` [R].

    Each value is a bin if they are few, else deciles are.
    """
    difficulty = torch.full((groups.n_prompts,), math.nan, dtype=torch.float64)
    difficulty[prompt] = given
    if not torch.equal(difficulty[prompt], given):
        raise ValueError("the difficulty of a prompt differs between its rows")
    values = difficulty.unique()
    if len(values) > FEW_DIFFICULTIES:
        edges = difficulty.quantile(torch.linspace(0, 1, 11, dtype=torch.float64)).unique()
        labels = [f"{low:g} to {high:g}" for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)]
        return _bins(groups, torch.bucketize(difficulty, edges[1:-1], right=True), labels)
    return _bins(groups, torch.searchsorted(values, difficulty), [f"{value:g}" for value in values.tolist()])


def _bins(groups: Groups, bin_of_prompt: torch.Tensor, labels: list[str]) -> list[dict[str, object]]:
    bin_of = bin_of_prompt[groups.prompt]
    n, n_correct = groups.of_prompts
    independent = effective_rollouts(n_correct, n, bin_of_prompt, len(labels))
    rows = []
    for which, label in enumerate(labels):
        own = bin_of == which
        if not own.any():
            continue
        success = groups.n_correct[own].sum() / groups.n[own].sum()
        low, high = wilson(success * independent[which], independent[which], Z95)
        rows.append({"bin": label, "prompts": int((bin_of_prompt == which).sum()),
                     "rollouts": int(groups.n[own].sum()), "success": success.item(), "low": low.item(),
                     "high": high.item(), "mixed": groups.mixed[own].mean().item(),
                     "length_difference": _finite_mean(groups.difference[own])[0]})
    return rows


def length_effect(groups: Groups) -> tuple[float, float, int]:
    """Mean over mixed groups of (length of correct − of incorrect responses), its standard error, and their number."""
    return *_finite_mean(groups.difference), int(groups.difference.isfinite().sum())


def _finite_mean(values: torch.Tensor) -> tuple[float, float]:
    values = values[values.isfinite()]
    return (values.mean().item(), stderr(values)) if len(values) else (math.nan, math.nan)


def stderr(values: torch.Tensor) -> float:
    """Of the mean of independent values; NaN for fewer than two."""
    return (values.std() / math.sqrt(len(values))).item() if len(values) > 1 else math.nan

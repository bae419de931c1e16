"""The public names by topic, and the reStructuredText that has autodoc describe them."""

from __future__ import annotations

import inspect

import rlvr_fast as rf
from rlvr_fast.integrations import FRAMEWORKS

TOPICS: dict[str, tuple[str, ...]] = {
    "rollouts": ("Rollouts", "token_stats", "linear_logprob", "token_stats_from_logits", "token_stats_from_logprobs",
                 "TokenStats", "VocabularyShard"),
    "gap": ("gradient_gap", "Gap", "gap_from_gradients", "ResponseGradients", "Responses", "Moments"),
    "model": ("ModelGap", "ModelGapResult"),
    "advantages": ("advantages", "loss_weights", "advantages_and_weights", "kappa", "population_kappa",
                   "recover_from_advantages"),
    "steps": ("StepGuard", "StepMeter", "StepReading", "directional_scores", "DirectionalScores", "scan_step",
              "StepCurve", "measure_step", "StepMeasure", "propose", "StepRecorder", "adam_direction", "crossing",
              "theorem_step_bound", "token_step_bound", "StepWarning"),
    "spectrum": ("difficulty_spectrum", "DifficultySpectrum", "Mixture", "SpectrumSampler"),
    "monitor": ("GapMonitor", "RunLog"),
    "machine": ("available_backends", "warm_up", "WarmUpReport", "tune_head", "load_tiles"),
}
TITLES = {"openrlhf": "OpenRLHF", "packed": "Packed batches", "prime_rl": "prime-rl", "skyrl": "SkyRL", "trl": "TRL"}
REST = "machine"  # takes the public names that no topic has


def names(topic: str) -> tuple[str, ...]:
    """The public names of a topic that the package has, in reading order.

    Raises:
        KeyError: for a topic that there is none of.
    """
    known = tuple(name for name in TOPICS[topic] if name in rf.__all__)
    placed = {name for own in TOPICS.values() for name in own}
    return known if topic != REST else known + tuple(name for name in sorted(rf.__all__) if name not in placed)


def integrations() -> str:
    """Markdown sections, one for each adapter, from its module."""
    lines: list[str] = []
    for name in FRAMEWORKS:
        lines += [f"## {TITLES.get(name, name)}", "", "````{eval-rst}",
                  f".. automodule:: rlvr_fast.integrations.{name}", "````", ""]
    return "\n".join(lines)


def reference(topic: str) -> str:
    """Markdown that describes every name of the topic from its docstring."""
    lines = ["````{eval-rst}"]
    for name in names(topic):
        kind = "class" if inspect.isclass(getattr(rf, name)) else "function"
        lines += [f".. auto{kind}:: rlvr_fast.{name}", ""]
    return "\n".join([*lines, "````"])

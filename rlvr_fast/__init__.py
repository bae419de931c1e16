"""Gradient analysis for reinforcement learning with verifiable rewards: gradient gap, alignment, step thresholds."""

import importlib
from typing import TYPE_CHECKING

from rlvr_fast.advantages import advantages, advantages_and_weights, loss_weights
from rlvr_fast.backends import available as available_backends
from rlvr_fast.gap import Gap, gap_from_gradients, gradient_gap
from rlvr_fast.kappa import kappa, population_kappa, recover_from_advantages
from rlvr_fast.linear_logprob import linear_logprob
from rlvr_fast.model_gap import ModelGap, ModelGapResult
from rlvr_fast.model_gap.direction import StepRecorder, adam_direction, propose
from rlvr_fast.moments import Moments, ResponseGradients, Responses
from rlvr_fast.monitor import GapMonitor
from rlvr_fast.rollouts import Rollouts
from rlvr_fast.run_log import RunLog
from rlvr_fast.spectrum import DifficultySpectrum, Mixture, SpectrumSampler, difficulty_spectrum
from rlvr_fast.step import (
    DirectionalScores,
    StepCurve,
    StepGuard,
    StepMeasure,
    StepMeter,
    StepReading,
    StepWarning,
    crossing,
    directional_scores,
    measure_step,
    scan_step,
    theorem_step_bound,
    token_step_bound,
)
from rlvr_fast.token_stats import TokenStats, token_stats, token_stats_from_logits, token_stats_from_logprobs
from rlvr_fast.tuned_tiles import load_tiles
from rlvr_fast.vocabulary_parallel import VocabularyShard
from rlvr_fast.warm_up import WarmUpReport, warm_up

__all__ = [
    "DifficultySpectrum",
    "DirectionalScores",
    "Gap",
    "GapMonitor",
    "Mixture",
    "ModelGap",
    "ModelGapResult",
    "Moments",
    "ResponseGradients",
    "Responses",
    "Rollouts",
    "RunLog",
    "SpectrumSampler",
    "StepCurve",
    "StepGuard",
    "StepMeasure",
    "StepMeter",
    "StepReading",
    "StepRecorder",
    "StepWarning",
    "TokenStats",
    "VocabularyShard",
    "WarmUpReport",
    "adam_direction",
    "advantages",
    "advantages_and_weights",
    "available_backends",
    "crossing",
    "difficulty_spectrum",
    "directional_scores",
    "gap_from_gradients",
    "gradient_gap",
    "kappa",
    "linear_logprob",
    "load_tiles",
    "loss_weights",
    "measure_step",
    "population_kappa",
    "propose",
    "recover_from_advantages",
    "scan_step",
    "theorem_step_bound",
    "token_stats",
    "token_stats_from_logits",
    "token_stats_from_logprobs",
    "token_step_bound",
    "tune_head",
    "warm_up",
]
__version__ = "0.1.0"


if TYPE_CHECKING:
    from rlvr_fast import integrations as integrations
    from rlvr_fast.tuning import tune_head
else:  # a type checker that saw this would take every name for one that exists
    def __getattr__(name: str) -> object:
        """On first use: ``tune_head``, so that ``python -m rlvr_fast.tuning`` runs a module that is not imported yet,
        and ``integrations``, which nobody needs who has no such framework."""
        if name == "tune_head":
            from rlvr_fast.tuning import tune_head

            return tune_head
        if name == "integrations":
            return importlib.import_module("rlvr_fast.integrations")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Gradient analysis for reinforcement learning with verifiable rewards: gradient gap, alignment, step thresholds."""

from rlvr_fast.advantages import advantages, loss_weights
from rlvr_fast.backends import available as available_backends
from rlvr_fast.gap import Gap, gap_from_gradients, gradient_gap
from rlvr_fast.linear_logprob import linear_logprob
from rlvr_fast.moments import Moments, ResponseGradients, Responses
from rlvr_fast.rollouts import Rollouts
from rlvr_fast.token_stats import TokenStats, token_stats, token_stats_from_logits, token_stats_from_logprobs

__all__ = [
    "Gap",
    "Moments",
    "ResponseGradients",
    "Responses",
    "Rollouts",
    "TokenStats",
    "advantages",
    "available_backends",
    "gap_from_gradients",
    "gradient_gap",
    "linear_logprob",
    "loss_weights",
    "token_stats",
    "token_stats_from_logits",
    "token_stats_from_logprobs",
]
__version__ = "0.1.0"

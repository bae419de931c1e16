"""Gradient analysis for reinforcement learning with verifiable rewards: gradient gap, alignment, step-size thresholds."""

from rlvr_fast.rollouts import Rollouts

__all__ = ["Rollouts"]
__version__ = "0.1.0"

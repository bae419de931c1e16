"""The gradient gap over all of a model's weights, taken from the backward of a training step."""

from rlvr_fast.model_gap.probe import ModelGap
from rlvr_fast.model_gap.result import Coverage, ModelGapResult

__all__ = ["Coverage", "ModelGap", "ModelGapResult"]

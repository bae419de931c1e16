"""``rlvr-fast profile``: what gradient analysis costs at a model's scale, on this machine."""

from rlvr_fast.profile.measure import profile
from rlvr_fast.profile.models import MODELS, ModelShape
from rlvr_fast.profile.report import Growth, ProfileReport, StageResult
from rlvr_fast.profile.shape import Shape

__all__ = ["MODELS", "Growth", "ModelShape", "ProfileReport", "Shape", "StageResult", "profile"]

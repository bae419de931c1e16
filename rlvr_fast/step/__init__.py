"""What a step does and how long it may be: measured, scanned, read off the next rollouts, guarded, bounded."""

from rlvr_fast.step.bounds import theorem_step_bound, token_step_bound
from rlvr_fast.step.curve import StepCurve, crossing
from rlvr_fast.step.directional_scores import DirectionalScores, directional_scores
from rlvr_fast.step.guard import StepGuard, StepWarning
from rlvr_fast.step.measure import StepMeasure, measure_step
from rlvr_fast.step.meter import StepMeter
from rlvr_fast.step.reading import StepReading
from rlvr_fast.step.scan import scan_step

__all__ = ["DirectionalScores", "StepCurve", "StepGuard", "StepMeasure", "StepMeter", "StepReading", "StepWarning",
           "crossing", "directional_scores", "measure_step", "scan_step", "theorem_step_bound", "token_step_bound"]

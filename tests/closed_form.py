"""The closed-form policy of the simulations, on which exact answers are known."""

from rlvr_fast.simulate.sign_policy import SignPolicy

__all__ = ["SignPolicy"]

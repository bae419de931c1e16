"""Calls that a type checker must refuse, each with the code of its error at the end of the line. Never run."""

import torch
from torch import Tensor

import rlvr_fast as rf


def misuse(hidden: Tensor, weight: Tensor, rollouts: rf.Rollouts, optimizer: torch.optim.Adam) -> None:
    rf.gradient_gapp(hidden, weight, rollouts)  # attr-defined
    rf.gradient_gap(hidden, weight)  # call-arg
    rf.gradient_gap(hidden, weight, rollouts, "hidden")  # call-arg
    rf.gradient_gap(hidden, weight, rollouts, levels="hidden")  # call-arg
    rf.gradient_gap(hidden, weight, rollouts, length_norm="yes")  # arg-type
    gap = rf.gradient_gap(hidden, weight, rollouts)
    gap.norm_squared()  # attr-defined
    gap.norm_sq()  # operator
    gap.norm_sq = hidden  # misc
    gap.vector.norm()  # union-attr
    rf.Rollouts.from_padded(hidden, None, [1.0, 0.0], group_size=2)  # arg-type
    rf.scan_step(hidden, [weight], [hidden], rollouts)  # arg-type
    rf.StepGuard([weight])  # arg-type
    monitor = rf.GapMonitor(level=3)  # arg-type
    monitor.update(rollouts, reward=hidden)  # call-arg
    steps: int = monitor.compute()["rlvr/gap/norm"]  # assignment
    rf.advantages(rollouts, "vl_norm", alpha="1")  # arg-type
    rf.theorem_step_bound("0.5", 1.0, 1.0)  # call-overload
    rf.propose(optimizer)["weight"]  # index
    del steps

"""Rollout dumps of any framework, after the fact: files -> rows -> arrays -> figures -> tables."""

from rlvr_fast.analyze.analysis import analyze

__all__ = ["analyze"]

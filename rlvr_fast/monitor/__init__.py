"""Metrics of a training loop, accumulated over micro-batches and ranks: ``GapMonitor``."""

from rlvr_fast.monitor.gap_monitor import GapMonitor
from rlvr_fast.monitor.metrics import METRICS, Metric, describe_metrics

__all__ = ["METRICS", "GapMonitor", "Metric", "describe_metrics"]

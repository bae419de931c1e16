"""The metrics of ``GapMonitor`` as Markdown, a table per tier."""

from __future__ import annotations

from rlvr_fast.monitor.metrics import METRICS, OVERHEAD
from site_tools.markdown import row

TIERS = ("verdicts or advantages", "log-probs", "Σp² or entropies", "response gradients", "a ModelGap",
         "a measured step")


def reference() -> str:
    lines: list[str] = []
    for tier, fed in enumerate(TIERS):
        own = [metric for metric in METRICS if metric.tier == tier]
        lines += ["", f"## Tier {tier}: {fed}", "", *_head("key", "unit", "meaning", "source"),
                  *(row(f"`{one.key}`", one.unit, one.meaning, one.source) for one in own)]
    return "\n".join([*lines, "", "## The monitor itself", "", *_head("key", "meaning"),
                      *(row(f"`{key}`", meaning) for key, meaning in OVERHEAD.items())])


def _head(*names: str) -> tuple[str, str]:
    return row(*names), "|---" * len(names) + "|"

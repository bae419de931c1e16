"""A run as one HTML file: files -> columns -> verdicts -> sections -> page."""

from rlvr_fast.report.page import write_report

__all__ = ["write_report"]

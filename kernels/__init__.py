"""Triton kernels, one kernel and its launcher per file. No validation and no policy here: callers own both."""

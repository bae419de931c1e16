"""``rlvr-fast demo``: GRPO on arithmetic, the gradient gap and the step threshold measured inside the loop.

``grpo`` is the loop, written to be copied from; the other modules are what it needs around it: task, model, sampling,
warm-up, records, report and plots.
"""

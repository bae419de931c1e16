"""The step-size sweep: what GRPO does at many learning rates, and what was measured before each of its steps."""

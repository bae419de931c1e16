"""What the SmolLM2 example needs around its GRPO loop: task, policy, clock, records, report and plots."""

"""What the arithmetic example needs around its GRPO loop: task, model, sampling, warm-up, records, report and plots."""

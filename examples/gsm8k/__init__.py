"""What the GSM8K example needs around its GRPO loop: problems, policy, a tiny stand-in model, and the table."""

"""What the curriculum example needs: a task with levels, GRPO that records per level, ways to choose what to sample."""

"""Training on the model's own samples, which rewards judge: GRPO, its kin, and RLOO."""

"""Training: the trainer, checkpoints, parallelism, and the plan of a run before it starts."""

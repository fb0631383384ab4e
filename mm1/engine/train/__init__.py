"""Train models: the trainer, checkpoints, parallelism, and the estimate of a run before it starts."""

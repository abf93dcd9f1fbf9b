"""One training loop for every system: optimizer, step, checkpoints, metrics, evaluation."""

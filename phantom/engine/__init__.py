"""The loop around the method: tasks, training, evaluation, checkpoints, records."""

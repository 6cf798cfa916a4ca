"""The loop around the method: tasks, training, evaluation, checkpoints, records. Only `build` sees concrete classes."""

"""Files of a run: record, metrics, checkpoints; and trackers."""

"""Tasks: how a batch is scored."""

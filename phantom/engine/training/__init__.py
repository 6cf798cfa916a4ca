"""The training step, the loop around it, and the settings that depend on the step."""

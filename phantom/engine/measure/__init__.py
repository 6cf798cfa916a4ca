"""Timing, statistics of solves, and measurements during training."""

"""Graph data sets."""

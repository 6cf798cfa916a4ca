"""Load weights of the official code bases by their official names."""

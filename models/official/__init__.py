"""Weights of the official code bases, loaded by their own names."""

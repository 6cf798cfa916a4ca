"""Gradient estimators: what backward means for an equilibrium."""

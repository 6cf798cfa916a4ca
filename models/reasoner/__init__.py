"""Recursive reasoners: HRM, TRM and EqR as one model with exchangeable cell, start and supervision."""

from models.reasoner.model import Reasoner

__all__ = ["Reasoner"]

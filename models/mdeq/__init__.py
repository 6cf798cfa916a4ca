"""MDEQ, the multiscale equilibrium network for images."""

from models.mdeq.model import MDEQ

__all__ = ["MDEQ"]

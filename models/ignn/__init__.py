"""IGNN, implicit graph neural networks: one class per kind of task."""

from models.ignn.model import ChainsIGNN, GraphIGNN, NodeIGNN

__all__ = ["ChainsIGNN", "GraphIGNN", "NodeIGNN"]

"""The DEQ Transformer for language."""

from models.deq_transformer.model import DEQTransformer

__all__ = ["DEQTransformer"]

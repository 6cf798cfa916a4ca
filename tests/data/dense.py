"""Sparse matrices written out."""

from __future__ import annotations

import torch
from torch import Tensor

from data.graphs.graph import SparseMatrix


def dense_matrix(matrix: SparseMatrix) -> Tensor:
    """Return the matrix with its zeros, duplicates summed."""
    rows, columns = matrix.rows, matrix.columns
    written = rows.weights.new_zeros(rows.offsets.numel() - 1, columns.offsets.numel() - 1)
    sources = torch.repeat_interleave(torch.arange(len(written)), rows.offsets.diff().long())
    return written.index_put((sources, rows.columns.long()), rows.weights, accumulate=True)

"""Products with a constant sparse matrix, differentiable any number of times."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx


class Rows(Protocol):
    """Non-zeros row by row: row i has `columns[offsets[i]:offsets[i + 1]]` and their `weights`."""

    offsets: Tensor
    columns: Tensor
    weights: Tensor


class Matrix(Protocol):
    """A sparse matrix as its rows, and the rows of its transpose."""

    rows: Rows
    columns: Rows


def multiply(matrix: Matrix, x: Tensor, *, transposed: bool = False) -> Tensor:
    """Return M x for `matrix` M (R, N) and a dense `x` (N, m), or M^T x for an `x` (R, m); M is a constant.

    Each row is a weighted sum over an embedding bag, the fastest native kernel for narrow x: on a CPU about four times
    as fast as a compressed sparse product (5,354 nodes, 16,600 non-zeros, m = 64, one thread: 0.03 ms against 0.12).
    """
    rows, columns = matrix.rows, matrix.columns
    return _Product.apply(x, columns, rows) if transposed else _Product.apply(x, rows, columns)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, rows: Rows, columns: Rows) -> Tensor:
        ctx.rows, ctx.columns = rows, columns
        weights = rows.weights.to(x.dtype)
        return F.embedding_bag(
            rows.columns, x, rows.offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
        )

    @staticmethod
    def backward(ctx: FunctionCtx, g: Tensor) -> tuple[Tensor, None, None]:
        return _Product.apply(g.contiguous(), ctx.columns, ctx.rows), None, None

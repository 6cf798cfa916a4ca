"""Products with a constant sparse matrix, differentiable any number of times."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class Rows(Protocol):
    """Non-zeros row by row: row i has `columns[offsets[i]:offsets[i + 1]]` and their `weights`."""

    offsets: Tensor
    columns: Tensor
    weights: Tensor


class Matrix(Protocol):
    """A sparse matrix, given by its rows and the rows of its transpose."""

    rows: Rows
    columns: Rows


def multiply(matrix: Matrix, x: Tensor, *, transposed: bool = False) -> Tensor:
    """Return M x for `matrix` M (R, N) and a dense `x` (N, m), or M^T x for an `x` (R, m); M is a constant.

    torch's embedding bag computes every row as a weighted sum. For narrow x it is torch's fastest kernel: on a CPU
    about four times as fast as its compressed sparse product (5,354 nodes, 16,600 non-zeros, m = 64, one thread:
    0.03 ms against 0.12).
    """
    rows, columns = (matrix.columns, matrix.rows) if transposed else (matrix.rows, matrix.columns)
    return _product(x, rows, columns)


def _product(x: Tensor, rows: Rows, columns: Rows) -> Tensor:
    """Return the product with the matrix of these `rows`; `columns` are the rows of its transpose."""
    return _Product.apply(x, rows, columns) if torch.is_grad_enabled() else _sums(x, rows)


def _sums(x: Tensor, rows: Rows) -> Tensor:
    # torch.nn.functional.embedding_bag(mode="sum") calls this after checks that cost as much as a small product
    return torch.embedding_bag(
        x,
        rows.columns,
        rows.offsets,
        mode=0,
        per_sample_weights=rows.weights.to(x.dtype),
        include_last_offset=True,
    )[0]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Rows, columns: Rows) -> Tensor:
        ctx.rows, ctx.columns = rows, columns
        return _sums(x, rows)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return _product(g.contiguous(), ctx.columns, ctx.rows), None, None

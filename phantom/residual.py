"""The residual of a fixed-point problem: the only definition in the code base."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Norm = Literal["l2", "rms", "max"]
Stop = Literal["relative", "absolute"]


def vector_norm(v: Tensor, norm: Norm) -> Tensor:
    """Return the norm of every row of `v` (B, D) as (B,): Euclidean, root mean square, or largest absolute entry."""
    if norm == "max":
        return torch.linalg.vector_norm(v, ord=torch.inf, dim=1)
    length = torch.linalg.vector_norm(v, dim=1)
    return length if norm == "l2" else length / v.shape[1] ** 0.5


def residual_norm(fz: Tensor, g: Tensor, *, norm: Norm, stop: Stop) -> Tensor:
    """Return |g| (absolute) or |g| / |f(z)| (relative) for g = f(z) - z, per problem.

    Args:
        fz: (B, D) f(z).
        g: (B, D) f(z) - z.
    """
    absolute = vector_norm(g, norm)
    if stop == "absolute":
        return absolute
    # where f(z) = 0 the fixed point is z = 0: absolute and relative then agree on 0, and on no progress otherwise
    return absolute / vector_norm(fz, norm).clamp_min(torch.finfo(fz.dtype).tiny)

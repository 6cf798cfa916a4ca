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
        if v.shape[1] == 0:
            return v.new_zeros(v.shape[0])
        # on a CPU twenty times as fast as torch.linalg.vector_norm(ord=inf), and twice as fast as v.abs().amax(dim=1)
        return torch.maximum(v.amax(dim=1), -v.amin(dim=1))
    # squares of float32 numbers below 1e-23 or above 1e19 leave its range; a CPU solve rescales such a problem instead
    if v.is_cuda and v.dtype == torch.float32:
        length = torch.linalg.vector_norm(v, dim=1, dtype=torch.float64).to(v.dtype)
    else:
        length = torch.linalg.vector_norm(v, dim=1)
    return length if norm == "l2" else length / max(v.shape[1], 1) ** 0.5


def residual_of(
    fz: Tensor, z: Tensor, scale: Tensor | None = None, *, norm: Norm, relative: bool, in_place: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return g = f(z) - z (B, D) and, as (B,): |g|, the residual |g| / max(|f(z)|, scale) or |g| / scale, its divisor.

    Args:
        fz: (B, D) f(z).
        scale: (B,) positive. Of a relative residual it is |f(z0)|, so that a solution z = 0 can be met; without one,
            an absolute residual is |g|, and a relative one |g| / |f(z)|.
        relative: whether |f(z)| belongs to the scale.
        in_place: write g into `fz`, which saves allocating another state.
    """
    if relative:
        size = vector_norm(fz, norm)
        scale = positive(size) if scale is None else torch.maximum(size, scale)
    g = fz.sub_(z) if in_place else fz - z
    length = vector_norm(g, norm)
    return g, length, length if scale is None else length / scale, scale


def positive(scale: Tensor) -> Tensor:
    """Return `scale` (B,), where it is zero the smallest positive number: 0 / 0 is 0, and 1 / 0 huge or infinite."""
    return scale.clamp_min(torch.finfo(scale.dtype).tiny)

"""Problems too small or too large for sums of squares: the same ones times a power of two per row, which is exact."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from phantom.residual import Norm, vector_norm
from phantom.runtime.host import is_on_host
from phantom.state import FlatMap


def bounds(dtype: torch.dtype) -> tuple[float, float]:
    """Return the least and largest norm that a solve may begin with.

    A solve follows a residual down to the rounding of the state, and up to a million times the first one; all of their
    squares must be in the range of the number format.
    """
    info = torch.finfo(dtype)
    return info.tiny**0.5 / info.eps, info.max**0.5 * 1e-7


def is_out_of_range(norms: Sequence[float], dtype: torch.dtype) -> bool:
    """Return whether a norm is outside the bounds; one that is zero may be that of numbers whose squares vanish."""
    least, most = bounds(dtype)
    return any(norm < least or norm > most for norm in norms)


def powers_of_two(*states: Tensor) -> Tensor | None:
    """Return powers of two (B, 1) that bring the rows of these (B, D) that are out of bounds to a largest entry near 1.

    Other rows have the power 1. A row of zeros takes that of the largest of its neighbours; infinities and NaN do not
    count. None where there is nothing to do.
    """
    if states[0].numel() == 0:
        return None
    least, most = bounds(states[0].dtype)
    largest = torch.stack([s.nan_to_num(0.0, 0.0, 0.0).abs().amax(dim=1) for s in states]).amax(dim=0)
    largest = torch.where(largest > 0, largest, largest.amax())
    outside = (largest > 0) & ((largest < least) | (largest > most))
    if not bool(outside.any()):
        return None
    exponent = torch.frexp(torch.where(outside, largest, 0.5)).exponent
    # the inverse of a power must be a normal number, too
    least_exponent = int(torch.frexp(torch.tensor(torch.finfo(largest.dtype).tiny, dtype=largest.dtype)).exponent)
    power = torch.ldexp(torch.ones_like(largest), -exponent.clamp(least_exponent, -least_exponent))
    return power[:, None]


def norm_of_any_size(v: Tensor, norm: Norm) -> Tensor:
    """Return the norm (B,) of every row of `v` (B, D), on a CPU also where the squares of its numbers leave the range.

    A norm that is itself too large for the number format is its largest number.
    """
    length = vector_norm(v, norm)
    if not is_on_host(v) or not is_out_of_range(length.tolist(), v.dtype) or (power := powers_of_two(v)) is None:
        return length
    return (vector_norm(v * power, norm) / power[:, 0]).clamp_max(torch.finfo(v.dtype).max)


def rescaled(f: FlatMap, power: Tensor) -> FlatMap:
    """Return z -> s f(z / s) for the powers of two s (B, 1)."""
    inverse = 1 / power
    return lambda z: f(z * inverse) * power

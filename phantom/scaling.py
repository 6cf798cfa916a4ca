"""Problems too small or too large for sums of squares: the same ones times a power of two per row, which is exact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from phantom.solver.base import Solver
from phantom.state import FlatMap


def is_on_host(z: Tensor) -> bool:
    """Return whether reading a number waits for nothing, and is possible at all: nobody traces operators."""
    functorch: Any = torch._C  # torch declares nothing of it
    traced = torch.compiler.is_compiling() or functorch._functorch.is_functorch_wrapped_tensor(z)
    traced = traced or functorch._len_torch_dispatch_stack() > 0
    return z.device.type == "cpu" and type(z) is Tensor and not traced


def has_numbers(z: Tensor) -> bool:
    """Return whether `z` holds numbers at all: tensors on the meta device, and fake ones, have but a shape."""
    return z.device.type != "meta" and (type(z) is Tensor or not is_fake(z))


def can_ask(z: Tensor, solver: Solver) -> bool:
    """Return whether the host may look at a solve: where a `tol` makes it wait anyway, or where nothing waits."""
    return (solver.asks and has_numbers(z)) or is_on_host(z)


def is_read_for_nothing(z: Tensor) -> bool:
    """Return whether Python reads and compares a number per row of `z` (B, D) in less time than operators take."""
    return is_on_host(z) and z.shape[0] <= 64


def read(columns: Sequence[Tensor], *, on_host: bool) -> list[list[float]]:
    """Return the numbers of these (B,) tensors; what is not on the host is waited for once."""
    if on_host:
        return [column.tolist() for column in columns]
    return torch.stack([column.to(columns[0].dtype) for column in columns]).tolist()


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


def rescaled(f: FlatMap, power: Tensor) -> FlatMap:
    """Return z -> s f(z / s) for the powers of two s (B, 1)."""
    inverse = 1 / power
    return lambda z: f(z * inverse) * power

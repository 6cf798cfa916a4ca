"""May the host look at the numbers of a solve, and what does it cost?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from phantom.solver.base import Solver

TORCH: Any = torch._C  # torch declares nothing of what is used here


def is_traced(z: Tensor) -> bool:
    """Return whether operators are traced: under torch.compile and inside the transforms of torch.func."""
    return torch.compiler.is_compiling() or TORCH._functorch.is_functorch_wrapped_tensor(z)


def is_exporting() -> bool:
    """Return whether torch.export records; torch.compiler.is_exporting is true in all that torch 2.11 compiles, too."""
    return torch.compiler._is_exporting_flag


def is_on_host(z: Tensor) -> bool:
    """Return whether reading a number waits for nothing, and is possible at all: nobody traces operators."""
    return z.device.type == "cpu" and type(z) is Tensor and not is_traced(z) and TORCH._len_torch_dispatch_stack() == 0


def has_numbers(z: Tensor) -> bool:
    """Return whether `z` holds numbers at all: tensors on the meta device, and fake ones, have but a shape."""
    return z.device.type != "meta" and (type(z) is Tensor or not is_fake(z))


def can_ask(z: Tensor, solver: Solver) -> bool:
    """Return whether the host may look at a solve: where a `tol` makes it wait anyway, or where nothing waits."""
    return (solver.asks and has_numbers(z)) or is_on_host(z)


def is_cheap_to_read(z: Tensor) -> bool:
    """Return whether Python reads and compares a number per row of `z` (B, D) in less time than operators take."""
    return is_on_host(z) and z.shape[0] <= 64


def read(columns: Sequence[Tensor], *, on_host: bool) -> list[list[float]]:
    """Return the numbers of these (B,) tensors; what is not on the host is waited for once."""
    if on_host:
        return [column.tolist() for column in columns]
    return torch.stack([column.to(columns[0].dtype) for column in columns]).tolist()

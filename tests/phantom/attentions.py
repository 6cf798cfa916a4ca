"""A map with torch's attention, the same written out, and a counter of torch's attention kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.phantom.problems import randn

HEADS = (2, 2)  # two heads of width two


class Attentions(TorchDispatchMode):
    """Count the forward calls of fused attention kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.fused += name.startswith("_scaled_dot_product") and not ("math" in name or "backward" in name)
        return func(*args, **(kwargs or {}))


def written_out(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.softmax(query @ key.mT / query.shape[-1] ** 0.5, dim=-1) @ value


def leaves() -> list[Tensor]:
    """Return projections (3, D, D) and an input (B, S, D) under which `bind` is a contraction."""
    return [(0.2 * randn(3, 4, 4, seed=1)).requires_grad_(), randn(2, 3, 4, seed=2).requires_grad_()]


def bind(weight: Tensor, x: Tensor, attend: Callable[..., Tensor] = F.scaled_dot_product_attention):
    """Return the map of states (B, S, D) that attends to the state and adds the input."""

    def f(z: Tensor) -> Tensor:
        query, key, value = ((z @ part).unflatten(-1, HEADS).transpose(-2, -3) for part in weight)
        return torch.tanh(attend(query, key, value).transpose(-2, -3).flatten(-2) + x)

    return f


def iterated(weight: Tensor, x: Tensor) -> Tensor:
    """Return the fixed point by many steps of plain torch, differentiable in every order."""
    z, f = torch.zeros_like(x), bind(weight, x, written_out)
    for _ in range(60):
        z = f(z)
    return z

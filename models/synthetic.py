"""The synthetic map of Figure 1, Geng et al. 2021: one layer, a contraction by construction.

Shapes: B problems, D the dimension of the state and of the input.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from phantom.validate import check_choice, check_count, check_number

Activation = Literal["tanh", "relu"]


class SyntheticMap(nn.Module):
    """f(z) = act(W z + U x + b) with |W|_2 = `spectral_norm` at construction.

    Both activations are 1-Lipschitz, so `spectral_norm` is a Lipschitz constant of f. torch's global generator draws
    Gaussian W and U; b is zero. The constructor sets the spectral norm once; training does not enforce it.

    Args:
        dim: D.
        spectral_norm: largest singular value of W, in (0, 1).
        activation: `tanh` or `relu`.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, *, dim: int, spectral_norm: float, activation: Activation) -> None:
        super().__init__()
        check_count("dim", dim, least=1)
        check_number("spectral_norm", spectral_norm, "(0, 1)", also=": f is a contraction by this factor")
        check_choice("activation", activation, get_args(Activation))
        weight = torch.randn(dim, dim)
        self.weight = nn.Parameter(weight * (spectral_norm / torch.linalg.matrix_norm(weight, ord=2)))
        self.input_weight = nn.Parameter(torch.randn(dim, dim) / math.sqrt(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.activation = activation

    def bind(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """Return f for the input `x` (B, D); f maps (B, D) to (B, D)."""
        activate = getattr(torch, self.activation)
        injection = nn.functional.linear(x, self.input_weight, self.bias)
        return lambda z: activate(nn.functional.linear(z, self.weight) + injection)

"""Layers that models share: functional weight normalisation and the dropout mask of a whole solve."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from phantom.precision import autocast_dtype
from phantom.validate import check_number


class WeightNorm(nn.Module):
    """Hold a weight as direction and length: weight = v * g / |v|, one length per output channel (axis 0).

    The effective weight is a function of the parameters and is never stored: the caller computes it once per `bind`
    and closes over it, so that a copy, a loaded state dict or an averaged model needs no refresh. There is no epsilon:
    a channel whose v is all zeros has no direction, and gives NaN.

    Args:
        weight: (out, ...) initial weight; g starts as its norm over all axes but 0, so that the product is `weight`.

    Raises:
        ValueError: `weight` has fewer than two axes.

    Source: Salimans and Kingma, *Weight Normalization* (2016).
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        if weight.dim() < 2:
            raise ValueError(f"weight must have an output axis and at least one more, got shape {tuple(weight.shape)}")
        v = weight.detach().clone()
        self.weight_v = nn.Parameter(v)
        self.weight_g = nn.Parameter(_norm(v))

    def forward(self) -> Tensor:
        """Return the effective weight, with a graph to `weight_v` and `weight_g` when grad is enabled."""
        return self.weight_v * (self.weight_g / _norm(self.weight_v))

    def extra_repr(self) -> str:
        return f"shape={tuple(self.weight_v.shape)}"


def _norm(v: Tensor) -> Tensor:
    return torch.linalg.vector_norm(v, dim=tuple(range(1, v.dim())), keepdim=True)


def variational_mask(
    shape: Sequence[int], *, p: float, training: bool, device: torch.device, dtype: torch.dtype
) -> Tensor | None:
    """Draw one dropout mask for a whole solve: entries 1 / (1 - p) with probability 1 - p, else 0.

    Draw it in `bind` and multiply with it inside f, so that f stays the same function at every step.

    Args:
        shape: axes of size 1 share one draw, e.g. (B, C, 1, 1) drops whole channels.

    Returns:
        None where dropout does nothing: outside training, and for p = 0.

    Raises:
        ValueError: `p` is outside [0, 1).
    """
    check_dropout(p)
    if not training or p == 0:
        return None
    return torch.empty(tuple(shape), device=device, dtype=dtype).bernoulli_(1 - p).div_(1 - p)


def check_dropout(p: float) -> None:
    """Raise unless `p` is in [0, 1)."""
    check_number("dropout", p, "[0, 1)", also=": the probability that an entry is dropped")


def cast_for_autocast(weight: Tensor) -> Tensor:
    """Return `weight` in the dtype of the autocast that is active, if one is.

    Autocast caches the casts of leaf parameters only: it would cast an effective weight in every evaluation of f.
    """
    dtype = autocast_dtype(weight.device.type)
    return weight if dtype is None else weight.to(dtype)

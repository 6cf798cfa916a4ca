"""Layers that models share: functional weight and spectral normalisation, the dropout mask of a whole solve."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from phantom.runtime.precision import autocast_dtype
from phantom.validate import check_number

_DROPPED = ": the probability that an entry is dropped"


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
        _check_weight(weight)
        v = weight.detach().clone()
        self.weight_v = nn.Parameter(v)
        self.weight_g = nn.Parameter(_norm(v))

    def forward(self) -> Tensor:
        """Return the effective weight, with a graph to `weight_v` and `weight_g` when grad is enabled."""
        return self.weight_v * (self.weight_g / _norm(self.weight_v))

    def extra_repr(self) -> str:
        return f"shape={tuple(self.weight_v.shape)}"


class SpectralNorm(nn.Module):
    """Scale a weight W by its largest singular value sigma: weight = W * g / sigma, or W * min(1, g / sigma).

    sigma = u^T W v is an estimate from below, which lags behind a weight that moves. So with a fixed g = `bound` < 1
    the product with it contracts in l2 as far as the estimate is right; f(z) = tanh(weight z + x) has one equilibrium
    then. A weight of more axes is the matrix (out, rest): of a convolution that is its reshaped kernel, not the map.

    In training mode every call moves u and v towards the singular vectors by one power step; in evaluation they stay.
    Call it once per `bind` and close over the result: nothing moves during the solve.

    Args:
        weight: (out, ...) initial weight; u and v, buffers, start after 15 power steps.
        bound: initial value of g, one number per output channel.
        learned: g is a parameter, and the norm whatever it becomes; else it is `bound` for good.
        capped: only scale down.

    Raises:
        ValueError: `weight` has fewer than two axes, or `bound` is not positive.

    Source: Miyato et al., *Spectral Normalization for Generative Adversarial Networks* (2018); the learnt and the
    capped form are torchdeq's.
    """

    g: Tensor
    u: Tensor
    v: Tensor

    def __init__(self, weight: Tensor, *, bound: float = 1.0, learned: bool = False, capped: bool = False) -> None:
        super().__init__()
        _check_weight(weight)
        check_number("bound", bound, "> 0", also=": it is about the largest singular value of the result")
        self.learned, self.capped = learned, capped
        self.weight = nn.Parameter(weight.detach().clone())
        g = weight.new_full((weight.shape[0], *[1] * (weight.dim() - 1)), bound)
        if learned:
            self.g = nn.Parameter(g)
        else:
            self.register_buffer("g", g)
        matrix = weight.detach().flatten(1)
        self.register_buffer("u", nn.functional.normalize(torch.randn_like(matrix[:, 0]), dim=0))
        self.register_buffer("v", torch.zeros_like(matrix[0]))
        for _ in range(15):
            self._power_step()

    def forward(self) -> Tensor:
        """Return the effective weight, with a graph to `weight` and a learnt `g` when grad is enabled."""
        if self.training:
            self._power_step()
        # clone u and v: the next power step overwrites them, and this backward needs the present values
        u, v = self.u.clone(), self.v.clone()
        # of length one but in an averaged model, where they are means of unit vectors
        sigma = (u @ self.weight.flatten(1) @ v) / (u.norm() * v.norm())
        factor = self.g / sigma
        return self.weight * (factor.clamp_max(1.0) if self.capped else factor)

    @torch.no_grad()
    def _power_step(self) -> None:
        matrix = self.weight.flatten(1)
        self.v.copy_(nn.functional.normalize(matrix.T @ self.u, dim=0))
        self.u.copy_(nn.functional.normalize(matrix @ self.v, dim=0))

    def extra_repr(self) -> str:
        return f"shape={tuple(self.weight.shape)}, learned={self.learned}, capped={self.capped}"


def _check_weight(weight: Tensor) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(
            f"weight must be a tensor, got {type(weight).__name__}: pass its weight, and let f compute with what "
            "forward() returns, as in F.linear(z, weight, bias)"
        )
    if weight.dim() < 2:
        raise ValueError(f"weight must have an output axis and at least one more, got shape {tuple(weight.shape)}")


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
    check_number("p", p, "[0, 1)", also=_DROPPED)
    if not training or p == 0:
        return None
    return torch.empty(tuple(shape), device=device, dtype=dtype).bernoulli_(1 - p).div_(1 - p)


def check_dropout(dropout: float) -> None:
    """Raise unless `dropout` is in [0, 1)."""
    check_number("dropout", dropout, "[0, 1)", also=_DROPPED)


def cast_for_autocast(weight: Tensor) -> Tensor:
    """Return `weight` in the dtype of the autocast that is active, if one is.

    Autocast caches the casts of leaf parameters only: it would cast an effective weight in every evaluation of f.
    """
    dtype = autocast_dtype(weight.device.type)
    return weight if dtype is None else weight.to(dtype)

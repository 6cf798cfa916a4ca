"""Gradient clipping."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from phantom.validate import check_number


@dataclass(frozen=True, kw_only=True)
class Clipping(ABC):
    """Bound gradients before the optimiser's step."""

    max_norm: float

    def __post_init__(self) -> None:
        check_number("max_norm", self.max_norm, "> 0", also="; choose clipping=null to clip nothing")

    @abstractmethod
    def clip(self, parameters: Iterable[nn.Parameter], total_norm: Tensor) -> None:
        """Scale the gradients of `parameters` in place; `total_norm` is the norm of all of them together."""


@dataclass(frozen=True, kw_only=True)
class ClipTotal(Clipping):
    """Scale all gradients together to a total norm of at most `max_norm`."""

    def clip(self, parameters: Iterable[nn.Parameter], total_norm: Tensor) -> None:
        nn.utils.clip_grads_with_norm_(parameters, self.max_norm, total_norm)


@dataclass(frozen=True, kw_only=True)
class ClipEach(Clipping):
    """Scale each parameter's gradient to a norm of at most `max_norm` of its own."""

    def clip(self, parameters: Iterable[nn.Parameter], total_norm: Tensor) -> None:
        for parameter in parameters:
            nn.utils.clip_grad_norm_([parameter], self.max_norm)


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the Euclidean norm of all gradients together."""
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def scale_gradients(parameters: Iterable[nn.Parameter], factor: float | Tensor) -> None:
    """Multiply all gradients by `factor` in place."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients:
        # match the dtype, or _foreach_mul_ falls back to the slow path
        factor = factor.to(gradients[0].dtype) if isinstance(factor, Tensor) else factor
        torch._foreach_mul_(gradients, factor)  # pyright: ignore[reportPrivateImportUsage]

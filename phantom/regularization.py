"""Jacobian regularisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from phantom.gradient.linear import vjp
from phantom.runtime import transforms
from phantom.runtime.frozen import twice_differentiable
from phantom.state import Map, Packing, State
from phantom.validate import check_count


@dataclass(frozen=True, kw_only=True)
class JacobianRegularizer:
    """Estimate |J|_F^2 / (B D) at a detached state by Hutchinson's probes, differentiably.

    The mean over `num_probes` Gaussian v of |J^T v|^2 / (B D), J = df/dz. Its backward differentiates f twice: here
    a compiled f runs as written, and without fused attention. Cost: one evaluation of f with a graph, one vjp a probe.

    Source: Bai, Koltun and Kolter, *Stabilizing Equilibrium Models by Jacobian Regularization* (2021).
    """

    num_probes: int = 1

    def __post_init__(self) -> None:
        check_count("num_probes", self.num_probes, least=1)

    def __call__(self, f: Map, z: State) -> Tensor:
        """Return the () penalty of f at `z`; gradients reach the parameters and the input of f, not `z`."""
        packing = Packing(z)
        flat_f = packing.wrap(f)
        with torch.enable_grad(), twice_differentiable():
            z = packing.pack(z).detach()
            if transforms.are_active():
                linear: Any = torch.func.vjp(lambda z: flat_f(z.clone()), z)  # f may write to its argument
                fz, pull = linear
                products = (pull(torch.randn_like(fz))[0] for _ in range(self.num_probes))
            else:
                z.requires_grad_()
                fz = flat_f(z.clone())
                products = (vjp(fz, z, torch.randn_like(fz), create_graph=True) for _ in range(self.num_probes))
            total = fz.new_zeros(())
            for product in products:
                total = total + product.square().sum()
        return total / (self.num_probes * max(z.numel(), 1))  # of an empty batch 0, and not 0 / 0

"""Jacobian regularisation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from phantom.frozen import twice_differentiable
from phantom.gradient.linear import vjp
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
            z = packing.pack(z).detach().requires_grad_()
            fz = flat_f(z.clone())  # f may write to its argument
            total = fz.new_zeros(())
            for _ in range(self.num_probes):
                total = total + vjp(fz, z, torch.randn_like(fz), create_graph=True).square().sum()
        return total / (self.num_probes * z.numel())

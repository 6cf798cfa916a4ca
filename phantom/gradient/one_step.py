"""The one-step gradient: differentiate f once at the equilibrium, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field

from phantom.gradient.adjoint import NPG


@dataclass(frozen=True, kw_only=True)
class OneStep(NPG):
    """The one-step, or Jacobian-free, gradient: u = g, which is NPG with k = 1 and lam = 1.

    Cost: one evaluation of f with a graph, no vjp. It drops every term but the first of the Neumann series, so its
    direction is poor where the spectral radius of J is near one: NPG or UPG with a few terms is the better estimate.

    Source: Fung et al., *JFB: Jacobian-Free Backpropagation for Implicit Networks* (2022).
    """

    k: int = field(default=1, init=False)
    lam: float = field(default=1.0, init=False)

"""Estimators that act on the cotangent: exact implicit differentiation and the Neumann phantom gradient.

f is evaluated once with a graph at z_star. In backward the cotangent g of that output is replaced by an (approximate)
solution u of (I - J^T) u = g, and the ordinary graph carries u to parameters and input. J = df/dz at z_star.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from phantom.gradient.base import GradientEstimator, check_grad_enabled
from phantom.solution import Solution, Stats
from phantom.solve import replace_rows, solve
from phantom.solver.base import Solver
from phantom.state import FlatMap
from phantom.validate import check_count, check_lam

Vjp = Callable[[Tensor], Tensor]


class _Cotangent(torch.autograd.Function):
    """The identity, whose backward maps the cotangent; the graph of f below it stays an ordinary graph.

    The saved tensors are an input of this node and a leaf, so no reference cycle forms, and nothing outlives the graph.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, fz: Tensor, z: Tensor, estimator: AdjointEstimator, stats: Stats, history: Any
    ) -> Tensor:
        ctx.save_for_backward(fz, z)
        ctx.estimator, ctx.stats, ctx.history = estimator, stats, history
        return fz.view_as(fz)

    @staticmethod
    def backward(ctx: FunctionCtx, g: Tensor) -> tuple[Tensor, None, None, None, None]:
        fz, z = ctx.saved_tensors

        def vjp(u: Tensor) -> Tensor:
            ctx.stats.num_vjps += 1
            (product,) = torch.autograd.grad(fz, z, u, retain_graph=True)
            return product

        with torch.no_grad():
            u = ctx.estimator.cotangent(vjp, g, ctx.stats, ctx.history)
        # grad is enabled here only under create_graph=True. u depends on the parameters through J even where g is a
        # constant, so the mark hangs on fz; once_differentiable looks at g, and would pass a partial answer silently
        return (_OnceOnly.apply(u, fz) if torch.is_grad_enabled() else u), None, None, None, None


class _OnceOnly(torch.autograd.Function):
    """The identity on u, whose own backward raises."""

    @staticmethod
    def forward(ctx: FunctionCtx, u: Tensor, fz: Tensor) -> Tensor:
        return u.view_as(u)

    @staticmethod
    def backward(ctx: FunctionCtx, g: Tensor) -> None:
        raise RuntimeError("the implicit and NPG gradients cannot be differentiated twice: use UPG or BPTT, which can")


class AdjointEstimator(GradientEstimator):
    """The family of estimators that differ only in how they map the cotangent.

    The value is f(z_star). Cost: one evaluation of f with a graph, whatever k or the number of solver steps, and the
    vjps of `cotangent`. Double backward is not supported and raises: UPG supports it.
    """

    @abstractmethod
    def cotangent(self, vjp: Vjp, g: Tensor, stats: Stats, history: Any) -> Tensor:
        """Return u (B, D) for the incoming cotangent `g` (B, D), with `vjp(u) = J^T u`.

        Args:
            stats: of the forward solve; what the backward costs is added to it.
            history: the solver's memory, where `needs_history` asks for it; else None.
        """

    def attach(self, f: FlatMap, solution: Solution) -> Tensor:
        check_grad_enabled()
        z = solution.z_star.detach().requires_grad_()
        # the backward of a compiled f is one piece: every vjp would compute the gradients of all parameters, too
        with torch.compiler.set_stance("force_eager"):
            fz = f(z)
        solution.stats.num_evals += 1
        return _Cotangent.apply(fz, z, self, solution.stats, solution.history)


@dataclass(frozen=True, kw_only=True)
class NPG(AdjointEstimator):
    """Neumann-series phantom gradient: u = lam sum_{i<k} (B^T)^i g with B = lam J + (1 - lam) I.

    Eq. (17), Geng et al. 2021. The error against the exact adjoint is (B^T)^k u_exact. Cost: k - 1 vjps, memory flat in
    k. Degrades where the spectral radius of B exceeds one, and the more the larger k is. k = 1, lam = 1 is the one-step
    (Jacobian-free) gradient of Fung et al. 2022.

    Args:
        k: number of terms, >= 1.
        lam: damping, in (0, 1].
    """

    k: int
    lam: float

    def __post_init__(self) -> None:
        check_count("k", self.k, least=1)
        check_lam(self.lam)

    def cotangent(self, vjp: Vjp, g: Tensor, stats: Stats, history: Any) -> Tensor:
        # Horner's form of the sum: k - 1 damped steps of u = J^T u + g from lam g
        u = self.lam * g
        for _ in range(self.k - 1):
            u = u.lerp(vjp(u) + g, self.lam)
        return u


@dataclass(frozen=True, kw_only=True)
class Implicit(AdjointEstimator):
    """Exact implicit differentiation: solve u = J^T u + g with a solver of its own.

    Eq. (4), Geng et al. 2021. Exact up to the residual of the backward solve, which is reported in
    `stats.adjoint` after backward, and to the residual of the forward solve. A problem whose solve finds nothing better
    than u = 0 gets u = g, the one-step gradient. Cost: one vjp per step of `solver`.

    Args:
        solver: solves the adjoint equation, from u = 0.
    """

    solver: Solver

    def __post_init__(self) -> None:
        if not isinstance(self.solver, Solver):
            raise TypeError(f"solver must be a Solver such as Broyden(max_steps=30, tol=1e-6), got {self.solver!r}")
        check_count("solver.max_steps", self.solver.max_steps, least=1)
        if not self.solver.measures_residual:
            raise ValueError(
                f"solver={self.solver!r} measures no residual: the adjoint solve needs one, as FixedPoint has"
            )

    def cotangent(self, vjp: Vjp, g: Tensor, stats: Stats, history: Any) -> Tensor:
        # at u = 0 the map is g itself: no vjp needed to know that
        u, stats.adjoint, _ = solve(lambda u: vjp(u) + g, torch.zeros_like(g), self.solver, fz0=g, in_place=True)
        # where nothing beat u = 0, a zero gradient would pass for an answer, and hide a cotangent that is not finite
        progress = stats.adjoint.residual < stats.adjoint.trace[0]
        return replace_rows(u, g, ~progress)

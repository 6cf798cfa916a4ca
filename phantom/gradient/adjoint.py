"""Estimators that act on the cotangent: exact implicit differentiation and the Neumann phantom gradient.

f is evaluated once with a graph at z_star. In backward the cotangent g of that output is replaced by an (approximate)
solution u of (I - J^T) u = g, and the ordinary graph carries u to parameters and input. J = df/dz at z_star.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from phantom.confirm import Confirming
from phantom.gradient.base import GradientEstimator, check_grad_enabled
from phantom.gradient.inverse import BATCHED, Inverse, OnceOnly, Operator
from phantom.gradient.linear import Linearisation, Readings, agree, at, edge_of, leads_elsewhere, partial_vjps, vjp
from phantom.report import ADJOINT, act
from phantom.runtime import transforms
from phantom.runtime.frozen import is_kept_elsewhere, reusable, twice_differentiable, uncompiled
from phantom.runtime.host import can_ask
from phantom.scaling import norm_of_any_size
from phantom.solution import Solution, Stats
from phantom.solve import replace_rows, solve
from phantom.solver.base import Solver
from phantom.solver.broyden import Broyden
from phantom.solver.rollout import Rollout
from phantom.state import FlatMap, form_of
from phantom.validate import check_count, check_kind, check_lam

Vjp = Callable[[Tensor], Tensor]

CHANGED = (
    "evaluates f again in backward, and there f reads other tensors than in the forward pass, has another value, or "
    "hides what it reads in compiled or scripted code, or in the arguments of a torch.autograd.Function, where "
    "w.view_as(w) in the place of w is seen. Weights that torch.func.functional_call or parametrize.cached puts in are "
    "gone by then, unless backward runs inside of it. An input or a mask that a module keeps may have changed: let f "
    "hold what it reads, as a closure or functools.partial does. UPG and BPTT do not evaluate f again"
)


@dataclass
class _Backward:
    """What the backward of an equilibrium needs: f, its linearisation there, and the estimator with the solve."""

    estimator: AdjointEstimator
    f: FlatMap
    linear: Linearisation
    stats: Stats
    history: Any
    is_adjoint: bool = False  # f is the map of an adjoint equation itself, and its inputs are given
    anew: FlatMap | None = None  # f for products with J, where those of the value would cost more than they need

    def cotangent(self, g: Tensor) -> Tensor:
        point: tuple[Tensor, Tensor] | None = None

        def product(u: Tensor) -> Tensor:
            nonlocal point
            point = point or self._point()
            self.stats.num_vjps += 1
            return vjp(*point, u)

        with torch.no_grad(), nullcontext() if self.anew is None else reusable():
            u = self.estimator.cotangent(product, g, self.stats, self.history)
        if not isinstance(u, Tensor) or u.shape != g.shape:
            name = type(self.estimator).__name__
            raise ValueError(f"{name}.cotangent must return u {tuple(g.shape)}, the shape of g, got {form_of(u)}")
        return u

    def _point(self) -> tuple[Tensor, Tensor]:
        """Return f(z) and z of the products with J: those of the value, or of one evaluation more.

        Raises:
            RuntimeError: f has another value than in the forward pass.
        """
        if self.anew is None:
            return self.linear.fz, self.linear.z
        self.stats.num_evals += 1
        with torch.enable_grad():
            z = self.linear.z.detach().requires_grad_()
            fz = self.anew(at(z))
        # of a compiled module all that it reads is bound, and the host need not wait
        if self.anew is self.f and not self.is_value(fz, self.linear.fz):
            name = type(self.estimator).__name__
            raise RuntimeError(f"under torch's checkpointing and save_on_cpu, {name} {CHANGED}")
        return fz, z

    def is_value(self, fz: Tensor, before: Tensor) -> bool:
        """Return whether f gave `before` in the forward pass; one that is captured as a CUDA graph cannot tell."""
        if fz.is_cuda and torch.cuda.is_current_stream_capturing():
            return True
        return agree(fz.detach(), before.detach(), self.stats.differentiated_in)

    def cotangents(self, g: Tensor) -> Tensor:
        """Return u for a `g` under vmap, of `is_grads_batched=True` for one."""
        if torch.is_grad_enabled():
            raise RuntimeError(BATCHED)

        def solve(product: Vjp, v: Tensor) -> Tensor:
            return self.estimator.cotangent(product, v, self.stats, self.history)

        operator = Operator(self.linear.fz, self.linear.z, solve, is_exact=False, has_forward=False)
        if transforms.is_grads_batched(g):
            return transforms.on_batch(lambda g: operator(g, transposed=True), g)
        index = torch.arange(len(self.linear.z), device=g.device)
        return Inverse.apply(g, index, operator, True, True, ())


class Equilibrium(torch.autograd.Function):
    """The identity on f(z_star), whose backward maps the cotangent; the graph of f below it stays an ordinary graph.

    z_star is a leaf there, so no reference cycle forms, and nothing outlives the graph. What f reads is an input of
    this node, too, for a second derivative alone.
    """

    @staticmethod
    def forward(ctx: Any, fz: Tensor, backward: _Backward, *inputs: Tensor) -> Tensor:
        ctx.equilibrium = backward
        ctx.set_materialize_grads(False)
        value = fz.detach()
        ctx.save_for_backward(value)
        return value

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        equilibrium = ctx.equilibrium
        nothing = [None] * len(equilibrium.linear.inputs)
        if g is None:
            return None, None, *nothing
        if transforms.are_active() or transforms.is_grads_batched(g):
            return equilibrium.cotangents(g), None, *nothing
        u = equilibrium.cotangent(g)
        if not torch.is_grad_enabled():
            return u, None, *nothing
        # create_graph=True: u depends on the parameters through J, even where g is a constant
        if not equilibrium.estimator.is_exact:
            # the check is attached to fz and g, by which u depends on all that it does: torch's once_differentiable
            # looks at g alone. Without one of them a second derivative would silently be partial
            return OnceOnly.apply(u, equilibrium.linear.fz, g), None, *nothing
        return None, None, *_differentiable(ctx, g, u)


def _differentiable(ctx: Any, g: Tensor, u: Tensor) -> Sequence[Tensor | None]:
    """Return u^T df/dx for all tensors x that f reads, with a graph: everything there depends on the parameters.

    f is evaluated once more, at z_star as the value of this node, whose derivative is that of the equilibrium. u is the
    equilibrium of u -> J^T u + g, and is differentiated as such.
    """
    equilibrium, (value,) = ctx.equilibrium, ctx.saved_tensors
    z = _with_value(value, equilibrium.linear.z)
    if equilibrium.is_adjoint:
        fz, inputs = equilibrium.f(z), equilibrium.linear.inputs
    else:
        known = ctx.next_functions[1:]
        torch.clear_autocast_cache()  # f shall read its weights, and not the casts of the first evaluation
        with twice_differentiable(), Readings(z, outside=(node for node, _ in known)) as readings:
            fz, inputs = equilibrium.f(z), readings.tensors
        if [*map(edge_of, inputs)] != [*known] or readings.missed(fz) or not equilibrium.is_value(fz, value):
            raise RuntimeError(f"for its second derivative, Implicit {CHANGED}")

    def adjoint(u: Tensor) -> Tensor:
        return vjp(fz, z, u, create_graph=torch.is_grad_enabled()) + g

    linear = Linearisation(adjoint, u)
    linear.inputs = [tensor for tensor in (*inputs, z, g) if tensor.requires_grad]
    stats = Stats.of_no_solve(u)
    stats.follow(equilibrium.stats)
    again = _Backward(equilibrium.estimator, adjoint, linear, stats, None, is_adjoint=True)
    u = _with_value(Equilibrium.apply(linear.fz, again, *linear.inputs), u)
    return partial_vjps(fz, inputs, u, fixed=z)


def _with_value(graph: Tensor, value: Tensor) -> Tensor:
    return graph + (value - graph).detach()


class AdjointEstimator(GradientEstimator):
    """The family of estimators that differ only in how they map the cotangent.

    The value is f(z_star). Cost: one evaluation of f with a graph, whatever k or the number of solver steps, and the
    vjps of `cotangent`; where nothing that f reads needs a gradient, the value has no graph and backward costs nothing.
    """

    is_exact: ClassVar[bool] = False  # whether u is the solution of the equation, so that it may be differentiated

    @abstractmethod
    def cotangent(self, vjp: Vjp, g: Tensor, stats: Stats, history: Any) -> Tensor:
        """Return u (B, D) for the incoming cotangent `g` (B, D), with `vjp(u) = J^T u`.

        Args:
            stats: of the forward solve; what the backward costs is added to it.
            history: the solver's memory, where `needs_history` asks for it; else None.
        """

    def attach(self, f: FlatMap, solution: Solution) -> Tensor:
        check_grad_enabled()
        stats = solution.stats
        if transforms.are_active():
            with twice_differentiable():  # autograd around them may ask for a second derivative, too
                return self._attach_under(transforms.Levels(), f, solution)
        with uncompiled():
            linear = Linearisation(f, solution.z_star)
        stats.num_evals += 1
        if linear.is_frozen:
            return linear.fz.detach()
        anew = getattr(f, "frozen", None) or (f if is_kept_elsewhere() else None)
        backward = _Backward(self, f, linear, stats, solution.history, anew=anew)
        return Equilibrium.apply(linear.fz, backward, *linear.inputs)

    def _attach_under(self, levels: transforms.Levels, f: FlatMap, solution: Solution) -> Tensor:
        """Return the value with a derivative at every level of torch.func and forward mode.

        The derivative is a linear map with the Jacobian at z_star, a constant. Each Newton step with it makes one more
        order of mixed derivatives right: one step for each level that differentiates, and autograd around all of them
        is one, where f reads what needs grad there. A step costs an evaluation of f and a solve: weights that nobody
        differentiates cost none once they are detached.
        """
        stats, history = solution.stats, solution.history
        rows = levels.rows(solution.z_star)
        with levels.aside(f), torch.enable_grad():
            rows = rows.detach().requires_grad_()
        value = f(levels.wrap(rows))
        stats.num_evals += 1

        def apply(product: Vjp, v: Tensor) -> Tensor:
            return self.cotangent(product, v, stats, history)

        fz = levels.rows(value)
        operator = Operator(fz, rows, apply, is_exact=self.is_exact, has_forward=not self.needs_history)
        elsewhere = leads_elsewhere(fz, rows)
        if not elsewhere:
            # the graph to `rows` is for products alone: what the transforms return would hold it, and need grad
            value = f(levels.wrap(rows.detach()))
            stats.num_evals += 1
        orders = levels.orders + elsewhere
        if not levels.rows(levels.wrap(rows) * 1).requires_grad:
            raise RuntimeError(
                "torch.func needs grad around it to differentiate an equilibrium: call it outside of torch.no_grad()"
            )
        index = levels.wrap(torch.arange(len(rows), device=rows.device))

        def inverse(v: Tensor) -> Tensor:
            return Inverse.apply(v, index, operator, False, False, ())

        value = inverse(value)
        for _ in range(orders - 1 if operator.is_exact else 0):
            fz = f(value)
            stats.num_evals += 1
            value = value + inverse((fz - levels.constant(fz)) - (value - levels.constant(value)))
        return value


@dataclass(frozen=True, kw_only=True)
class NPG(AdjointEstimator):
    """Neumann-series phantom gradient: u = lam sum_{i<k} (B^T)^i g with B = lam J + (1 - lam) I.

    Eq. (17), Geng et al. 2021. The error against the exact adjoint is (B^T)^k u_exact. Cost: k - 1 vjps, memory flat in
    k. Degrades where the spectral radius of B exceeds one, and the more the larger k is. k = 1, lam = 1 is the one-step
    (Jacobian-free) gradient of Fung et al. 2022. Refuses a second derivative.

    Args:
        k: number of terms, >= 1.
        lam: damping, in (0, 1].
    """

    k: int = 5
    lam: float = 0.5

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
    `stats.adjoint` after backward, and to the residual of the forward solve. The equation is linear with right-hand
    side g, so that residual is |J^T u + g - u| / |g| whatever the `stop` of `solver`: 1 at u = 0, and 0 where g = 0.
    A problem whose solve visits nothing below 1 gets u = g, the one-step gradient, and is marked in
    `stats.adjoint.fallback`. Cost: one vjp per step of `solver`, and one where the best iterates of the problems are of
    different steps; see `confirm` of `fixed_point`.

    Exact in every order: under `create_graph=True` f is evaluated once more, and the adjoint equation, itself a fixed
    point, is differentiated in the same way. Then f must be twice differentiable; torch's attention is, as it is not
    fused there.

    Args:
        solver: solves the adjoint equation, from u = 0.
    """

    is_exact: ClassVar[bool] = True

    solver: Solver = field(default_factory=lambda: Broyden(tol=1e-6))

    def __post_init__(self) -> None:
        check_kind("solver", self.solver, Solver, "Broyden(max_steps=30, tol=1e-6)")
        check_count("solver.max_steps", self.solver.max_steps, least=1)
        if isinstance(self.solver, Rollout):
            raise ValueError(
                f"solver={self.solver!r} measures no residual: the adjoint solve needs one, as FixedPoint has"
            )

    def cotangent(self, vjp: Vjp, g: Tensor, stats: Stats, history: Any) -> Tensor:
        def equation(u: Tensor) -> Tensor:
            return vjp(u) + g

        # at u = 0 the map is g itself: no vjp needed to know that
        u, adjoint, _ = solve(
            equation,
            torch.zeros_like(g),
            self.solver,
            fz0=g,
            scale=norm_of_any_size(g, self.solver.norm),
            in_place=True,
            group=stats.group,
            computed_in=stats.differentiated_in,
        )
        adjoint.computed_in = stats.differentiated_in
        if stats.confirm and not adjoint.confirmed:
            Confirming(equation, adjoint, self.solver, relative=False)(u)
            adjoint.num_evals += 1
        # a zero gradient would pass for an answer, and hide a cotangent that is not finite
        adjoint.fallback = ~(adjoint.residual < 1)
        stats.adjoint = adjoint
        if stats.on_failure != "ignore" and can_ask(g, self.solver):
            act(adjoint, stats.on_failure, of=ADJOINT)
        return replace_rows(u, g, adjoint.fallback)

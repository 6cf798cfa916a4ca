"""The derivative of an equilibrium as a linear map, for torch.func and forward mode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from phantom.runtime import transforms

Cotangent = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]


REFUSAL = (
    "this gradient cannot be differentiated twice: use UPG or BPTT, which can, or Implicit, which is exact in every "
    "order (under torch.func each order is a transform of its own, and autograd around func.grad is one)"
)
BATCHED = (
    "a graph of a gradient under is_grads_batched is not there: use torch.func around the whole model (hessian, "
    "jacrev), or differentiate one row after the other"
)


@dataclass
class Operator:
    """v -> (I - J)^{-1} v, or what an estimator takes for it, at a plain linearisation of R rows.

    Args:
        fz, z: (R, D) f(z) with a graph to z.
        solve: solve(product, v) gives u with u = product(u) + v.
        is_exact: whether `solve` is the inverse, so that it may be differentiated.
        has_forward: whether `solve` looks at its product, and so has a form that is not transposed.
    """

    fz: Tensor
    z: Tensor
    solve: Cotangent
    is_exact: bool
    has_forward: bool

    def __call__(self, v: Tensor, *, transposed: bool) -> Tensor:
        """Return the solution (K, R, D) for K right-hand sides `v` (K, R, D)."""
        if not transposed and not self.has_forward:
            raise RuntimeError(
                "an estimator that uses the solver's memory, as SHINE does, has no forward mode: it serves cotangents "
                "alone. Use NPG, Implicit or UPG"
            )
        copies, shape = len(v), v.shape
        with torch.no_grad():
            product = self._products(transposed)
            found = self.solve(lambda u: product(u.view(shape)).reshape(-1, shape[-1]), v.reshape(-1, shape[-1]))
        return found.view(copies, *shape[1:])

    def _products(self, transposed: bool) -> Callable[[Tensor], Tensor]:
        output, point = self.fz, self.z
        if not transposed and output.requires_grad:
            with torch.enable_grad():  # J v is the gradient of J^T u, which is linear in u
                point = torch.zeros_like(output).requires_grad_()
                (output,) = torch.autograd.grad(
                    self.fz, self.z, point, create_graph=True, materialize_grads=True, retain_graph=True
                )
        if not output.requires_grad:
            return torch.zeros_like

        def product(u: Tensor) -> Tensor:
            (found,) = torch.autograd.grad(output, point, u, retain_graph=True, materialize_grads=True)
            return found

        return lambda u: product(u[0])[None] if len(u) == 1 else torch.func.vmap(product)(u)


class OnceOnly(torch.autograd.Function):
    """The identity on u, an estimate that depends on `fz` and more, as its cotangent `g`: its own derivative raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(u: Tensor, fz: Tensor, g: Tensor | None = None) -> Tensor:
        return u.view_as(u)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> None:
        raise RuntimeError(REFUSAL)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> None:
        raise RuntimeError(REFUSAL)


class Inverse(torch.autograd.Function):
    """The linear map of an `Operator` at every level of torch.func, or the identity with its derivative.

    `index` (B,) is batched where the rows of the operator are: a dimension of vmap that it lacks holds right-hand sides
    of their own. `lead` tells which of the leading dimensions of `v` are such.
    """

    @staticmethod
    def forward(
        v: Tensor, index: Tensor, operator: Operator, transposed: bool, acts: bool, lead: tuple[bool, ...]
    ) -> Tensor:
        return Inverse._apply(v, operator, transposed, lead) if acts else v.clone()

    @staticmethod
    def _apply(v: Tensor, operator: Operator, transposed: bool, lead: tuple[bool, ...]) -> Tensor:
        n = len(lead)
        order = [i for i in range(n) if lead[i]] + [i for i in range(n) if not lead[i]] + [*range(n, v.dim())]
        ordered = v.permute(order)
        extra = sum(lead)
        copies = ordered.shape[:extra].numel()
        found = operator(ordered.reshape(copies, -1, v.shape[-1]), transposed=transposed)
        return found.reshape(ordered.shape).permute([order.index(i) for i in range(v.dim())])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        v, index, ctx.operator, ctx.transposed, ctx.acts, ctx.lead = inputs
        ctx.save_for_backward(v, index)
        ctx.save_for_forward(v, index)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and transforms.is_grads_batched(g):
            raise RuntimeError(BATCHED)
        return Inverse._derivative(ctx, g, not ctx.transposed), None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *nothing: None) -> Tensor:
        return Inverse._derivative(ctx, tangent, ctx.transposed)

    @staticmethod
    def _derivative(ctx: Any, v: Tensor, transposed: bool) -> Tensor:
        fz, index = ctx.saved_tensors
        if transforms.is_grads_batched(v):  # torch.autograd.functional, vectorized
            return transforms.on_batch(lambda v: Inverse._apply(v, ctx.operator, transposed, (True, *ctx.lead)), v)
        u = Inverse.apply(v, index, ctx.operator, transposed, True, ctx.lead)
        if transforms.are_active() and (ctx.acts or ctx.operator.is_exact):
            return u
        # once the transforms are over, autograd around them asks: then the Newton steps that follow are not there. u is
        # linear in v, by which a solve around this one differentiates it
        source = ctx.operator.fz if ctx.acts else fz
        return u - u.detach() + OnceOnly.apply(u.detach(), source)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], v: Tensor, index: Tensor, *settings: Any
    ) -> tuple[Tensor, int]:
        *kept, lead = settings
        dim, index_dim = in_dims[:2]
        v = v.expand(info.batch_size, *v.shape) if dim is None else v.movedim(dim, 0)
        index = index if index_dim is None else index.movedim(index_dim, 0)
        return Inverse.apply(v, index, *kept, (index_dim is None, *lead)), 0

"""Good Broyden's method in the form that stores only the steps it took.

B problems, D unknowns each, n stored steps. With g(z) = f(z) - z, the inverse Jacobian starts at -I and H = -(inverse):

    H_0 = I,    H_{j+1} = (I + s_{j+1} s_j^T / |s_j|^2) H_j,    s_j = z_{j+1} - z_j,    s_{j+1} = H_{j+1} g_{j+1}.

These are the iterates of Broyden's first ("good") update, with half the memory of the usual low-rank factors U, V:
the second vector of every rank-one term is the previous step itself. Kelley, *Iterative Methods for Linear and
Nonlinear Equations* (1995), section 7.3, derives the same form for the line-search-free method.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from phantom.runtime.host import is_cheap_to_read
from phantom.solver.base import Solver, compiled
from phantom.solver.ring import (
    Steps,
    at_next,
    at_previous,
    drop,
    fill_column,
    fill_row,
    pick,
    project,
    put,
    times,
    widened,
)
from phantom.validate import check_count, check_flag, check_triton

ROOM = 32  # steps for which a solve makes room at its start
# Outside these bounds of |1 - c| the secant factor carries rounding noise rather than curvature.
MOST, LEAST = 1e3, 1e-3


@dataclass(frozen=True, kw_only=True)
class Broyden(Solver):
    """Solve f(z) = z by good Broyden, full steps, no line search; the first step is z1 = f(z0).

    With a_j = <s_j, g> for the n stored steps, applying the factors to g in turn gives

        c_j = (a_j + sum_{l<j} <s_j, s_{l+1}> c_l) / |s_j|^2,  s = (g + sum_{l<n-1} c_l s_{l+1}) / (1 - c_{n-1}).

    c = C a is linear in a. C is lower triangular: a new step adds a row to it, and the oldest leaves with its row and
    column. A factor is dropped (its row of C is zero) where 1 - c is so large or small that it is noise.

    Cost: one evaluation of f and two passes over the stored steps a step. `memory` steps of D numbers per problem are
    kept (default: all of them); beyond that the oldest secant factor is dropped. Superlinear near a regular solution,
    and the solver of the paper's vision and language rows; a plain iteration is cheaper where f contracts well.

    With `kernels` the two passes are Triton kernels, for states on a GPU; `compile` fuses what is between them.

    Source: Broyden, *A class of methods for solving nonlinear simultaneous equations* (1965).
    """

    memory: int | None = None
    kernels: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag("kernels", self.kernels)
        if self.kernels:
            check_triton()
        check_count("memory", self.memory, least=1, optional=True)

    def start(self, z: Tensor, g: Tensor) -> Steps:
        if self.kernels:
            from phantom.solver import kernels

            kernels.check_state(z)
        batch, width = z.shape
        limit = min(self.memory or self.max_steps, self.max_steps)
        room = min(limit, ROOM)
        small = g.new_zeros((2, batch, room, room))
        masks = torch.eye(room, dtype=torch.bool, device=g.device) if self.compile else None
        reads = not self.compile and is_cheap_to_read(z)
        return Steps(g.new_empty((room, batch, width)), small[0], small[1], limit, masks, reads)

    def propose(self, memory: Steps, z: Tensor, g: Tensor) -> Tensor:
        secant, append, project, combine = self._arithmetic()
        memory.make_room()
        n, position = min(memory.count, memory.limit), memory.count % memory.limit
        full = n == memory.limit
        stored, step = memory.steps[:n], memory.steps[position]
        # once the ring is full, the place of the new step holds the oldest one, which is still needed
        step = torch.empty_like(step) if full else step
        width, wider = memory.width(n), memory.width(n if full else n + 1)
        if n == 0:
            weights = products = g.new_zeros((g.shape[0], wider))
            scale = g.new_ones((g.shape[0], 1))
        else:
            weights, scale, products = secant(
                *memory.small(width),
                widened(project(stored, g), width),
                memory.place((memory.count - 1) % memory.limit),
                memory.place(position % width),
                full,
                memory.reads,
            )
            products = widened(products, wider)
        z, square = combine(step, stored, weights, scale, z, g)
        if full:
            memory.steps[position] = step
        append(*memory.small(wider), products, square, memory.place(position), full, memory.reads)
        memory.count += 1
        return z

    def _arithmetic(self) -> tuple[Callable[..., Any], ...]:
        """Return what propose calls: secant, append, and the two passes over the stored steps, project and combine."""
        secant, append, move = (compiled(_secant), compiled(_append), compiled(_move)) if self.compile else PLAIN
        if self.kernels:
            from phantom.solver import kernels

            return secant, append, kernels.project, kernels.combine
        return secant, append, project, partial(_combine, move)


def _secant(
    gram: Tensor,
    coefficients: Tensor,
    a: Tensor,
    newest: int | Tensor,
    here: int | Tensor,
    full: bool,
    reads: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weights (B, n) of the stored steps in s, 1 - c (B, 1), and <s_j, s> (B, n); drop a noisy row of C.

    Args:
        newest, here: the position of the newest step, and of the one to come.
    """
    # a problem without a finite answer takes the plain step
    c = times(coefficients, a).nan_to_num(0.0, 0.0, 0.0)
    scale = torch.rsub(pick(c, newest), 1)  # 1 - c, without the detour of an operator between a number and a tensor
    noise = _noise(scale, reads)
    if noise is not None:
        drop(coefficients, newest, noise)
        scale = scale.masked_fill(noise, 1.0)
    scale = scale.unsqueeze(1)
    weights = at_previous(c, newest, here, full) / scale
    return weights, scale, a / scale + times(gram, weights)


def _noise(scale: Tensor, reads: bool) -> Tensor | None:
    """Return for which problems (B,) the factor 1 - c is noise; None where the host sees that it is for none."""
    if reads:  # costs less than the operators
        noise = [not LEAST < abs(number) < MOST for number in scale.tolist()]
        return torch.tensor(noise, device=scale.device) if any(noise) else None
    size = scale.abs()
    return (size >= MOST) | (size <= LEAST)


def _move(z: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Return z + s (B, D) and |s|^2 (B,)."""
    return z + step, torch.linalg.vector_norm(step, dim=1).square()


def _combine(
    move: Callable[..., Any], step: Tensor, stored: Tensor, weights: Tensor, scale: Tensor, z: Tensor, g: Tensor
) -> tuple[Tensor, Tensor]:
    """Write s = g / scale + sum_j w_j s_j into `step` (B, D); return z + s (B, D) and |s|^2 (B,) by `move`.

    Args:
        stored: (n, B, D) steps s_j; `step` is none of them.
        weights: (B, >= n) of which the first n count.
        scale: (B, 1).
    """
    torch.div(g, scale, out=step)
    if len(stored):
        step.unsqueeze(1).baddbmm_(weights[:, : len(stored)].unsqueeze(1), stored.transpose(0, 1))
    return move(z, step)


def _append(
    gram: Tensor,
    coefficients: Tensor,
    products: Tensor,
    square: Tensor,
    here: int | Tensor,
    full: bool,
    reads: bool,
) -> None:
    """Extend the small matrices by a step with these inner products (B, n) and squared length (B,)."""
    products = put(products, here, square)
    fill_row(gram, here, products)
    fill_column(gram, here, products)
    if full:  # the oldest step leaves
        zero = torch.zeros_like(products)
        fill_row(coefficients, here, zero)
        fill_column(coefficients, here, zero)
    # a step of length zero, as of a problem held where it converged, tells nothing: its row is zero
    least, inverse = torch.finfo(square.dtype).tiny, square.reciprocal()
    if not reads or not all(number > least for number in square.tolist()):
        inverse = torch.where(square > least, inverse, 0.0)
    new = times(coefficients.mT, at_next(products, here, full))
    fill_row(coefficients, here, put(new, here, 1.0) * inverse.unsqueeze(1))


PLAIN = (_secant, _append, _move)

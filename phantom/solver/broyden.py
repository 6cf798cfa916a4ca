"""Good Broyden's method in the form that stores only the steps it took.

B problems, D unknowns each, n stored steps. With g(z) = f(z) - z, the inverse Jacobian starts at -I and H = -(inverse):

    H_0 = I,    H_{j+1} = (I + s_{j+1} s_j^T / |s_j|^2) H_j,    s_j = z_{j+1} - z_j,    s_{j+1} = H_{j+1} g_{j+1}.

These are the iterates of Broyden's first ("good") update, with half the memory of the usual low-rank factors U, V:
the second vector of every rank-one term is the previous step itself. Kelley, *Iterative Methods for Linear and
Nonlinear Equations* (1995), section 7.3, derives the same form for the line-search-free method.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from phantom.solver.base import Solver, check_count

# Outside these bounds of |1 - c| the secant factor carries rounding noise rather than curvature.
MOST, LEAST = 1e3, 1e-3


@dataclass
class Steps:
    """The last `memory` steps of a solve in a ring, and the small matrices that make the next one.

    Everything is in ring order: position i mod memory holds step i. Positions not used yet hold zeros.

    Args:
        steps: (memory, B, D), step axis first, so that appending is one contiguous write.
        gram: (B, memory, memory) inner products of the stored steps.
        coefficients: (B, memory, memory) the matrix C of `Broyden`.
        products: (B, memory) a, the inner products of the stored steps with g.
        count: steps taken so far, those no longer stored included.
    """

    steps: Tensor
    gram: Tensor
    coefficients: Tensor
    products: Tensor
    count: int = 0


@dataclass(frozen=True, kw_only=True)
class Broyden(Solver):
    """Solve f(z) = z by good Broyden, full steps, no line search; the first step is z1 = f(z0).

    With a_j = <s_j, g> for the n stored steps, applying the factors to g in turn gives

        c_j = (a_j + sum_{l<j} <s_j, s_{l+1}> c_l) / |s_j|^2,  w = g + sum_{l<n-1} c_l s_{l+1},  s = w / (1 - c_{n-1}).

    c = C a is linear in a. C is lower triangular: a new step adds a row to it, and the oldest leaves with its row and
    column. A factor is dropped (its row of C is zero) where 1 - c is so large or small that it is noise.

    Cost: one evaluation of f and two passes over the stored steps a step. `memory` steps of D numbers per problem are
    kept (default: all of them); beyond that the oldest secant factor is dropped. Superlinear near a regular solution,
    and the solver of the paper's vision and language rows; a plain iteration is cheaper where f contracts well.

    Source: Broyden, *A class of methods for solving nonlinear simultaneous equations* (1965).
    """

    memory: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.memory is not None:
            check_count("memory", self.memory, least=1)

    def start(self, z: Tensor, g: Tensor) -> Steps:
        batch, width = z.shape
        size = min(self.memory or self.max_steps, self.max_steps)
        return Steps(
            steps=g.new_empty((size, batch, width)),
            gram=g.new_zeros((batch, size, size)),
            coefficients=g.new_zeros((batch, size, size)),
            products=g.new_zeros((batch, size)),
        )

    def propose(self, memory: Steps, z: Tensor, g: Tensor) -> Tensor:
        size = memory.steps.shape[0]
        n, newest, position = min(memory.count, size), (memory.count - 1) % size, memory.count % size
        step = memory.steps[position]
        if n == 0:
            step.copy_(g)
            products = memory.products
        else:
            stored = memory.steps[:n]
            # a row vector times (D, n): several times faster in BLAS than the column form
            memory.products[:, :n] = torch.bmm(g[:, None, :], stored.permute(1, 2, 0))[:, 0]
            weights, scale, products = _secant(memory, newest, position)
            w = torch.baddbmm(g[:, None, :], weights[:, None, :n], stored.transpose(0, 1))[:, 0]
            torch.div(w, scale, out=step)
        _append(memory, products, torch.linalg.vector_norm(step, dim=1).square(), position)
        memory.count += 1
        return z + step


def _secant(memory: Steps, newest: int, position: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weights (B, memory) of the stored steps in w, 1 - c (B, 1), and the stored steps' products with s."""
    # a problem without a finite answer takes the plain step
    c = _times(memory.coefficients, memory.products).nan_to_num(0.0, 0.0, 0.0)
    scale = 1 - c[:, newest, None]
    size = scale.abs()
    sound = (size < MOST) & (size > LEAST)
    memory.coefficients[:, newest].masked_fill_(~sound, 0)
    scale = torch.where(sound, scale, 1.0)
    # c_l weighs the step after l; the one after the newest is not there yet
    weights = c.roll(1, 1)
    weights[:, position].zero_()
    return weights, scale, (memory.products + _times(memory.gram, weights)) / scale


def _append(memory: Steps, products: Tensor, square: Tensor, position: int) -> None:
    """Extend the small matrices by a step with these `products` (B, memory) and this squared length (B,)."""
    memory.gram[:, position] = products
    memory.gram[:, :, position] = products
    memory.gram[:, position, position] = square
    memory.coefficients[:, :, position].zero_()
    # a step of length zero, as of a problem held where it converged, tells nothing: its row is zero
    inverse = torch.where(square > torch.finfo(square.dtype).tiny, 1 / square, 0.0)[:, None]
    next_products = memory.gram[:, position].roll(-1, 1)
    next_products[:, position].zero_()
    row = _times(memory.coefficients.mT, next_products)
    row[:, position].fill_(1)
    memory.coefficients[:, position] = row * inverse


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return torch.bmm(matrix, vector[:, :, None])[:, :, 0]

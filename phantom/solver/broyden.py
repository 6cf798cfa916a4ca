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

from phantom.solver.base import Solver, compiled
from phantom.validate import check_count

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
        positions: (memory, memory) row i is True at i alone.
        count: steps taken so far, those no longer stored included.
    """

    steps: Tensor
    gram: Tensor
    coefficients: Tensor
    products: Tensor
    positions: Tensor
    count: int = 0

    def apply_inverse_transposed(self, v: Tensor) -> Tensor:
        """Return H^T v (B, D) for `v` (B, D), H the estimate of (I - J)^{-1} that the stored steps make.

        H v = v + sum_l (C S v)_l s_{l+1}, so H^T v = v + sum_j (C^T b)_j s_j with b_l = <s_{l+1}, v>.
        """
        size = self.steps.shape[0]
        n, newest = min(self.count, size), self.positions[(self.count - 1) % size]
        stored = self.steps[:n]
        products = torch.zeros_like(self.products)
        products[:, :n] = _project(stored, v)
        weights = _times(self.coefficients.mT, products.roll(-1, 1).masked_fill(newest, 0))
        return torch.baddbmm(v[:, None, :], weights[:, None, :n], stored.transpose(0, 1))[:, 0]


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
            positions=torch.eye(size, dtype=torch.bool, device=g.device),
        )

    def propose(self, memory: Steps, z: Tensor, g: Tensor) -> Tensor:
        secant, append, move = (compiled(_secant), compiled(_append), compiled(_move)) if self.compile else PLAIN
        size = memory.steps.shape[0]
        n, position = min(memory.count, size), memory.count % size
        here, products = memory.positions[position], memory.products
        # once the ring is full, the place of the new step holds the oldest one, which is still needed
        step = memory.steps[position] if n < size else torch.empty_like(g)
        if n == 0:
            step.copy_(g)
        else:
            stored, newest = memory.steps[:n], memory.positions[position - 1]
            memory.products[:, :n] = _project(stored, g)
            weights, scale, products, memory.coefficients = secant(
                memory.gram, memory.coefficients, memory.products, newest, here
            )
            torch.div(g, scale[:, None], out=step)
            step[:, None, :].baddbmm_(weights[:, None, :n], stored.transpose(0, 1))
        if n == size:
            memory.steps[position] = step
        z, square = move(z, step)
        memory.gram, memory.coefficients = append(memory.gram, memory.coefficients, products, square, here)
        memory.count += 1
        return z


def _secant(
    gram: Tensor, coefficients: Tensor, a: Tensor, newest: Tensor, here: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the weights (B, memory) of the stored steps in s, 1 - c (B,), <s_j, s> (B, memory), and C.

    Args:
        newest, here: (memory,) True at the position of the newest step, and of the one to come.
    """
    # a problem without a finite answer takes the plain step
    c = _times(coefficients, a).nan_to_num(0.0, 0.0, 0.0)
    scale = 1 - (c * newest).sum(1)
    size = scale.abs()
    sound = (size < MOST) & (size > LEAST)
    coefficients = coefficients.masked_fill(newest[:, None] & ~sound[:, None, None], 0)
    scale = torch.where(sound, scale, 1.0)
    # c_l weighs the step after l; the one after the newest is not there yet
    weights = c.roll(1, 1).masked_fill(here, 0) / scale[:, None]
    return weights, scale, a / scale[:, None] + _times(gram, weights), coefficients


def _move(z: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Return z + s (B, D) and |s|^2 (B,)."""
    return z + step, torch.linalg.vector_norm(step, dim=1).square()


def _append(
    gram: Tensor, coefficients: Tensor, products: Tensor, square: Tensor, here: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the small matrices extended by a step with these inner products (B, memory) and squared length (B,)."""
    row, column = here[:, None], here[None, :]
    products = torch.where(here, square[:, None], products)
    gram = torch.where(column, products[:, :, None], torch.where(row, products[:, None, :], gram))
    # a step of length zero, as of a problem held where it converged, tells nothing: its row is zero
    inverse = torch.where(square > torch.finfo(square.dtype).tiny, 1 / square, 0.0)
    coefficients = coefficients.masked_fill(row | column, 0)
    new = _times(coefficients.mT, products.roll(-1, 1).masked_fill(here, 0))
    new = torch.where(here, 1.0, new) * inverse[:, None]
    return gram, torch.where(row, new[:, None, :], coefficients)


def _project(stored: Tensor, v: Tensor) -> Tensor:
    """Return <s_j, v> (B, n): a row vector times (D, n), several times faster in BLAS than the column form."""
    return torch.bmm(v[:, None, :], stored.permute(1, 2, 0))[:, 0]


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix * vector[:, None, :]).sum(2)


PLAIN = (_secant, _append, _move)

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
    """The last n steps of a solve, kept in a ring: position i mod memory holds step i.

    Args:
        steps: (memory, B, D), step axis first, so that appending is one contiguous copy.
        gram: (B, memory, memory) inner products of the stored steps.
        usable: (B, memory) False where the factor that starts at a step was dropped by the guard.
        count: steps taken so far, those no longer stored included.
    """

    steps: Tensor
    gram: Tensor
    usable: Tensor
    count: int = 0

    @property
    def oldest(self) -> int:
        """Ring position of the oldest stored step."""
        size = self.steps.shape[0]
        return self.count % size if self.count > size else 0

    def append(self, step: Tensor, products: Tensor | None) -> None:
        """Store `step` (B, D); `products` (B, n) are its inner products with the stored steps, in ring order."""
        position = self.count % self.steps.shape[0]
        if products is not None:
            n = products.shape[1]
            self.gram[:, position, :n] = products
            self.gram[:, :n, position] = products
        self.steps[position] = step
        self.gram[:, position, position] = torch.linalg.vecdot(step, step)
        self.usable[:, position].fill_(True)  # an assignment would upload the value from the host
        self.count += 1


@dataclass(frozen=True, kw_only=True)
class Broyden(Solver):
    """Solve f(z) = z by good Broyden, full steps, no line search; the first step is z1 = f(z0).

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
            usable=torch.zeros((batch, size), dtype=torch.bool, device=g.device),
        )

    def propose(self, memory: Steps, z: Tensor, g: Tensor) -> Tensor:
        if memory.count == 0:
            memory.append(g, None)
            return z + g
        size, first = memory.steps.shape[0], memory.oldest
        n, newest = min(memory.count, size), (memory.count - 1) % size
        stored = memory.steps[:n]
        # the small arrays are turned to oldest first; a roll, since indexing by a list copies it to the device
        gram = _roll(memory.gram[:, :n, :n], -first, 1, 2)
        usable = _roll(memory.usable[:, :n], -first, 1)
        a = _roll(_products(stored, g), -first, 1)
        c = _coefficients(gram, usable, a)
        # w = H_n g without its last factor: g + sum over l of c_l s_{l+1}
        weights = torch.cat((torch.zeros_like(c[:, :1]), c[:, :-1]), dim=1)
        w = g + _combine(stored, _roll(weights, first, 1))
        scale = 1 - c[:, -1]
        sound = (scale.abs() < MOST) & (scale.abs() > LEAST) & usable[:, -1]
        memory.usable[:, newest] = sound
        scale = torch.where(sound, scale, 1.0)[:, None]
        step = w / scale
        products = (a + torch.linalg.vecdot(gram, weights[:, None, :])) / scale
        memory.append(step, _roll(products, first, 1))
        return z + step


def _coefficients(gram: Tensor, usable: Tensor, a: Tensor) -> Tensor:
    """Return c (B, n) with c_j |s_j|^2 - sum_{l<j} <s_j, s_{l+1}> c_l = a_j; c_j = 0 for dropped factors.

    Problems for which no finite answer exists get c = 0, which makes the next step the plain one.
    """
    squares = gram.diagonal(dim1=1, dim2=2)
    live = usable & (squares > torch.finfo(a.dtype).tiny)
    inverse = torch.where(live, 1 / squares, 0.0)
    # entry (j, l) of the unit lower-triangular system is -<s_j, s_{l+1}> / |s_j|^2; the solver reads l < j only
    lower = torch.nn.functional.pad(gram[:, :, 1:], (0, 1)) * -inverse[:, :, None]
    c = torch.linalg.solve_triangular(lower, (a * inverse)[:, :, None], upper=False, unitriangular=True)[:, :, 0]
    return torch.where(c.isfinite().all(dim=1, keepdim=True), c, 0.0)


def _products(stored: Tensor, g: Tensor) -> Tensor:
    """Return <s_j, g> (B, n): a row vector times (D, n), several times faster in BLAS than the column form."""
    return torch.bmm(g[:, None, :], stored.permute(1, 2, 0))[:, 0, :]


def _combine(stored: Tensor, weights: Tensor) -> Tensor:
    """Return sum over j of weights_j s_j, (B, D)."""
    return torch.bmm(weights[:, None, :], stored.transpose(0, 1))[:, 0, :]


def _roll(x: Tensor, shift: int, *dims: int) -> Tensor:
    return x.roll((shift,) * len(dims), dims) if shift else x

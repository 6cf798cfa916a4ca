"""Fixed-point problems that carry their exact solution: float64, fixed seeds, several problems of unlike difficulty."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from phantom import DEQ

DTYPE = torch.float64


def randn(*shape: int, seed: int) -> Tensor:
    """Return standard normal numbers that depend on `seed` alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


@dataclass(frozen=True)
class Problem:
    """B independent fixed-point problems.

    Args:
        bind: bind(rows) gives the closed map of the problems listed in `rows`.
        z0: (B, D) initial guess.
        z_star: (B, D) exact solution.
    """

    name: str
    bind: Callable[[list[int]], Callable[[Tensor], Tensor]]
    z0: Tensor
    z_star: Tensor

    @property
    def f(self) -> Callable[[Tensor], Tensor]:
        return self.bind(list(range(len(self.z0))))


def affine(name: str, jacobian: Tensor, *, seed: int) -> Problem:
    """f(z) = J z + b with a chosen z_star; `jacobian` (B, D, D)."""
    z_star = randn(*jacobian.shape[:2], seed=seed)
    b = z_star - torch.einsum("bij,bj->bi", jacobian, z_star)

    def bind(rows: list[int]):
        return lambda z: torch.einsum("bij,bj->bi", jacobian[rows], z) + b[rows]

    return Problem(name, bind, torch.zeros_like(z_star), z_star)


def symmetric(eigenvalues: Tensor, *, seed: int) -> Tensor:
    """Return symmetric matrices (B, D, D) with the given eigenvalues (B, D)."""
    q, _ = torch.linalg.qr(randn(*eigenvalues.shape, eigenvalues.shape[1], seed=seed))
    return q @ torch.diag_embed(eigenvalues) @ q.mT


def with_radius(radius: float, *shape: int, seed: int) -> Tensor:
    """Return random non-symmetric matrices (..., D, D) with the given spectral radius."""
    matrix = randn(*shape, shape[-1], seed=seed)
    return matrix * (radius / torch.linalg.eigvals(matrix).abs().amax(dim=-1))[..., None, None]


def rotation(angle: float, scale: float) -> Tensor:
    """Return `scale` times the rotation of the plane by `angle`."""
    turn = torch.tensor([angle], dtype=DTYPE)
    c, s = torch.cos(turn), torch.sin(turn)
    return scale * torch.stack((torch.cat((c, -s)), torch.cat((s, c))))


def linear_symmetric() -> Problem:
    spread = torch.linspace(-1, 1, 12, dtype=DTYPE)
    radii = torch.tensor([0.3, 0.7, 0.9], dtype=DTYPE)
    return affine("linear_symmetric", symmetric(radii[:, None] * spread, seed=1), seed=2)


def linear_nonsymmetric() -> Problem:
    matrices = torch.stack([with_radius(radius, 12, seed=seed) for seed, radius in ((3, 0.3), (4, 0.6), (5, 0.85))])
    return affine("linear_nonsymmetric", matrices, seed=6)


def rotations() -> Problem:
    """Complex eigenvalues: norms shrink by the scale, while the Rayleigh quotient of a quarter turn is zero."""
    turns = [torch.block_diag(rotation(a, r), rotation(2 * a, r / 2)) for a, r in ((0.7, 0.5), (torch.pi / 2, 0.9))]
    return affine("rotations", torch.stack(turns), seed=7)


def tanh_contraction() -> Problem:
    """f(z) = tanh(W z + x), where x is chosen so that z_star is known."""
    weight = torch.stack([with_radius(radius, 10, seed=seed) for seed, radius in ((8, 0.4), (9, 0.8), (10, 1.0))])
    z_star = randn(3, 10, seed=11).clamp(-1.2, 1.2) / 2
    x = torch.atanh(z_star) - torch.einsum("bij,bj->bi", weight, z_star)

    def bind(rows: list[int]):
        return lambda z: torch.tanh(torch.einsum("bij,bj->bi", weight[rows], z) + x[rows])

    return Problem("tanh_contraction", bind, torch.zeros_like(z_star), z_star)


def stiff() -> Problem:
    """1 - J has eigenvalues over two decades: a plain iteration needs thousands of steps."""
    rates = torch.logspace(-2, 0, 8, dtype=DTYPE)
    return affine("stiff", symmetric(torch.stack((1 - rates, 1 - rates.flip(0) ** 0.5)), seed=12), seed=13)


def plateau() -> Problem:
    """f(z) = z + clip(b - z, -1, 1): far from b the residual does not change, and the secant equation is singular."""
    b = torch.tensor([[5.5], [0.25], [-3.0]], dtype=DTYPE)

    def bind(rows: list[int]):
        return lambda z: z + (b[rows] - z).clamp(-1, 1)

    return Problem("plateau", bind, torch.zeros_like(b), b)


def collapse() -> Problem:
    """A tiny residual that jumps once it is followed: the secant step is the last one over 5e4, and collapses."""
    b = torch.tensor([[5.0], [4.0]], dtype=DTYPE)

    def bind(rows: list[int]):
        return lambda z: torch.where(z < 5e-5, z + 1e-4, b[rows])

    return Problem("collapse", bind, torch.zeros_like(b), b)


SOLVABLE = (linear_symmetric, linear_nonsymmetric, rotations, tanh_contraction, stiff)


class TanhMap(nn.Module):
    """The parametrised map of the estimator tests: f(z) = tanh(W z + b) + x, so that df/dx is the identity."""

    def __init__(self, dim: int, *, radius: float = 0.8, seed: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(with_radius(radius, dim, seed=seed))
        self.bias = nn.Parameter(0.1 * randn(dim, seed=seed + 1))

    def bind(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        weight, bias = self.weight, self.bias
        return lambda z: torch.tanh(z @ weight.mT + bias) + x


class Regression(nn.Module):
    """A synthetic implicit model: encode x, find the equilibrium, return it with its solution."""

    def __init__(self, deq: DEQ, *, dim: int = 6, seed: int = 0) -> None:
        super().__init__()
        self.deq = deq
        self.encoder = nn.Linear(3, dim, dtype=DTYPE)
        self.cell = TanhMap(dim, seed=seed)
        with torch.no_grad():
            self.encoder.weight.copy_(randn(dim, 3, seed=seed + 2))
            self.encoder.bias.copy_(randn(dim, seed=seed + 3))

    def forward(self, x: Tensor) -> Tensor:
        injection = self.encoder(x)
        return self.deq(self.cell.bind(injection), torch.zeros_like(injection)).value

"""Pure functions that measure a map and a gradient estimate; nothing here runs inside a forward pass.

J = df/dz with outputs as rows. The damped map of the phantom gradients has B = lam J + (1 - lam) I.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from phantom.gradient.linear import vjp
from phantom.state import FlatMap, Map, Packing, State
from phantom.validate import check_count


def ritz_values(f: Map, z: State, *, num_steps: int = 40, seed: int = 0) -> Tensor:
    """Return approximations to the outer eigenvalues of J at `z`, per problem, as complex (B, num_steps).

    Arnoldi on J^T, which has the spectrum of J, with `num_steps` vjps. Right for a non-symmetric J and for complex
    pairs, where a Rayleigh quotient is not. Exact for num_steps >= D.

    Source: Arnoldi, *The principle of minimized iterations* (1951).
    """
    check_count("num_steps", num_steps, least=1)
    product, z = _linearise(f, z)
    batch, width = z.shape
    steps = min(num_steps, width)
    generator = torch.Generator(device="cpu").manual_seed(seed)

    def draw() -> Tensor:
        return torch.randn(batch, width, generator=generator, dtype=z.dtype, device="cpu").to(z.device)

    basis = _unit(draw())[None]
    hessenberg = z.new_zeros(batch, steps, steps)
    for j in range(steps):
        w, products = _orthogonalise(product(basis[j]), basis)
        hessenberg[:, : j + 1, j] = products
        if j + 1 == steps:
            break
        length = torch.linalg.vector_norm(w, dim=1, keepdim=True)
        # a vanished remainder means an invariant subspace: go on from a direction outside of it
        alive = length > 100 * torch.finfo(z.dtype).eps * hessenberg.abs().amax(dim=(1, 2))[:, None]
        hessenberg[:, j + 1, j] = torch.where(alive, length, 0.0)[:, 0]
        if not bool(alive.all()):
            w = torch.where(alive, w, _orthogonalise(draw(), basis)[0])
        basis = torch.cat([basis, _unit(w)[None]])
    return torch.linalg.eigvals(hessenberg)


def _unit(w: Tensor) -> Tensor:
    """Return `w` (B, D) with rows of length one, however short: torch's `normalize` divides by 1e-12 at least."""
    return w / torch.linalg.vector_norm(w, dim=1, keepdim=True)


def _orthogonalise(w: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Return `w` (B, D) without its components along `basis` (n, B, D), and those components (B, n)."""
    total = w.new_zeros(basis.shape[1], basis.shape[0])
    for _ in range(2):  # a second pass of Gram-Schmidt restores orthogonality lost to rounding
        products = torch.einsum("nbd,bd->bn", basis, w)
        w = w - torch.einsum("bn,nbd->bd", products, basis)
        total = total + products
    return w, total


def spectral_radius(f: Map, z: State, *, lam: float = 1.0, num_steps: int = 40, seed: int = 0) -> Tensor:
    """Return the spectral radius of lam J + (1 - lam) I at `z`, per problem, as (B,), by `ritz_values`."""
    return damped_radius(ritz_values(f, z, num_steps=num_steps, seed=seed), lam)


def damped_radius(eigenvalues: Tensor, lam: float) -> Tensor:
    """Return max |lam mu + 1 - lam| over the eigenvalues mu of J (B, n), as (B,)."""
    radii = (lam * eigenvalues + (1 - lam)).abs()
    return radii.amax(dim=-1) if radii.shape[-1] else radii.new_zeros(radii.shape[:-1])


def best_damping(eigenvalues: Tensor) -> float:
    """Return the lam in {0.01, ..., 1} with the smallest mean radius of lam J + (1 - lam) I over the problems.

    That radius is the rate at which NPG and UPG tend to the exact gradient in k; where it exceeds one, more terms do
    harm. `eigenvalues` (B, n) are those of J, as from `ritz_values`.
    """
    return min((i / 100 for i in range(1, 101)), key=lambda lam: damped_radius(eigenvalues, lam).mean().item())


def dense_jacobian(f: Map, z: State) -> Tensor:
    """Return J (B, D, D) at `z`, one vjp per row: for small D."""
    product, z = _linearise(f, z)
    rows = [product(unit.expand_as(z)) for unit in torch.eye(z.shape[1], dtype=z.dtype, device=z.device)]
    return torch.stack(rows, dim=1) if rows else z.new_zeros(len(z), 0, 0)


def exact_adjoint(jacobian: Tensor, g: Tensor) -> Tensor:
    """Return u (B, D) with (I - J^T) u = g by a dense solve; `jacobian` (B, D, D), `g` (B, D)."""
    eye = torch.eye(jacobian.shape[-1], dtype=jacobian.dtype, device=jacobian.device)
    return torch.linalg.solve(eye - jacobian.mT, g)


def neumann_matrix(jacobian: Tensor, *, k: int, lam: float) -> Tensor:
    """Return lam (I + B + ... + B^{k-1}) (D, D), the phantom stand-in for (I - J)^{-1}: Eq. (17), Geng et al. 2021."""
    eye = torch.eye(jacobian.shape[-1], dtype=jacobian.dtype, device=jacobian.device)
    damped = lam * jacobian + (1 - lam) * eye
    total, power = eye, eye
    for _ in range(k - 1):
        power = power @ damped
        total = total + power
    return lam * total


def ascent_margin(a: Tensor, jacobian: Tensor, theta_jacobian: Tensor) -> Tensor:
    """Return sigma_min^2 / sigma_max - |(I - J) A - dF/dtheta|; positive means Theorem 1 of Geng et al. 2021 applies.

    Eq. (6) in the convention of rows as outputs: `a` (D, P) stands for dz_star/dtheta, `theta_jacobian` (D, P) is
    dF/dtheta, `jacobian` (D, D). sigma_min is the D-th singular value of dF/dtheta, so 0 if P < D. Where the margin is
    positive, the phantom gradient a^T g and the exact gradient have a positive inner product for every g != 0.
    """
    width, parameters = theta_jacobian.shape
    singular = torch.linalg.svdvals(theta_jacobian)
    least = singular[width - 1] if parameters >= width else singular.new_zeros(())
    eye = torch.eye(width, dtype=jacobian.dtype, device=jacobian.device)
    error = torch.linalg.matrix_norm((eye - jacobian) @ a - theta_jacobian, ord=2)
    return least.square() / singular[0] - error


def conditioning(a: Tensor) -> Tensor:
    """Return the condition number of the phantom matrix `a`, the ratio of its extreme singular values."""
    return torch.linalg.cond(a)


def cosine(estimate: Sequence[Tensor | None], exact: Sequence[Tensor | None]) -> Tensor:
    """Return the cosine between two gradients, each a sequence of tensors taken as one vector.

    None stands for zeros: it is what torch.autograd.grad returns of an unused input.
    """
    dot, left, right = _inner_products(estimate, exact)
    return dot / (left.sqrt() * right.sqrt())


def norm_ratio(estimate: Sequence[Tensor | None], exact: Sequence[Tensor | None]) -> Tensor:
    """Return |estimate| / |exact|, each a sequence of tensors taken as one vector; see `cosine` for None."""
    _, left, right = _inner_products(estimate, exact)
    return (left / right).sqrt()


def _inner_products(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> tuple[Tensor, Tensor, Tensor]:
    if len(a) != len(b):
        raise ValueError(f"the gradients must have the same tensors, got {len(a)} and {len(b)}")
    pairs = []
    for x, y in zip(a, b, strict=True):
        known = x if x is not None else y
        if known is not None:
            pairs.append([(torch.zeros_like(known) if v is None else v).double().flatten() for v in (x, y)])
    zero = torch.zeros((), dtype=torch.float64, device="cpu")  # whatever the default device is
    return (
        sum((torch.dot(x, y) for x, y in pairs), start=zero),
        sum((torch.dot(x, x) for x, _ in pairs), start=zero),
        sum((torch.dot(y, y) for _, y in pairs), start=zero),
    )


def _linearise(f: Map, z: State) -> tuple[FlatMap, Tensor]:
    """Return u -> J^T u on (B, D) tensors, and the packed detached z."""
    packing = Packing(z)
    flat_f = packing.wrap(f)
    with torch.enable_grad():
        z = packing.pack(z).detach().requires_grad_()
        fz = flat_f(z.clone())  # f may write to its argument
    return lambda u: vjp(fz, z, u), z.detach()

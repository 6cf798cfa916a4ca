"""Run Broyden's kernels in Triton's interpreter, which needs no GPU, and print their errors.

Triton reads TRITON_INTERPRET=1 as it decorates a kernel: the test gives it to a process of its own.
"""

import json
import sys

import torch
from torch import Tensor

from phantom import Broyden
from phantom.solve import solve
from phantom.solver import broyden, kernels, ring
from tests.phantom.problems import linear_nonsymmetric, plateau, randn, tanh_contraction

# B, D, n, and the room of the steps; D in part of a block, one whole block, and several with a rest
PASSES = [
    *[(3, 37, n, 32) for n in (0, 1, 7, 31, 32)],
    *[(1, 1, 1, 1), (2, 1, 3, 4), (1, 2047, 2, 32), (2, 2048, 3, 8), (4, 2049, 5, 32), (2, 6151, 33, 64)],
    *[(0, 5, 2, 8), (2, 0, 2, 8)],
]
SOLVES = {
    "linear": (linear_nonsymmetric, {"max_steps": 80}),
    "tanh": (tanh_contraction, {"max_steps": 80}),
    "singular secant": (plateau, {"max_steps": 20}),
    "ring": (linear_nonsymmetric, {"max_steps": 200, "memory": 5}),
    "ring of one": (tanh_contraction, {"max_steps": 200, "memory": 1}),
    "compiled ring": (tanh_contraction, {"max_steps": 200, "memory": 5, "compile": True}),
}


def relative(value: Tensor, exact: Tensor) -> float:
    """Return |value - exact| / |exact|, or |value - exact| where that is zero."""
    return ((value.double() - exact).norm() / (exact.norm() if exact.any() else 1)).item()


def errors_of_the_passes(batch, width, n, room, *, dtype=torch.float32, device="cpu", num_warps=4):
    """Return the relative errors of the plain passes and of the kernels: <s_j, g>, s, z + s, |s|^2."""
    # what is beyond the n steps is not read; g and z need not be contiguous
    steps = torch.full((room, batch, width), torch.nan, dtype=dtype, device=device)
    steps[:n] = randn(n, batch, width, seed=1)
    g = randn(width, batch, seed=2).to(device, dtype).T
    z = randn(1, width, seed=3).to(device, dtype).expand(batch, width)
    weights = randn(batch, room, seed=4).to(device, dtype)
    scale = 0.5 + randn(batch, 1, seed=5).to(device, dtype).abs()
    wide_steps, wide_g, wide_scale = steps[:n].double(), g.double(), scale.double()
    s = wide_g / wide_scale + (wide_steps * weights[:, :n].T[:, :, None].double()).sum(0)
    exact = [(wide_steps * wide_g).sum(2).T, s, z.double() + s, s.square().sum(1)]
    step, found = torch.empty((batch, width), dtype=dtype, device=device), []
    plain = ring.project(steps[:n], g), *broyden._combine(broyden._move, step, steps[:n], weights, scale, z, g)
    found.append([relative(a, e) for a, e in zip((plain[0], step, *plain[1:]), exact, strict=True)])
    step.fill_(torch.nan)
    own = kernels.combine(step, steps[:n], weights, scale, z, g, num_warps=num_warps)
    products = kernels.project(steps[:n], g, num_warps=num_warps)
    found.append([relative(a, e) for a, e in zip((products, step, *own), exact, strict=True)])
    return found


def errors_of_a_solve(make, settings):
    """Return the largest error of a solve in float64, without and with kernels, and the steps of both."""
    problem, found = make(), []
    for own in (False, True):
        z, stats, memory = solve(problem.f, problem.z0, Broyden(**settings, tol=1e-11, kernels=own))
        steps = memory.steps[: min(memory.count, memory.limit)]
        gram = torch.einsum("nbd,mbd->bnm", steps, steps)
        # sums of the recursion, which loses digits of the products of small steps
        torch.testing.assert_close(memory.gram[:, : len(steps), : len(steps)], gram, rtol=1e-6, atol=1e-10)
        found.append([(z - problem.z_star).abs().max().item(), stats.num_steps.tolist()])
    return found


def growth():
    """Return the relative distance of the iterates with kernels from those without, where the room grows."""
    problem, found = tanh_contraction(), []
    for own in (False, True):
        seen = []

        def f(z, seen=seen):
            seen.append(z.clone())
            return problem.f(z) + 1e-3 * torch.sin(50 * z)  # never at rest

        _, _, memory = solve(f, problem.z0, Broyden(max_steps=36, tol=None, kernels=own))
        assert len(memory.steps) == 36 > broyden.ROOM
        found.append(torch.stack(seen))
    return relative(found[1], found[0])


def in_single_precision():
    """Return the errors of a float32 solve, without and with kernels, of more numbers than a program holds."""
    weight, x = randn(2100, 3, seed=6), randn(4, 2100, seed=7)
    weight = weight / torch.linalg.matrix_norm(weight, 2)

    def map_in(dtype):
        w, own = weight.to(dtype), x.to(dtype)
        return lambda z: 0.9 * torch.tanh(z @ w) @ w.T + own

    z0 = torch.zeros_like(x)
    exact, stats, _ = solve(map_in(torch.float64), z0, Broyden(max_steps=60, tol=1e-13))
    assert stats.converged.all()
    settings = {"max_steps": 30, "tol": 1e-6}
    solved = [solve(map_in(torch.float32), z0.float(), Broyden(**settings, kernels=own)) for own in (False, True)]
    return [relative(z, exact) for z, _, _ in solved]


def rows_are_alone():
    """Return whether a row has the same bits beside NaN and infinities."""
    steps, g, z = randn(4, 3, 2100, seed=8), randn(3, 2100, seed=9), randn(3, 2100, seed=10)
    weights, scale = randn(3, 4, seed=11), 1 + randn(3, 1, seed=12).abs()

    def passes(*state):
        step = torch.empty_like(state[-1])
        return kernels.project(state[0], state[-1]), *kernels.combine(step, *state), step

    calm = passes(steps, weights, scale, z, g)
    steps[2, 1], weights[1], g[2, 5], z[2] = torch.nan, torch.inf, torch.inf, torch.nan
    wild = passes(steps, weights, scale, z, g)
    return all(torch.equal(a[:1], b[:1]) for a, b in zip(calm, wild, strict=True)) and not any(
        torch.isfinite(t[1:]).all(dim=-1).any() for t in wild
    )


def rows_of_a_solve_are_alone():
    """Return whether the problems of a batch solve to the same bits where one of them is NaN from some step on."""
    problem, found = tanh_contraction(), []
    for spoils in (False, True):
        calls = []

        def f(z, spoils=spoils, calls=calls):
            calls.append(0)
            bad = torch.tensor([[False], [spoils and len(calls) > 4], [False]])
            return torch.where(bad, torch.nan, problem.f(z))

        z, stats, _ = solve(f, problem.z0, Broyden(max_steps=30, tol=1e-9, kernels=True))
        assert z.isfinite().all() and stats.converged.tolist() == [True, not spoils, True]
        found.append(z)
    return torch.equal(found[0][::2], found[1][::2])


if __name__ == "__main__":
    json.dump(
        {
            "float32": [errors_of_the_passes(*case) for case in PASSES],
            "float64": [errors_of_the_passes(*case, dtype=torch.float64) for case in PASSES],
            "solves": {name: errors_of_a_solve(*case) for name, case in SOLVES.items()},
            "growth": growth(),
            "single": in_single_precision(),
            "rows": rows_are_alone(),
            "rows of a solve": rows_of_a_solve_are_alone(),
        },
        sys.stdout,
    )

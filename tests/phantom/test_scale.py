"""The stopping rule has no unit: states of any size, solutions at zero, growth, and the floor of rounding."""

import pytest
import torch
from torch import Tensor

from phantom import Anderson, Broyden, FixedPoint
from phantom.solve import solve
from tests.phantom.problems import DTYPE, randn, with_radius
from tests.phantom.solvers import each

DIM, BATCH = 16, 8
TO_TOL = {
    "plain": FixedPoint(max_steps=80, tol=1e-5),
    "anderson": Anderson(max_steps=80, tol=1e-5),
    "broyden": Broyden(max_steps=80, tol=1e-5),
    "broyden_max": Broyden(max_steps=80, tol=1e-5, norm="max"),
    "anderson_rms": Anderson(max_steps=80, tol=1e-5, norm="rms"),
}
FIXED = {
    "plain_fixed": FixedPoint(max_steps=60, tol=None),
    "anderson_fixed": Anderson(max_steps=40, tol=None),
    "broyden_fixed": Broyden(max_steps=25, tol=None),
}
WEIGHT, INPUT = 0.7 * torch.linalg.qr(randn(DIM, DIM, seed=1))[0], randn(BATCH, DIM, seed=2)
SIZES = [1e-36, 1e-30, 1e-20, 1e-17, 3e-16, 1e-12, 1.0, 1e12, 1e17, 1e20, 1e30, 1e36]


def affine(size: float, rows: list[float] | None = None):
    """Return f in float32 of a solution about so large, and the solution by a dense solve in float64."""
    x = INPUT * size * (1.0 if rows is None else torch.tensor(rows, dtype=DTYPE)[:, None])
    truth = torch.linalg.solve(torch.eye(DIM, dtype=DTYPE) - WEIGHT.mT, x.mT).mT
    weight, x = WEIGHT.float(), x.float()
    return lambda z: z @ weight + x, truth


def relative_error(z: Tensor, truth: Tensor) -> float:
    """The largest over problems; in float64, where the squares of float32 numbers do not vanish."""
    return ((z.double() - truth).norm(dim=1) / truth.norm(dim=1)).max().item()


@each(TO_TOL | FIXED)
@pytest.mark.parametrize("size", SIZES)
def test_float32_states_of_any_size(solver, size):
    f, truth = affine(size)
    z, stats, _ = solve(f, torch.zeros(BATCH, DIM), solver)
    assert relative_error(z, truth) < 3e-4 and not stats.diverged.any()
    assert (stats.residual > 0).all() and (stats.residual <= 1e-5).all()
    assert stats.converged.all() == (solver.tol is not None)
    # the very steps of the problem at size one
    f, _ = affine(1.0)
    _, own, _ = solve(f, torch.zeros(BATCH, DIM), solver)
    assert (own.num_steps - stats.num_steps).abs().max() <= 1


@each(TO_TOL)
def test_problems_of_unlike_size_in_one_batch(solver):
    rows = [1e-36, 1e-25, 1e-12, 1e-3, 1.0, 1e8, 1e20, 1e36]
    f, truth = affine(1.0, rows)
    z, stats, _ = solve(f, torch.zeros(BATCH, DIM), solver)
    assert relative_error(z, truth) < 3e-4 and stats.converged.all()


@pytest.mark.parametrize("size", [1e-25, 1.0, 1e25])
def test_absolute_tolerances_keep_their_unit(size):
    f, truth = affine(size)
    z, stats, _ = solve(f, torch.zeros(BATCH, DIM), FixedPoint(max_steps=80, tol=1e-3 * size, stop="absolute"))
    g = (f(z) - z).double()
    torch.testing.assert_close(stats.residual.double(), g.norm(dim=1), rtol=1e-2, atol=0)
    assert stats.converged.all() and (g.norm(dim=1) < 1.01e-3 * size).all()
    assert relative_error(z, truth) < 1e-2


@each(TO_TOL)
def test_a_cotangent_of_any_size(solver):
    """The adjoint equation u = J^T u + g from u = 0, measured by |g|."""
    for size in SIZES:
        g = (INPUT * size).float()
        scale = g.double().norm(dim=1).float()
        u, stats, _ = solve(lambda u, g=g: u @ WEIGHT.float() + g, torch.zeros_like(g), solver, fz0=g, scale=scale)
        truth = torch.linalg.solve(torch.eye(DIM, dtype=DTYPE) - WEIGHT.mT, g.double().mT).mT
        assert relative_error(u, truth) < 3e-4 and stats.converged.all()


@each(TO_TOL)
def test_a_solution_at_zero(solver):
    """Relative to |f(z)| alone, the residual of f(z) = z / 2 is 1 for ever."""
    matrices = (0.5 * torch.eye(DIM, dtype=DTYPE), with_radius(0.6, DIM, seed=3))
    for matrix in matrices:
        z, stats, _ = solve(lambda z, m=matrix: z @ m, torch.ones(BATCH, DIM, dtype=DTYPE), solver)
        assert stats.converged.all() and (z.norm(dim=1) < 1e-3).all()
    z, stats, _ = solve(torch.zeros_like, torch.ones(2, 3, dtype=DTYPE), solver)
    assert stats.converged.all() and torch.equal(z, torch.zeros_like(z))


@each(TO_TOL | FIXED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("begin", [0.0, 0.3])
def test_steps_that_do_not_shrink_are_not_convergence(solver, dtype, begin):
    """f(z) = z + 1: |f(z)| grows, and with it the tolerance of a relative measure."""
    solver = type(solver)(
        max_steps=400, tol=1e-2, norm=solver.norm, **({"memory": 9} if type(solver) is Broyden else {})
    )
    z, stats, _ = solve(lambda z: z + 1, torch.full((2, 3), begin, dtype=dtype), solver)
    assert not stats.converged.any() and (stats.residual > 0.5).all()
    assert torch.equal(z, torch.full_like(z, begin))


@pytest.mark.parametrize("tol", [1e-4, None])
@pytest.mark.parametrize("stop", ["relative", "absolute"])
@pytest.mark.parametrize("rate", [1.5, 3.0, -3.0])
def test_growth_is_not_progress(tol, stop, rate):
    """Each iterate of f(z) = rate z + 1 is further away, though its residual relative to |f(z)| is smaller."""
    z0 = torch.full((1, 2), 0.2, dtype=DTYPE)
    z, stats, _ = solve(lambda z: rate * z + 1, z0, FixedPoint(max_steps=30, tol=tol, stop=stop))
    assert torch.equal(z, z0) and not stats.converged.any()
    assert stats.residual.item() == stats.trace[0].item()


def test_a_start_within_the_tolerance_is_a_solution():
    """As documented: 1.001 z moves by a thousandth, which a tolerance of a hundredth allows."""
    z, stats, _ = solve(lambda z: 1.001 * z, torch.ones(1, 2, dtype=DTYPE), FixedPoint(max_steps=9, tol=1e-2))
    assert stats.converged.all() and stats.num_evals == 1
    z, stats, _ = solve(lambda z: 1.001 * z, torch.ones(1, 2, dtype=DTYPE), FixedPoint(max_steps=9, tol=1e-4))
    assert not stats.converged.any() and torch.equal(z, torch.ones_like(z))


@each(FIXED)
@pytest.mark.parametrize("stop", ["relative", "absolute"])
def test_a_solve_stops_at_its_rounding_floor(solver, stop):
    solver = type(solver)(max_steps=200, tol=1e-9, stop=stop)
    weight, x = WEIGHT.float(), INPUT.float()
    z, stats, _ = solve(lambda z: torch.tanh(z @ weight) + x, torch.zeros(BATCH, DIM), solver)
    assert stats.num_evals < 50 and not stats.diverged.any()
    assert (stats.stalled | stats.converged).all() and stats.stalled.any()
    fine = z.double()
    for _ in range(200):
        fine = torch.tanh(fine @ WEIGHT) + INPUT
    assert relative_error(z, fine) < 3e-6


def test_two_states_of_one_residual_are_a_floor():
    """The last digit goes to and fro: neither state is better than the other, and the first one is kept."""
    one, above = torch.ones(2, 3), torch.nextafter(torch.ones(2, 3), torch.tensor(2.0))
    solver = FixedPoint(max_steps=50, tol=1e-9, stop="absolute")
    z, stats, _ = solve(lambda z: torch.where(z == one, above, one), 3 * one, solver)
    assert stats.stalled.all() and torch.equal(z, one)
    assert stats.num_steps.tolist() == [2, 2] and stats.num_evals < 6


@pytest.mark.parametrize("stop", ["relative", "absolute"])
def test_slowness_alone_stops_nothing(stop):
    """A rate of 0.999 moves a thousandth a step; far from the rounding of f(z) that is progress."""
    slow = FixedPoint(max_steps=20000, tol=1e-7, stop=stop)
    _, stats, _ = solve(lambda z: 0.999 * z + 1e-3, torch.zeros(2, 3, dtype=DTYPE), slow)
    assert stats.converged.all() and not stats.stalled.any() and stats.num_steps.min() > 6000
    wobble = iter(range(10**6))

    def f(z: Tensor) -> Tensor:  # a residual that rises at every other step, far above rounding
        return 0.9 * z + (0.1 if next(wobble) % 2 else 0.1001)

    stats = solve(f, torch.zeros(1, 2), FixedPoint(max_steps=90, tol=1e-9))[1]
    assert not stats.stalled.any() and stats.num_steps.item() == 90


def test_the_floor_does_not_depend_on_the_neighbours():
    weight, x = WEIGHT.float(), INPUT.float()
    solver = FixedPoint(max_steps=200, tol=1e-9)

    def run(rows: list[int]):
        return solve(lambda z: torch.tanh(z @ weight) + x[rows], torch.zeros(len(rows), DIM), solver)

    z, stats, _ = run(list(range(BATCH)))
    for i in range(BATCH):
        own, alone, _ = run([i] * BATCH)
        assert torch.equal(own[i], z[i]) and alone.num_steps[i] == stats.num_steps[i]
        assert alone.stalled[i] == stats.stalled[i]


def test_growth_of_large_states_is_seen_as_soon():
    steps = []
    for size in (1.0, 1e15):
        _, stats, _ = solve(lambda z, size=size: 3 * z + size, torch.zeros(1, 2), FixedPoint(max_steps=40, tol=1e-5))
        assert stats.diverged.all()
        steps.append(stats.num_steps.item())
    assert steps[0] == steps[1]


@pytest.mark.parametrize("size", [1.0, 1e-30])
def test_what_residuals_are_relative_to_is_told_in_the_units_of_the_state(size):
    x = torch.full((2, 3), size)
    _, stats, _ = solve(lambda z: 0.5 * z + x, torch.zeros(2, 3), FixedPoint(max_steps=9, tol=None))
    torch.testing.assert_close(stats.scale / size, torch.full((2,), 3**0.5), rtol=1e-5, atol=0)

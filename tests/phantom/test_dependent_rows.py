"""Problems that depend on each other: the statistics describe the state returned, and convergence means all of them."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from phantom import DEQ, NPG, UPG, Anderson, Broyden, FixedPoint, Implicit, Solver, SolveWarning, fixed_point, report
from phantom.solve import solve
from tests.phantom.problems import DTYPE, linear_nonsymmetric, randn
from tests.phantom.solvers import FEW_STEPS, SOLVERS, Recorded, each

NODES = 60
CHAIN = torch.diag(torch.ones(NODES - 1, dtype=DTYPE), -1)
TO_TOL = {
    "plain": FixedPoint(max_steps=300, tol=1e-4),
    "plain_absolute": FixedPoint(max_steps=300, tol=1e-4, stop="absolute", norm="max"),
    "plain_rarely_asked": FixedPoint(max_steps=300, tol=1e-4, sync_every=7),
    "anderson": Anderson(max_steps=300, tol=1e-4),
    "broyden": Broyden(max_steps=300, tol=1e-4, memory=20),
}
SHORT = {
    "plain": FixedPoint(max_steps=20, tol=1e-4),
    "fixed_budget": FixedPoint(max_steps=20, tol=None),
    "fixed_budget_broyden": Broyden(max_steps=20, tol=None),
    "fixed_budget_anderson": Anderson(max_steps=20, tol=None),
    "never": Broyden(max_steps=9, tol=1e-13),
}


def measured(f, z: Tensor, z0: Tensor, solver: Solver) -> Tensor:
    """The residual of `z` in the words of the documentation."""
    fz = f(z).reshape(len(z), -1)
    g = fz - z.reshape(len(z), -1)
    if solver.norm == "max":
        return g.abs().amax(dim=1)
    first = f(z0).reshape(len(z), -1).norm(dim=1)
    return g.norm(dim=1) / torch.maximum(fz.norm(dim=1), first).clamp_min(1e-300)


def chain(width: int) -> tuple[Tensor, Tensor]:
    b = torch.zeros(NODES, width, dtype=DTYPE)
    b[0] = 1.0
    return b, torch.linalg.solve(torch.eye(NODES, dtype=DTYPE) - 0.99 * CHAIN, b)


@each(TO_TOL)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_a_chain_of_nodes_as_a_batch(solver, mode):
    b, truth = chain(3)
    with mode():
        solution = fixed_point(
            lambda z: 0.99 * (CHAIN @ z) + b, torch.zeros_like(b), solver=solver, grad=UPG(k=1, lam=1)
        )
    assert solution.stats.converged.all() and solution.stats.dependent
    torch.testing.assert_close(solution.z_star, truth, rtol=0, atol=1e-2)
    residual = measured(lambda z: 0.99 * (CHAIN @ z) + b, solution.z_star, torch.zeros_like(b), solver)
    torch.testing.assert_close(solution.stats.residual, residual, rtol=1e-9, atol=1e-14)


@each(SHORT)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("grad", [UPG(k=2, lam=0.5), UPG(k=2, lam=0.5, checkpoint=True), NPG(k=2, lam=0.5)], ids=str)
def test_too_few_steps_are_not_called_convergence(solver, mode, grad):
    b, truth = chain(3)

    def f(z: Tensor) -> Tensor:
        return 0.99 * (CHAIN @ z) + b

    calls = Recorded(f)
    with mode():
        solution = fixed_point(calls, torch.zeros_like(b), solver=solver, grad=grad)
    assert not solution.stats.converged.any() and (solution.z_star - truth).abs().max() > 0.5
    assert solution.stats.dependent and solution.stats.num_evals == len(calls.calls)
    residual = measured(f, solution.z_star, torch.zeros_like(b), solver)
    torch.testing.assert_close(solution.stats.residual, residual, rtol=1e-9, atol=1e-14)


def test_the_way_out():
    b, truth = chain(3)
    solver = FixedPoint(max_steps=300, tol=1e-4)
    solution = fixed_point(
        lambda z: 0.99 * (CHAIN @ z) + b, torch.zeros_like(b)[None], solver=solver, grad=NPG(k=1, lam=1.0)
    )
    assert solution.stats.converged.all() and not solution.stats.dependent
    torch.testing.assert_close(solution.z_star[0], truth, rtol=0, atol=1e-2)


@each(TO_TOL)
def test_a_state_without_a_batch_axis(solver):
    """(D,) is read as D problems of one unknown."""
    b = randn(NODES, seed=1)
    truth = torch.linalg.solve(torch.eye(NODES, dtype=DTYPE) - 0.99 * CHAIN, b)
    solution = fixed_point(lambda z: 0.99 * (CHAIN @ z) + b, torch.zeros_like(b), solver=solver, grad=NPG(k=1, lam=1.0))
    assert solution.stats.converged.all()
    torch.testing.assert_close(solution.z_star, truth, rtol=0, atol=3e-2)


@each(TO_TOL)
def test_a_mean_over_the_batch_couples_rows(solver):
    """Batch statistics: f(z) = 0.5 z + 0.4 mean(z) + x, solved densely."""
    x = randn(6, 3, seed=2)
    x[2:] *= 1e-3
    mix = 0.5 * torch.eye(6, dtype=DTYPE) + 0.4 / 6
    truth = torch.linalg.solve(torch.eye(6, dtype=DTYPE) - mix, x)
    solution = fixed_point(lambda z: mix @ z + x, torch.zeros_like(x), solver=solver, grad=NPG(k=1, lam=1.0))
    stats = solution.stats
    torch.testing.assert_close(
        stats.residual, measured(lambda z: mix @ z + x, solution.z_star, 0 * x, solver), rtol=1e-9, atol=1e-14
    )
    if isinstance(solver, Broyden):  # secants of one row that are due to others: it diverges before a row converges
        assert stats.dependent and not stats.converged.any()
        return
    assert stats.converged.all()
    torch.testing.assert_close(solution.z_star, truth, rtol=0, atol=3e-3)


def test_one_node_alone_at_rest():
    """A row that begins at its own fixed point, and is moved by another one later."""
    x = torch.tensor([[1.0], [0.0]], dtype=DTYPE)
    couple = torch.tensor([[0.5, 0.0], [0.9, 0.0]], dtype=DTYPE)
    z, stats, _ = solve(lambda z: couple @ z + x, torch.zeros_like(x), FixedPoint(max_steps=99, tol=1e-8))
    torch.testing.assert_close(z, torch.tensor([[2.0], [1.8]], dtype=DTYPE), rtol=0, atol=1e-6)
    assert stats.converged.all() and stats.dependent


@each(SOLVERS | FEW_STEPS)
def test_independent_problems_are_not_called_dependent(solver):
    problem = linear_nonsymmetric()
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            stats = fixed_point(problem.f, problem.z0, solver=solver, grad=UPG(k=1, lam=1.0)).stats
        assert not stats.dependent


def test_a_problem_that_diverges_does_not_wake_the_others():
    z, stats, _ = solve(
        lambda z: torch.stack((3 * z[0] + 1, 0.5 * z[1] + 1)), torch.zeros(2, 3), FixedPoint(max_steps=60, tol=1e-5)
    )
    assert stats.diverged.tolist() == [True, False] and stats.converged.tolist() == [False, True]
    assert not stats.dependent and torch.equal(z[0], torch.zeros(3))


def test_confirmation_can_be_left_out():
    b, _ = chain(3)
    with torch.no_grad():
        calls = Recorded(lambda z: 0.99 * (CHAIN @ z) + b)
        stats = fixed_point(
            calls, torch.zeros_like(b), solver=FixedPoint(max_steps=9, tol=None), grad=NPG(k=1, lam=1), confirm=False
        ).stats
    assert stats.num_evals == len(calls.calls) == 10 and not stats.confirmed


@pytest.mark.parametrize("sync_every", [1, 1000, None])
def test_parts_of_one_problem_do_not_converge_alone(sync_every):
    b, _ = chain(3)
    solver = FixedPoint(max_steps=20, tol=1e-4, sync_every=sync_every)
    with torch.no_grad():
        stats = fixed_point(lambda z: 0.99 * (CHAIN @ z) + b, torch.zeros_like(b), solver=solver).stats
    assert stats.dependent and not stats.converged.any()


def test_problems_that_were_joined_may_diverge():
    """The second one grows with the first, and had converged before that reached it."""
    x, c = torch.tensor([[1.0], [0.0]], dtype=DTYPE), torch.tensor([[3.0, 0], [3.0, 0]], dtype=DTYPE)
    z, stats, _ = solve(lambda z: c @ z + x, torch.zeros_like(x), FixedPoint(max_steps=60, tol=1e-8))
    assert stats.diverged.all() and stats.num_steps.max() < 20 and z.isfinite().all()


def test_problems_that_were_joined_stay_finite():
    def f(z: Tensor) -> Tensor:
        return torch.stack((0.9 * z[0] + 1, 0.5 * z[0], torch.sqrt(0.5 - z[2])))

    z, stats, _ = solve(f, torch.zeros(3, 1, dtype=DTYPE), FixedPoint(max_steps=60, tol=1e-8))
    assert f(z).isfinite().all() and stats.diverged.all()


def test_values_in_bfloat16_confirm_nothing():
    b, a = chain(3)[0].float(), CHAIN.float()
    solver = FixedPoint(max_steps=20, tol=1e-4, sync_every=1000)
    options = {"solver": solver, "grad": UPG(k=1, lam=1.0), "gradient_precision": torch.bfloat16}
    assert not fixed_point(lambda z: 0.99 * (a @ z) + b, torch.zeros_like(b), **options).stats.confirmed


def test_a_layer_confirms_unless_it_is_told_not_to():
    b, _ = chain(3)
    found = []
    for confirm in (True, False):
        deq = DEQ(solver=FixedPoint(max_steps=9, tol=None), confirm=confirm)
        with torch.no_grad():
            stats = deq(lambda z: 0.99 * (CHAIN @ z) + b, torch.zeros_like(b)).stats
        found.append((stats.num_evals, stats.confirmed))
    assert found == [(11, True), (10, False)]


def gradient_of_a_few_nodes(solver: Solver, on_failure: str):
    """Return the gradient of b for a loss of three nodes of a graph, its truth, and the statistics of the backward."""
    links = (torch.rand(NODES, NODES, generator=torch.Generator().manual_seed(1), dtype=DTYPE) < 0.1).to(DTYPE)
    links = 0.9 * links / torch.linalg.eigvals(links).abs().max()
    b, g = randn(NODES, 2, seed=2).requires_grad_(), torch.zeros(NODES, 2, dtype=DTYPE)
    g[:3] = 1.0
    forward = FixedPoint(max_steps=400, tol=1e-12)
    solution = fixed_point(
        lambda z: links @ z + b,
        torch.zeros_like(g),
        solver=forward,
        grad=Implicit(solver=solver),
        on_failure=on_failure,
    )
    (found,) = torch.autograd.grad(solution.value, b, g)
    truth = torch.linalg.solve(torch.eye(NODES, dtype=DTYPE) - links.mT, g)
    return found, truth, links, g, solution.stats.adjoint


@pytest.mark.parametrize("norm", ["l2", "rms", "max"])
@pytest.mark.parametrize("make", [FixedPoint, Anderson, Broyden])
def test_a_loss_of_a_few_nodes_has_the_gradient_of_all(make, norm):
    """Most cotangents are zero, and the adjoint there is not: relative to them no residual would ever be small."""
    solver = make(max_steps=400, tol=1e-10, norm=norm)
    found, truth, links, g, adjoint = gradient_of_a_few_nodes(solver, "raise")
    assert adjoint.converged.all() and adjoint.dependent and not adjoint.fallback.any()
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-7)
    order = torch.inf if norm == "max" else 2
    length, size = (torch.linalg.vector_norm(v, ord=order) for v in (links.mT @ found + g - found, g))
    assert length <= 1.01e-10 * size, "the residual of the whole"


@pytest.mark.parametrize("solver", [Broyden(max_steps=60, tol=None), FixedPoint(max_steps=200, tol=None)], ids=str)
def test_a_fixed_budget_says_that_the_adjoint_of_nodes_is_none(solver):
    """A node of cotangent zero is best at u = 0, as long as its neighbours have none."""
    report._said.clear()
    with pytest.warns(SolveWarning, match="adjoint solve.*changed with the state of"):
        found, truth, _, _, adjoint = gradient_of_a_few_nodes(solver, "useless")
    assert (found - truth).norm() > 0.1 * truth.norm(), "else there is nothing to tell"
    assert adjoint.dependent and not adjoint.converged.any() and (adjoint.residual > 1).any()


@pytest.mark.parametrize("size", [1e-30, 1e-13, 1e15, 1e20])
@pytest.mark.parametrize("make", [FixedPoint, Broyden])
def test_cotangents_out_of_the_range_of_squares_are_shared_too(make, size):
    """The loop multiplies such problems by a power of two, each by its own."""
    g = torch.zeros(3, 4)
    g[0] = size
    blocks = (0.1 * randn(3, 4, 3, 4, seed=7)).float() * torch.ones(3, 3).triu()[:, None, :, None]
    links, b = blocks.view(12, 12), torch.ones(3, 4, requires_grad=True)
    truth = torch.linalg.solve(torch.eye(12, dtype=DTYPE) - links.mT.to(DTYPE), g.to(DTYPE).view(12) / size).view(3, 4)
    forward, grad = FixedPoint(max_steps=100, tol=1e-5), Implicit(solver=make(max_steps=100, tol=1e-5))
    solution = fixed_point(lambda z: (links @ z.view(12)).view(3, 4) + b, torch.zeros(3, 4), solver=forward, grad=grad)
    (found,) = torch.autograd.grad(solution.value, b, g)
    adjoint = solution.stats.adjoint
    assert adjoint.dependent and adjoint.converged.all() and not adjoint.fallback.any()
    torch.testing.assert_close(found.to(DTYPE) / size, truth, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [1.0, 1e6])
def test_a_fixed_budget_tells_of_a_large_cotangent_too(size):
    """Relative to a cotangent of zero a product above four is infinite, and so is its rounding."""
    b, g = torch.ones(2, 1, dtype=DTYPE, requires_grad=True), torch.tensor([[size], [0.0]], dtype=DTYPE)
    links = torch.tensor([[0.5, 0.4], [0.0, 0.5]], dtype=DTYPE)  # the adjoint of the first is that of no other
    solver = FixedPoint(max_steps=60, tol=None)
    solution = fixed_point(
        lambda z: links @ z + b, torch.zeros_like(g), solver=solver, grad=Implicit(solver=solver), on_failure="ignore"
    )
    torch.autograd.grad(solution.value, b, g)
    adjoint = solution.stats.adjoint
    assert adjoint.dependent and adjoint.fallback.tolist() == [False, True]
    assert solution.stats.num_vjps == adjoint.num_evals == 61


def test_independent_cotangents_are_left_alone():
    """Some zero, some not, by a fixed budget: one product more at most, and the same answer."""
    weight, x = 0.7 * torch.linalg.qr(randn(6, 6, seed=3))[0], randn(8, 6, seed=4).requires_grad_()
    g = randn(8, 6, seed=5) * (torch.arange(8) % 2)[:, None]
    truth = torch.linalg.solve(torch.eye(6, dtype=DTYPE) - weight.mT, g.mT).mT
    for confirm in (True, False):
        solver = Broyden(max_steps=20, tol=None)
        solution = fixed_point(
            lambda z: z @ weight.mT + x,
            torch.zeros_like(g),
            solver=solver,
            grad=Implicit(solver=solver),
            confirm=confirm,
        )
        (found,) = torch.autograd.grad(solution.value, x, g)
        adjoint = solution.stats.adjoint
        torch.testing.assert_close(found, truth, rtol=0, atol=1e-9)
        assert not adjoint.dependent and not adjoint.fallback.any() and (adjoint.residual < 1e-9).all()
        assert solution.stats.num_vjps - 20 in ((0, 1) if confirm else (0,))


def test_the_rounding_of_one_more_evaluation_is_no_dependence():
    """The evaluation that confirms rounds otherwise, as in a batch of another size; a residual may be zero by luck."""
    rates, calls = torch.tensor([[0.5], [0.1]], dtype=DTYPE), []

    def f(z: Tensor) -> Tensor:
        calls.append(None)
        return (rates * z + 1) * (1 + torch.finfo(DTYPE).eps * (len(calls) == 62))

    with torch.no_grad():
        stats = fixed_point(f, torch.zeros(2, 3, dtype=DTYPE), solver=FixedPoint(max_steps=60, tol=None)).stats
    assert len(calls) == 62, "the best iterates are of different steps, else nothing is confirmed"
    assert stats.trace.amin(dim=0)[1] == 0 < stats.residual[1] < 1e-15
    assert stats.confirmed and not stats.dependent


def test_a_residual_of_zero_meets_a_tolerance_of_zero():
    """One problem is held at its exact solution while the other goes on: to be at `tol` is not to move."""
    end = torch.tensor([[9.0], [2.0]], dtype=DTYPE)
    solver = FixedPoint(max_steps=20, tol=0.0)
    z, stats, _ = solve(lambda z: torch.minimum(z + 1, end), torch.zeros(2, 3, dtype=DTYPE), solver)
    assert torch.equal(z, end.expand(2, 3)) and stats.converged.all() and not stats.dependent
    assert stats.num_steps.tolist() == [9, 2] and stats.num_evals == 10


@dataclass(frozen=True, kw_only=True)
class Preconditioned(Solver):
    """z <- z + P g for the D unknowns of a problem; notes the shapes that `start` gets."""

    p: Tensor
    shapes: list = field(default_factory=list)

    def start(self, z: Tensor, g: Tensor) -> None:
        self.shapes.append(tuple(z.shape))

    def propose(self, memory: None, z: Tensor, g: Tensor) -> Tensor:
        return z + (g.view(-1, len(self.p)) @ self.p.mT).view_as(z)


def test_a_solver_of_one_s_own_begins_again_with_one_problem():
    """All nodes of a chain but the last are at their solution, until the one behind them moves."""
    chain, x = torch.diag(torch.ones(3), 1), torch.zeros(4, 2)
    x[-1] = 1
    solver = Preconditioned(p=torch.eye(2), max_steps=10)
    found = fixed_point(lambda z: chain @ z + x, torch.zeros(4, 2), solver=solver)
    assert solver.shapes == [(4, 2), (1, 8)]
    assert torch.equal(found.z_star, torch.ones(4, 2))

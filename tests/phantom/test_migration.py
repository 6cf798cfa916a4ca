"""The table of docs/migration.md in numbers: what torchdeq computes, and what is written here instead."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from phantom import (
    DEQ,
    UPG,
    Anderson,
    Broyden,
    FixedPoint,
    Implicit,
    JacobianRegularizer,
    Rollout,
    SpectralNorm,
    WeightNorm,
    diagnostics,
    fixed_point,
    variational_mask,
)

torchdeq = pytest.importorskip("torchdeq", reason="pip install --no-deps torchdeq")
dropout, loss, norm = (pytest.importorskip(f"torchdeq.{name}") for name in ("dropout", "loss", "norm"))

PAGE = Path(__file__).parents[2] / "docs/migration.md"
EXACT = 1e-12
NEVER = 1e-30  # a tolerance that no residual meets
SOLVERS = {"fixed_point_iter": FixedPoint, "anderson": Anderson, "broyden": Broyden}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def problem():
    weight = nn.Parameter(0.5 * torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0])
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    return lambda z: torch.tanh(z @ weight.T + x), torch.zeros(4, 6, dtype=torch.float64), [weight, x]


def same(found: Tensor, expected: Tensor, leaves: list[Tensor] | None = None, tol: float = EXACT) -> None:
    """Compare values and, with leaves, the gradients of one function of them."""
    torch.testing.assert_close(found, expected, rtol=tol, atol=tol)
    if leaves is not None:
        gradients = [torch.autograd.grad(each.sin().sum(), leaves, retain_graph=True) for each in (found, expected)]
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=tol, atol=tol)
        assert gradients[0][0].abs().max() > 1e-3


@pytest.mark.parametrize(("k", "lam"), [(1, 1.0), (4, 0.5)])
def test_plain_iteration_and_unrolled_gradient(problem, k, lam):
    f, z0, leaves = problem
    theirs = torchdeq.get_deq(f_solver="fixed_point_iter", f_max_iter=9, f_tol=NEVER, grad=k, tau=lam)
    ours = DEQ(solver=FixedPoint(max_steps=9, tol=None), grad=UPG(k=k, lam=lam))
    same(ours(f, z0).value, theirs(f, z0)[0][-1], leaves)


@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_and_implicit_gradient(problem, name):
    f, z0, leaves = problem
    theirs = torchdeq.get_deq(
        f_solver=name, f_max_iter=200, f_tol=1e-11, b_solver=name, b_max_iter=200, b_tol=1e-11, ift=True
    )
    solver = SOLVERS[name](max_steps=200, tol=1e-11, stop="absolute")
    same(DEQ(solver=solver, grad=Implicit(solver=solver))(f, z0).value, theirs(f, z0)[0][-1], leaves, tol=1e-8)


@pytest.mark.parametrize("name", SOLVERS)
def test_stop_modes_and_statistics(problem, name):
    f, z0, _ = problem
    for theirs, ours in (("abs", "absolute"), ("rel", "relative")):
        deq = torchdeq.get_deq(f_solver=name, f_max_iter=60, f_tol=1e-6, f_stop_mode=theirs).eval()
        _, info = deq(f, z0)
        with torch.no_grad():
            stats = fixed_point(f, z0, solver=SOLVERS[name](max_steps=60, tol=1e-6, stop=ours)).stats
        assert info[f"{theirs}_lowest"].max() < 1e-6 and stats.residual.max() <= 1e-6 and bool(stats.converged.all())
        if name == "fixed_point_iter":
            assert int(info["nstep"].max()) == int(stats.num_steps.max()) + 1, "they count the evaluation at the end"


def test_tau_of_the_solver_is_lam(problem):
    f, z0, _ = problem
    solve = torchdeq.get_deq(f_solver="fixed_point_iter", f_max_iter=7, f_tol=NEVER).eval()
    with torch.no_grad():
        found = fixed_point(f, z0, solver=FixedPoint(max_steps=7, tol=None, lam=0.6)).value
    same(found, solve(f, z0, solver_kwargs={"tau": 0.6})[0][-1])


def test_the_final_iterate(problem):
    f = lambda z: 1.5 * z + 1  # noqa: E731  (the best iterate is the start)
    z0 = problem[1]
    solve = torchdeq.get_deq(f_solver="fixed_point_iter", f_max_iter=7, f_tol=NEVER).eval()
    with torch.no_grad():
        theirs = solve(f, z0, {"return_final": True})[0][-1]
        same(fixed_point(f, z0, solver=Rollout(max_steps=7)).value, theirs)
        same(fixed_point(f, z0, solver=FixedPoint(max_steps=7, tol=None), returns="last").value, theirs)


@pytest.mark.parametrize("settings", [{"indexing": [2, 5]}, {"n_states": 3}])
def test_states_of_the_solve_and_their_correction(problem, settings):
    f, z0, leaves = problem
    theirs = torchdeq.get_deq(
        core="indexing", f_solver="fixed_point_iter", f_max_iter=9, f_tol=NEVER, grad=2, tau=0.5, **settings
    )
    path, _ = theirs(f, z0)
    steps = settings.get("indexing", [3, 6])
    solution = DEQ(solver=FixedPoint(max_steps=9, tol=None), grad=UPG(k=2, lam=0.5))(f, z0, states=steps)
    ours = (*solution.states, solution.value)
    for a, b in zip(ours, path, strict=True):
        same(a, b, leaves)
    target = torch.ones_like(z0)
    expected = loss.fp_correction(lambda z, y: (z - y).square().mean(), (path, target), weight_func="exp", gamma=0.8)
    found = sum(0.8 ** (2 - i) * (z - target).square().mean() for i, z in enumerate(ours))
    same(found, expected, leaves)


def test_slices_of_the_solve(problem):
    """By default theirs goes on from the output of the gradient's steps: several solves, one after the other."""
    f, z, leaves = problem
    theirs = torchdeq.get_deq(f_solver="fixed_point_iter", f_max_iter=9, f_tol=NEVER, grad=2, tau=0.5, indexing=[2, 5])
    deq = DEQ(grad=UPG(k=2, lam=0.5))
    path, _ = theirs(f, z)
    for steps, expected in zip((2, 3, 4), path, strict=True):
        z = deq(f, z, solver=FixedPoint(max_steps=steps, tol=None)).value
        same(z, expected, leaves)


@pytest.mark.parametrize("settings", [{"sup_loc": [1, 3]}, {"sup_gap": 2}])
def test_states_of_the_unrolled_gradient(problem, settings):
    f, z0, leaves = problem
    theirs = torchdeq.get_deq(f_solver="fixed_point_iter", f_max_iter=9, f_tol=NEVER, grad=4, tau=0.5, **settings)
    path, _ = theirs(f, z0)
    ours = DEQ(solver=FixedPoint(max_steps=9, tol=None), grad=UPG(k=4, lam=0.5))(f, z0, unrolled=True).unrolled
    for step, expected in zip(settings.get("sup_loc", [2]), path, strict=False):
        same(ours[step - 1], expected, leaves)
    same(ours[-1], path[-1], leaves)


def test_more_steps_in_evaluation(problem):
    f, z0, _ = problem
    theirs = torchdeq.get_deq(f_solver="fixed_point_iter", f_max_iter=5, eval_f_max_iter=12, f_tol=NEVER).eval()
    ours = DEQ(solver=FixedPoint(max_steps=5, tol=None), eval_solver=FixedPoint(max_steps=12, tol=None)).eval()
    with torch.no_grad():
        same(ours(f, z0).value, theirs(f, z0)[0][-1])


def test_jacobian_regularisation_and_spectral_radius(problem):
    f, z0, _ = problem
    z = z0.clone().requires_grad_()
    jacobian = diagnostics.dense_jacobian(f, z0)
    truth = float(jacobian.square().sum() / z.numel())  # of which both are estimates
    assert float(JacobianRegularizer(num_probes=400)(f, z0)) == pytest.approx(truth, rel=0.1)
    assert float(loss.jac_reg(f(z), z, vecs=400)) == pytest.approx(truth, rel=0.1)

    def g(z):  # a symmetric Jacobian, on whose radius the power method settles
        return z @ jacobian[0] @ jacobian[0].T

    expected = float(torch.linalg.eigvalsh(jacobian[0] @ jacobian[0].T).max())
    _, radius = loss.power_method(g(z), z, n_iters=200)
    assert float(radius.max()) == pytest.approx(expected, rel=0.02)
    assert float(diagnostics.spectral_radius(g, z0, num_steps=200).max()) == pytest.approx(expected, rel=0.02)


def test_weight_norm():
    theirs = nn.Linear(5, 3, dtype=torch.float64)
    ours = WeightNorm(theirs.weight)
    x = torch.randn(2, 5, dtype=torch.float64)
    norm.apply_norm(theirs, norm_type="weight_norm")
    same(x @ ours().T + theirs.bias, theirs(x))


def test_spectral_norm():
    theirs = nn.Linear(5, 3, dtype=torch.float64)
    ours = SpectralNorm(theirs.weight, learned=True).eval()
    norm.apply_norm(theirs, norm_type="spectral_norm")
    for _ in range(300):
        torchdeq.reset_deq(theirs.train())
        ours.train()()
    assert float(torch.linalg.matrix_norm(ours().detach(), ord=2)) == pytest.approx(1.0)
    same(ours() / ours().norm(), theirs.weight / theirs.weight.norm(), tol=1e-6)


def test_variational_dropout():
    x = torch.ones(4, 200, 8)
    theirs = dropout.VariationalDropout1d(0.25)
    kept = theirs(x)
    mask = variational_mask((4, 1, 8), p=0.25, training=True, device=x.device, dtype=x.dtype)
    assert torch.equal(theirs(x), kept), "one draw for a whole solve"
    assert kept.unique().tolist() == (x * mask).unique().tolist() == pytest.approx([0, 4 / 3])


def test_the_page_names_what_is_tested_here():
    rows = [line.split("|")[1] for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    words = {word for row in rows for word in re.findall(r"\w+", row)}
    text = Path(__file__).read_text()
    tested = {"f_solver", "f_max_iter", "f_tol", "f_stop_mode", "grad", "tau", "ift", "indexing", "n_states", "sup_loc"}
    tested |= {"sup_gap", "eval_f_max_iter", "return_final", "fp_correction", "jac_reg", "power_method", "apply_norm"}
    assert tested <= words and all(name in text for name in tested)
